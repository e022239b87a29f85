"""The commands of a package, listed without importing any of them.

`python -m infer` and `python -m train` print what this finds. PyTorch takes seconds to load, so
the files are parsed and not imported.
"""

import ast
import difflib
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

USER_ERROR = 2  # as in `configs.cli`, whose imports take longer than all that is done here


def commands_of(package: Path) -> dict[str, str]:
    """The commands of a package by name, each with the first sentence of its docstring.

    A command is a module of the package, or a folder in it with a `__main__.py`, that has an
    `if __name__ == "__main__"` of its own.
    """
    files = {path.stem: path for path in package.glob("*.py") if path.name != "__main__.py"}
    files |= {path.parent.name: path for path in package.glob("*/__main__.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    return {name: first_sentence(tree) for name, tree in sorted(trees.items()) if is_run(tree)}


def is_run(tree: ast.Module) -> bool:
    """Whether a module has an `if __name__ == "__main__"`."""
    conditions = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in conditions


def first_sentence(tree: ast.Module) -> str:
    """The first sentence of a module's docstring on one line; "" if it has none."""
    paragraph = " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s", paragraph)[0]


def list_commands(package: Path, words: Sequence[str]) -> int:
    """Print the commands of a package, or what is wrong with the words typed after its name.

    Args:
        package: its folder.
        words: the command line after `python -m PACKAGE`.

    Returns:
        The exit code: 0, or 2 if the first word is not -h or --help.
    """
    name, commands = package.name, commands_of(package)
    if words and words[0] not in ("-h", "--help"):
        print(f"error: {correction(name, commands, words[0])}", file=sys.stderr)
        return USER_ERROR
    print(f"The commands of {name}. With --help, each lists its options.\n")
    width = max(map(len, commands))
    for command, sentence in commands.items():
        print(f"  python -m {name}.{command:<{width}}  {sentence}")
    return 0


def correction(package: str, commands: Collection[str], word: str) -> str:
    """What to type in place of `python -m PACKAGE WORD`."""
    command = word.removeprefix(f"{package}.")
    if command in commands:
        return f"{word}: a command is typed with a dot, python -m {package}.{command}"
    near = difflib.get_close_matches(command, commands, n=1)
    advice = f"did you mean python -m {package}.{near[0]}?" if near else "no name is near"
    return f"{word}: no such command of {package}; {advice} (there are {', '.join(commands)})"

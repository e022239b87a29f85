"""What the pages say must work as written: commands, imports, links, names and files."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from PIL import Image

import wan
from configs.command_line import CommandLine
from configs.command_list import commands_of
from configs.compose import compose_runs

ROOT = Path(__file__).parents[1]
ROOMS = ("wan", "infer", "train", "wan/miniature")
PAGES = [
    "README.md",
    *(f"{room}/README.md" for room in ROOMS),
    "notebooks/README.md",
    "wan/CHANGELOG.md",
    "wan/miniature/student/README.md",
    "wan/miniature/teacher/README.md",
]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
NOTEBOOKS = {
    f"notebooks/{path.name}": "\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    )
    for path in (ROOT / "notebooks").glob("*.ipynb")
}

LINES: dict[str, CommandLine] = {
    f"{package}.{name}": importlib.import_module(
        f"{package}.{name}" + (".__main__" if (ROOT / package / name).is_dir() else "")
    ).LINE
    for package in ("infer", "train")
    for name in commands_of(ROOT / package)
}


def fenced(text: str, *languages: str) -> list[str]:
    """The blocks of a page that are in one of these languages; "" is none."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for language, block in blocks if language in languages]


def prose(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Every `-m infer.x ...` and `-m train.x ...` of fenced blocks and between backticks."""
    blocks = fenced(text, "bash", "sh")
    inline = [one.replace("\n", " ") for one in re.findall(r"`(python -m [^`]*)`", prose(text))]
    joined = "\n".join([*blocks, *inline]).replace("\\\n", " ")
    found = re.findall(r"-m (?:infer|train)\.\w+[^\n]*", joined)
    # Not help, and not what a reader would write first
    return [one for one in found if not re.search(r"--help|\bmine\b", one)]


# --- commands and code ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "command"), [(page, one) for page in PAGES for one in commands(TEXTS[page])]
)
def test_commands_name_options_that_exist(page, command):
    _, module, *words = shlex.split(command, comments=True)
    options = [word for word in words if word != "-m"]
    runs = compose_runs(LINES[module], options, sweep="-m" in words)
    assert (len(runs) > 1) == ("-m" in words)
    assert all(run.config is not None for run in runs)


def test_the_pages_have_commands_of_every_kind():
    listed = {f"{room}.{name}" for room in ("infer", "train") for name in commands_of(ROOT / room)}
    assert set(LINES) == listed
    assert {c.split()[1] for text in TEXTS.values() for c in commands(text)} == listed
    for room in ("infer", "train"):
        of_room = {name for name in listed if name.startswith(room)}
        assert {name for name in of_room if f"`{name}`" in TEXTS[f"{room}/README.md"]} == of_room


@pytest.mark.parametrize("page", [page for page in PAGES if fenced(TEXTS[page], "python")])
def test_python_blocks_import_what_is_there(page):
    for block in fenced(TEXTS[page], "python"):
        tree = ast.parse(block)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports
        exec(compile(ast.Module(imports, []), page, "exec"), {})


def test_public_names_are_on_the_pages():
    for name in wan.__all__:
        assert f"`{name}`" in TEXTS["wan/README.md"] or f"`wan.{name}`" in TEXTS["wan/CHANGELOG.md"]


# --- links, files and names -----------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^):\s]+)\)", prose(TEXTS[page]).replace("\n", " "))
    folder = (ROOT / page).parent
    for target in targets:
        name, _, anchor = target.partition("#")
        path = folder / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_every_paper_that_is_named_is_linked(page):
    text = prose(TEXTS[page])
    unlinked = re.sub(r"\[[^\]]*\]\(https?://[^)]*\)", "", text)
    assert not re.findall(r"arXiv:\d{4}\.\d{5}", unlinked)


@pytest.mark.parametrize("page", ROOMS)
def test_the_readme_links_to_every_room(page):
    assert f"]({page}/README.md)" in README


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS])
def test_files_and_modules_that_are_named_exist(page):
    text = prose(TEXTS.get(page) or NOTEBOOKS[page])
    rows = [line.rsplit("|", 2)[-2] for line in text.splitlines() if line.startswith("| `wan.")]
    if page == "wan/CHANGELOG.md":  # the columns before the last name what was
        text = "\n".join([*(one for one in text.splitlines() if not one.startswith("|")), *rows])
    named = re.findall(r"`([\w./-]+)`", text)
    for name in named:
        if re.search(r"\.(py|yaml|ipynb|mplstyle)$", name) and "NAME" not in name:
            places = (ROOT, (ROOT / page).parent, ROOT / "tests")
            anywhere = "/" not in name and list(ROOT.glob(f"*/**/{name}"))
            assert anywhere or any((place / name).exists() for place in places), name
        elif re.fullmatch(r"(wan|infer|train|configs)(\.\w+)+", name):
            assert resolves(name), name
    # Those of figures, which stand in plain blocks
    for block in fenced(TEXTS.get(page, ""), ""):
        for name in re.findall(r"(?<![\w/])\w+/\w+\.py", block):
            assert (ROOT / page).parent.joinpath(name).exists(), name


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parent, _, last = name.rpartition(".")
    if importlib.util.find_spec(parent) is None:
        return False
    return importlib.util.find_spec(name) is not None or hasattr(
        importlib.import_module(parent), last
    )


def table_rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, its own two lines left out."""
    section = text.split(f"\n{heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(("heading", "column"), [("## Equations", 1)])
def test_functions_in_the_tables_are_in_their_files(heading, column):
    rows = table_rows(TEXTS["wan/README.md"], heading)
    assert len(rows) > 15
    for row in rows:
        function, file = (row[i].strip("`") for i in (column, column + 1))
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        assert set(function.split(".")) <= defined, (function, file)


def test_everything_in_the_tree_exists():
    (tree,) = fenced(README, "")
    top, checked = ROOT, 0
    for line in tree.splitlines():
        indent, name, rest = re.fullmatch(r"( *)(\w+/) +(.+)", line).groups()
        folder = top / name if indent else ROOT / name
        top = top if indent else folder
        assert folder.is_dir(), name
        for file in re.findall(r"\b\w+\.py\b|\b\w+/", rest):
            assert (folder / file).exists(), f"{name}{file}"
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("room", ["wan", "infer"])
def test_every_file_of_a_room_is_in_its_tree(room):
    """Of `wan` and `infer`; what `wan/miniature` and `train` hold is in tables of their pages."""
    (tree,) = [one for one in fenced(TEXTS[f"{room}/README.md"], "") if re.match(r"\w+/ ", one)]
    listed, folder = set(), ""
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folder = folder if indent else name
        listed.add(folder + name if indent else folder)
    there = {
        path.relative_to(ROOT / room).as_posix()
        for path in (ROOT / room).glob("*/*.py")
        if path.name[:2] != "__" and path.parent.name != "miniature"
    }
    folders = {f"{path.parent.name}/" for path in (ROOT / room).glob("*/*.py")}
    assert {name for name in listed if name.endswith(".py")} == there
    assert {name for name in listed if name.count("/") == 1 and name[-1] == "/"} == folders


def test_every_file_of_train_and_of_the_world_is_in_a_table():
    for room in ("train", "wan/miniature"):
        names = [path.name for path in (ROOT / room).glob("*.py") if path.name[:2] != "__"]
        names += [f"{path.parent.name}/" for path in (ROOT / room).glob("*/*.py")]
        for name in names:
            assert f"`{name}`" in TEXTS[f"{room}/README.md"], name


# --- the README itself ----------------------------------------------------------------------------


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 10 * 1024


def test_ci_finds_both_setup_commands():
    script = (ROOT / ".ci/run").read_text()
    assert "for name in video tests" in script
    for name in ("video", "tests"):
        assert README.count(f"\n# setup: {name}\n") == 1
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)


def test_the_moving_picture_moves_and_is_small():
    path = ROOT / "wan/miniature/steps.png"
    assert path.stat().st_size < 300_000
    with Image.open(path) as picture:
        assert picture.n_frames == 17
    assert "(wan/miniature/steps.png)" in README
    assert "`python notebooks/moving_picture.py`" in README


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == wan.__version__
    assert f'version = "{wan.__version__}"' in (ROOT / "pyproject.toml").read_text()
    latest = re.findall(r"^## (\S+)$", TEXTS["wan/CHANGELOG.md"], flags=re.MULTILINE)[0]
    assert latest == wan.__version__


def test_a_wheel_holds_every_package_and_what_lies_beside_its_code():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "setuptools"
    ]
    rooms = [ROOT / room for room in ("wan", "configs", "infer", "train")]
    folders = [file.parent for room in rooms for file in room.rglob("__init__.py")]
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    included = setup["packages"]["find"]["include"]
    assert {p for p in packages if not any(fnmatch(p, one) for one in included)} == set()
    kept = {
        file
        for package, patterns in setup["package-data"].items()
        for pattern in patterns
        for file in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    code = {".py", ".md", ".png", ".jpg", ".pyc"}  # pages and their pictures stay in the repository
    data = {f for room in rooms for f in room.rglob("*") if f.is_file() and f.suffix not in code}
    assert data - kept == set()


def test_nothing_is_left_to_fill_in():
    assert "@@" not in "".join(TEXTS.values())

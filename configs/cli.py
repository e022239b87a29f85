"""The entry point of every command: arguments -> checked settings -> main(settings).

A user's error prints one line on stderr and exits with code 2, before anything heavy loads. How
arguments become settings is in `configs.compose`.
"""

import re
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, reduce
from typing import Any, NoReturn

import yaml

from configs.command_line import COMMON, CommandLine, help_text, option_names, short_key
from configs.compose import Run, compose_runs
from configs.progress import progress_shown, reading_settings
from configs.start import interrupt_from_now_on
from wan.errors import WanError, shortened, visible

USER_ERROR = 2
INTERRUPTED = 130  # what shells report after Ctrl-C

FLAGS = {
    "-h, --help": "print this and stop",
    "-m, --multirun": "run all combinations of comma-separated values: -m steps=4,8 seed=0,1",
    "--cfg": "print the settings as YAML and stop",
    "--traceback": "show where in the code an error was raised",
}


Main = Callable[[Run[Any]], int | None]


def run(main: Main, line: CommandLine, description: str) -> NoReturn:
    """Read sys.argv, call `main` once per point of the sweep, and exit.

    The exit code is the highest that `main` returned (None counts as 0), 2 after a WanError or a
    file that could not be read or written, 130 after Ctrl-C. All points of a sweep are checked
    before the first one runs.

    Args:
        description: what stands at the top of `--help`; a command's module docstring.
    """
    interrupt_from_now_on()
    code = execute(main, line, description, sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError as error:  # the disk that the output goes to is full
        code = report(error)
    sys.exit(code)


def show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning on one line, without the place in the code where it was raised."""
    print("warning: " + " ".join(shortened(visible(str(message))).split()), file=sys.stderr)


def execute(main: Main, line: CommandLine, description: str, arguments: Sequence[str]) -> int:
    """Run one command from arguments to exit code; prints the errors that a user can cause."""
    code = 0
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        try:
            with progress_shown("progress=false" not in arguments), reading_settings():
                runs = read_arguments(line, description, arguments)
            for number, one in enumerate(runs, 1):
                if one.title:
                    print(f"[{number}/{len(runs)}] {one.title}", file=sys.stderr)
                with progress_shown(one.progress):
                    try:
                        done = main(one) or 0
                    except (WanError, OSError) as error:  # the other points of a sweep still run
                        if "--traceback" in arguments:
                            raise
                        done = report(error, partial(option_named, line, one))
                code = max(code, done)
                if done == INTERRUPTED:
                    return INTERRUPTED
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED
        except (WanError, OSError) as error:
            if "--traceback" in arguments:
                raise
            return report(error)
    return code


def read_arguments(line: CommandLine, description: str, arguments: Sequence[str]) -> list[Run[Any]]:
    """The runs that a command's arguments define; none if a flag such as --help is answered.

    Raises:
        WanError: a flag is unknown, or `compose_runs` refuses an argument.
    """
    flags = [a for a in arguments if a.startswith("-")]
    tokens = [a for a in arguments if not a.startswith("-")]
    _check_flags(flags, line)
    if {"-h", "--help"} & set(flags):
        print(help_text(line, description, FLAGS))
        return []
    runs = compose_runs(line, tokens, sweep=bool({"-m", "--multirun"} & set(flags)))
    if "--cfg" not in flags:
        return runs
    for one in runs:
        print(yaml.safe_dump(asdict(one.config), allow_unicode=True, sort_keys=False), end="")
    return []


def report(error: Exception, named: Callable[[str], str] = str) -> int:
    """Print an error on one line; returns the exit code.

    Args:
        named: puts in front of a message what it is about.
    """
    message = error.on_command_line if isinstance(error, WanError) else str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    print("error: " + " ".join(shortened(visible(named(message))).split()), file=sys.stderr)
    return USER_ERROR


def option_named(line: CommandLine, run: Run[Any], message: str) -> str:
    """A message about a file or a folder, with the option that named it in front."""
    typed = [n for n in option_names(line.schema) if run.sources.get(n) == "command line"]
    for name in typed:
        value = reduce(getattr, name.split("."), run.config)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and one and message.startswith((f"{one}: ", f"{one}/")):
                return f"{short_key(line, name)}={message}"
    return message


def _check_flags(flags: Sequence[str], line: CommandLine) -> None:
    known = [name for names in FLAGS for name in names.split(", ")]
    for flag in flags:
        if flag in known:
            continue
        name = re.sub(r"=.*", "", flag.lstrip("-"), flags=re.DOTALL).replace("-", "_")
        options = [*option_names(line.schema), *line.shortcuts, *COMMON]
        if name in options:
            raise WanError(f"{flag.split('=')[0]}: options are written without dashes: {name}=..")
        raise WanError(f"unknown flag {flag}; the flags are {', '.join(known)}")

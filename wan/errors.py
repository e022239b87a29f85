"""The exception for every error that a user can cause."""

from collections.abc import Sequence


class WanError(ValueError):
    """A request that cannot be carried out as given.

    The message says what was given, what is allowed and what to try. Commands print it on one line
    and exit with code 2; library callers catch it as a ValueError.

    Attributes:
        on_command_line: the same in the options of a command, where those differ from the
            arguments of Python.
    """

    def __init__(self, message: str, on_command_line: str | None = None) -> None:
        super().__init__(message)
        self.on_command_line = message if on_command_line is None else on_command_line

    def about(self, what: str) -> "WanError":
        """The same error with `what` in front, such as the file that it is about."""
        return WanError(f"{what}: {self}", f"{what}: {self.on_command_line}")


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are not known, and list those that are."""
    if unknown := [name for name in names if name not in known]:
        raise WanError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(known)}")

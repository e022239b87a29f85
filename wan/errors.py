"""The exception for every error that a user can cause."""

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

MAX_MESSAGE = 2000  # characters
# Characters of these kinds move the cursor, change the direction of the text, or cannot be printed.
HIDDEN_KINDS = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
JOINERS = "\u200c\u200d"  # of letters and of emoji; harmless


def visible(text: str) -> str:
    """A text that is safe to print: control characters as escapes such as `\\x1b`.

    Line ends and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(
        one.encode("unicode_escape").decode()
        if one not in "\n\t" + JOINERS and unicodedata.category(one) in HIDDEN_KINDS
        else one
        for one in text
    )


def shortened(text: str, limit: int = MAX_MESSAGE) -> str:
    """A text of at most `limit` characters; what is left out is left out of its middle."""
    if len(text) <= limit:
        return text
    end = limit // 4
    gap = f" [... {len(text) - limit:,} characters more ...] "
    return text[: limit - end - len(gap)] + gap + text[-end:]


class WanError(ValueError):
    """A request that cannot be carried out as given.

    The message says what was given, what is allowed and what to try. Commands print it on one line
    and exit with code 2; library callers catch it as a ValueError. What it quotes may come from a
    stranger's file: it is made `visible`, and cut at `MAX_MESSAGE` characters.

    Attributes:
        on_command_line: the same in the options of a command, where those differ from the
            arguments of Python.
    """

    def __init__(self, message: str, on_command_line: str | None = None) -> None:
        on_command_line = message if on_command_line is None else on_command_line
        super().__init__(shortened(visible(message)))
        self.on_command_line = shortened(visible(on_command_line))

    def about(self, what: str) -> "WanError":
        """The same error with `what` in front, such as the file that it is about."""
        return WanError(f"{what}: {self}", f"{what}: {self.on_command_line}")


@contextmanager
def errors_about(what: str) -> Iterator[None]:
    """Put `what` in front of the `WanError` that is raised inside."""
    try:
        yield
    except WanError as error:
        raise error.about(what) from error


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are not known, and list those that are."""
    if unknown := [name for name in names if name not in known]:
        raise WanError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(known)}")

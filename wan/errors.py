"""The exception for every error that a user can cause."""

from collections.abc import Sequence


class WanError(ValueError):
    """A request that cannot be carried out as given.

    The message says what was given, what is allowed and what to try. Commands print it on one line
    and exit with code 2; library callers catch it as a ValueError.
    """


def check_names(what: str, names: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are not known, and list those that are."""
    if unknown := [name for name in names if name not in known]:
        raise WanError(f"{what}: unknown {', '.join(unknown)}; known are {', '.join(known)}")

"""The one exception for what a person can get wrong."""


class WanError(ValueError):
    """A request that cannot be carried out as given.

    The message says what was given, what is allowed and what to try. Commands print it on one line
    and exit with code 2; library callers catch it as a ValueError.
    """

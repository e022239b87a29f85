"""Dataclasses of settings whose fields say which values they may have, and kinds of records.

A model's settings come from a file that may be damaged or hostile, so each field is checked for
its type and its range by the dataclass that owns it, before anything is built or allocated. Records
of other things are checked for the types of their entries.
"""

import math
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, field, fields
from typing import Any, Union, get_args, get_origin, get_type_hints

from wan.errors import WanError

Bound = tuple[float | None, bool]  # a number, and whether it is itself allowed
NO_BOUND: Bound = (None, True)
MAX_PROMPT = 100_000  # characters; 512 tokens are some 2,500
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def bounds(
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
) -> dict[str, Bound]:
    """Bounds of a number, as they stand in the metadata of a dataclass field."""
    return {
        "low": (at_least, True) if above is None else (above, False),
        "high": (at_most, True) if below is None else (below, False),
    }


def bounded(default: Any = MISSING, *, max_length: int | None = None, **limits: Any) -> Any:
    """A dataclass field for a number, or for a tuple of numbers, within bounds.

    Args:
        max_length: the most numbers of a tuple.
        limits: see `bounds`.
    """
    return field(default=default, metadata=bounds(**limits) | {"max_length": max_length})


def check_settings(settings: Any) -> None:
    """Check every field of a dataclass for the type of its annotation and for its bounds.

    Understood are int, float, bool, str, tuples of these, and each of them `| None`; fields of
    other types are left alone. A list, which is what JSON has, becomes a tuple.

    Raises:
        WanError: names the field, its value, and what is allowed.
    """
    hints = get_type_hints(type(settings))
    for item in fields(settings):
        name, value = item.name, getattr(settings, item.name)
        kinds = [hints[name]]
        if get_origin(hints[name]) in (Union, types.UnionType):
            kinds = [kind for kind in get_args(hints[name]) if kind is not type(None)]
            if value is None:
                continue
        kind = kinds[0]
        low, high = (item.metadata.get(end, NO_BOUND) for end in ("low", "high"))
        if get_origin(kind) is tuple:
            entries = _entries(name, value, get_args(kind), item.metadata.get("max_length"))
            if type(value) is list:
                object.__setattr__(settings, name, tuple(value))  # frozen dataclasses as well
            kind = get_args(kind)[0]
        else:
            entries = [value]
        for entry in entries if kind in WORDS else ():
            if not is_of(kind, entry):
                raise WanError(f"{name}={_shown(value)}: must be {_wanted(kinds[0], WORDS[kind])}")
            check_number(name, entry, low, high)


def is_of(kind: type, value: Any) -> bool:
    """Whether a value of JSON has a type: True is no number, and a whole number is a real one."""
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


Kinds = Mapping[str, tuple[type, ...]]  # name of an entry -> the types that its value may have


def check_kinds(values: Any, kinds: Kinds, source: str, needed: Collection[str] = ()) -> None:
    """Check that a record that was read has its entries, each of a type that it may have.

    Args:
        values: what was read; entries without a kind are left alone.
        source: where it was read, for messages.
        needed: entries that must be there.

    Raises:
        WanError: it is no object, lacks an entry, or one is of another type.
    """
    if not isinstance(values, Mapping):
        raise WanError(f"{source}: damaged, a {type(values).__name__} where an object is needed")
    if missing := [name for name in needed if name not in values]:
        raise WanError(f"{source}: damaged, no {', '.join(missing)} in it")
    for name in kinds.keys() & values.keys():
        if not any(value_is(kind, values[name]) for kind in kinds[name]):
            words = " or ".join("null" if k is type(None) else k.__name__ for k in kinds[name])
            raise WanError(f"{source}: damaged, its {name} is no {words}")


def value_is(kind: type, value: Any) -> bool:
    """`is_of` for the types of numbers and truth, else the type itself."""
    return is_of(kind, value) if kind in WORDS else isinstance(value, kind)


def check_number(name: str, value: Any, low: Bound, high: Bound = NO_BOUND) -> None:
    """Refuse a value that is not a finite number within the bounds; without bounds, accept all."""
    (least, with_least), (most, with_most) = low, high
    if least is None and most is None:
        return
    fits = math.isfinite(value)
    fits &= least is None or value > least or (with_least and value == least)
    fits &= most is None or value < most or (with_most and value == most)
    if fits:
        return
    if most is None:
        allowed = f"be a number {'of at least' if with_least else 'above'} {least}"
    elif least is None:
        allowed = f"be a number {'of at most' if with_most else 'below'} {most}"
    elif with_least and with_most:
        allowed = f"be between {least} and {most}"
    else:
        allowed = f"lie in {'(['[with_least]}{least}, {most}{')]'[with_most]}"
    raise WanError(f"{name}={value}: must {allowed}")


def check_length(what: str, text: str) -> None:
    """Refuse a prompt that no model reads to its end, before it costs time and memory."""
    if len(text) > MAX_PROMPT:
        raise WanError(
            f"{what} has {len(text):,} characters: at most {MAX_PROMPT:,} are taken, and a model "
            "reads a few thousand"
        )


def _entries(name: str, value: Any, kinds: tuple[Any, ...], max_length: int | None) -> list[Any]:
    """The entries of a list or a tuple with as many of them as its annotation says."""
    if not isinstance(value, list | tuple):
        raise WanError(f"{name}={_shown(value)}: must be a list")
    if Ellipsis not in kinds and len(value) != len(kinds):
        raise WanError(f"{name}={_shown(value)}: must be a list of {len(kinds)}")
    if max_length is not None and len(value) > max_length:
        raise WanError(f"{name} has {len(value)} entries: must have at most {max_length}")
    return list(value)


def _wanted(kind: Any, words: str) -> str:
    return f"a list, each {words}" if get_origin(kind) is tuple else words


def _shown(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

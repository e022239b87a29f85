"""Settings that choose an attention, its layers and its steps. Does not import PyTorch."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from wan.errors import WanError

RANGES = re.compile(r"\s*(all|\d+(-\d*)?([\s,]+\d+(-\d*)?)*)\s*")
OPTIONS = ("tile", "window", "keep", "slice_size")


@dataclass
class AttentionConfig:
    """An attention variant, the layers and steps that use it, and an exact one for the others.

    `layers` and `steps` are "all", or numbers and ranges from 0: "3", "0-2 5", "8-" (8 and all
    after it). The other layers and steps use `exact`. Cross-attention is always exact, as it is
    about 1 % of the work: it uses `name` if that is sdpa, math or sliced, else `exact` if that is
    one of the three, else sdpa. An option that is None keeps the variant's default; an option that
    the variant lacks is refused.

    Raises:
        WanError: `layers` or `steps` cannot be read.
    """

    name: str = field(
        default="sdpa",
        metadata={
            "help": "exact: sdpa, math, sliced, cudnn, flash, flash3 (sage is 8-bit); or sparse: "
            "sliding_tile, spatial, temporal, factorised, frame_causal, top_k"
        },
    )
    exact: str = field(
        default="sdpa",
        metadata={
            "help": "exact attention for the other layers and steps; sdpa, math and sliced also "
            "for cross-attention, unless attention= is one of these three"
        },
    )
    layers: str = field(default="all", metadata={"help": 'layers that use it: all, or "0-2 5 8-"'})
    steps: str = field(default="all", metadata={"help": "steps that use it, in the same form"})
    tile: list[int] | None = field(
        default=None, metadata={"help": "sliding_tile, top_k: tokens of a tile along T, H, W"}
    )
    window: list[int] | None = field(
        default=None, metadata={"help": "sliding_tile: odd numbers of tiles seen along T, H, W"}
    )
    keep: float | None = field(
        default=None, metadata={"help": "top_k: share of the tiles that a tile sees"}
    )
    slice_size: int | None = field(default=None, metadata={"help": "sliced: queries at a time"})

    def __post_init__(self) -> None:
        for what in ("layers", "steps"):
            text = getattr(self, what)
            if RANGES.fullmatch(text) is None:
                raise WanError(
                    f"attention.{what}={text!r}: write all, or numbers and ranges from 0 such as "
                    '"0-2 5 8-"'
                )

    def __str__(self) -> str:
        """The name, then `field=value` for every field that differs from its default."""
        given = {
            item.name: getattr(self, item.name)
            for item in fields(self)[1:]
            if getattr(self, item.name) != item.default
        }
        return " ".join([self.name, *(f"{name}={value}" for name, value in given.items())])

    def options(self) -> dict[str, Any]:
        """The variant's own options that are set, by name."""
        values = {name: getattr(self, name) for name in OPTIONS}
        return {name: value for name, value in values.items() if value is not None}

    def uses(self, what: str, count: int) -> list[bool]:
        """Whether each of `count` layers or steps uses the variant; `what` is the field to read.

        Raises:
            WanError: a range that is empty or starts after the last one.
        """
        text = getattr(self, what)
        if text.strip() == "all":
            return [True] * count
        used = [False] * count
        for part in re.split(r"[\s,]+", text.strip()):
            first, dash, last = part.partition("-")
            end = int(last or count - 1) if dash else int(first)
            if int(first) >= count or end < int(first):
                raise WanError(
                    f"attention.{what}={text!r}: {part} names none of the {count} {what}, "
                    "which are numbered from 0"
                )
            used[int(first) : end + 1] = [True] * (min(end, count - 1) + 1 - int(first))
        return used

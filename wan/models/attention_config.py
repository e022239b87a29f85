"""The choice of an attention, its layers and its steps, as settings. Loads no PyTorch."""

import re
from dataclasses import dataclass, field, fields
from typing import Any

from wan.errors import WanError

RANGES = re.compile(r"\s*(all|\d+(-\d*)?([\s,]+\d+(-\d*)?)*)\s*")
OPTIONS = ("tile", "window", "keep", "slice_size")


@dataclass
class AttentionConfig:
    """An attention by name, where it is used, and what is used elsewhere.

    `layers` and `steps` are "all", or numbers and ranges from 0: "3", "0-2 5", "8-" (8 and all
    after it). What they leave out attends exactly. Cross-attention always does, as it is about 1 %
    of the work: with `name` if that is sdpa, math or sliced, or with `exact` if that is, or with
    sdpa. An option that is None is the variant's own; one that the variant lacks is refused.

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
            "help": "an exact one, for layers and steps that are left out; sdpa, math and sliced "
            "also for attention to the text, if the name is none of these three"
        },
    )
    layers: str = field(default="all", metadata={"help": 'layers that use it: all, or "0-2 5 8-"'})
    steps: str = field(default="all", metadata={"help": "steps that use it, likewise"})
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
                    f"attention.{what}={text!r}: say all, or numbers and ranges from 0 such as "
                    '"0-2 5 8-"'
                )

    def __str__(self) -> str:
        """The name, and what is not as it would be anyway."""
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

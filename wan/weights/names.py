"""Text about weights for messages: grouped names, short counts, sizes, counts per dtype."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn


def describe(component: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Describe the model that a set of our names and shapes belongs to, for messages."""
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    if component == "vae":
        width = shapes.get("encoder.conv_in.weight", ("?",))[0]
        channels = shapes.get("post_quant_conv.weight", ("?",))[0]
        return f"a VAE of width {width} with {channels} latent channels"
    if component == "transformer":
        width, channels = shapes.get("patch_embedding.weight", ("?", "?"))[:2]
        return f"a DiT of width {width} with {len(blocks)} blocks and {channels} input channels"
    width = shapes.get("final_norm.weight", ("?",))[0]
    return f"a UMT5 encoder of width {width} with {len(blocks)} blocks"


def grouped(names: Iterable[str], note: Mapping[str, str] | None = None, limit: int = 12) -> str:
    """Join names; those that differ only in their first number (not in their note) become one.

    For example `blocks.{0..29}.norm2.weight (30)`.
    """
    groups: dict[tuple[str, str], list[int | None]] = {}
    for name in names:
        segments = name.split(".")
        at = next((i for i, segment in enumerate(segments) if segment.isdecimal()), None)
        number = None if at is None else int(segments[at])
        if at is not None:
            segments[at] = "#"
        groups.setdefault((".".join(segments), note[name] if note else ""), []).append(number)
    parts = []
    for (pattern, text), found in groups.items():
        numbers = sorted(number for number in found if number is not None)
        shown = pattern
        if len(numbers) == 1:
            shown = pattern.replace("#", str(numbers[0]))
        elif numbers:
            shown = f"{pattern.replace('#', ranges(numbers))} ({len(numbers)})"
        parts.append(f"{shown} {text}".rstrip())
    more = [f"and {len(parts) - limit} more kinds"] if len(parts) > limit else []
    return ", ".join(parts[:limit] + more)


def ranges(numbers: list[int]) -> str:
    """Ascending numbers as `{0..3,7}`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) + "}"


def dtype_census(module: nn.Module) -> dict[torch.dtype, int]:
    """Number of parameters per dtype, the largest share first."""
    census: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        census[parameter.dtype] = census.get(parameter.dtype, 0) + parameter.numel()
    return dict(sorted(census.items(), key=lambda item: -item[1]))


def census_line(module: nn.Module) -> str:
    """`dtype_census` in words: `5.00 B parameters, 9.33 GiB: 4.98 B bfloat16, 15.2 M float32`."""
    census = dtype_census(module)
    size = sum(count * dtype.itemsize for dtype, count in census.items())
    parts = [f"{short(n)} {str(dtype).removeprefix('torch.')}" for dtype, n in census.items()]
    scaled = f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
    return f"{short(sum(census.values()))} parameters, {scaled}: {', '.join(parts)}"


def short(count: int) -> str:
    """A count to three digits with its unit: 4999787712 -> `5.00 B`."""
    for limit, unit in ((10**9, " B"), (10**6, " M"), (10**3, " k")):
        if count >= limit:
            value = count / limit
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}{unit}"
    return str(count)

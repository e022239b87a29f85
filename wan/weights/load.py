"""Checkpoints <-> our modules: the strict load, the census of dtypes, saving in a released layout.

Loading is strict both ways: every parameter is in the files and every tensor in the files is a
parameter of the right shape, or one error lists all that don't fit. The module is built on the meta
device and filled as tensors are read, so peak memory stays near the weights that are kept.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wan.errors import WanError
from wan.files import write_text
from wan.weights.checkpoint import INDEX_SUFFIX, Checkpoint, StoredTensor, family
from wan.weights.keys import ALIASES, KeyLayout, VAELevels, detect_layout, our_name, released_name
from wan.weights.quantize import check_quantize, quantize_layers, quantize_state
from wan.weights.safetensors_file import map_tensors, write_tensors
from wan.weights.tensor_reader import read_tensors

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Of weights that are in memory at once on their way to fewer bits.
GROUP_BYTES = 256 << 20

M = TypeVar("M", bound=nn.Module)


# --- loading --------------------------------------------------------------------------------------


class _NoInitialisation(TorchFunctionMode):
    """Leaves new parameters alone: on the meta device there is nothing to initialise.

    PyTorch answers a random draw there with parts of its compiler, whose import alone takes longer
    than loading a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def load_module(
    build: Callable[[], M],
    checkpoint: Checkpoint,
    component: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
    check_finite: bool = True,
    share_mapping: bool = True,
    quantize: str = "none",
    changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> M:
    """Build a module and fill every parameter from a checkpoint in any known layout.

    Args:
        build: makes the module, e.g. `lambda: WanDiT(config)`; it is called on the meta device.
        component: one of `wan.weights.keys.COMPONENTS`.
        dtype: of the weights; None keeps the stored dtypes. Parameters in whose name a pattern of
            the class's `FLOAT32_PARAMETERS` is found get at least float32.
        threads: that read, convert and place; None takes the number of cores, at most 8.
        check_finite: refuse NaN and infinity while the tensors pass by, and warn of zero matrices.
        share_mapping: let tensors that need no conversion be views of the mapped file (on the CPU),
            copied page by page only where they are written to. False reads them into memory.
        quantize: see `wan.weights.quantize`; weights are read `GROUP_BYTES` at a time, so that few
        of them
            are in memory in full.
        changes: our name -> called with that parameter, as stored and in at least float32; what it
            returns is rounded to `dtype`, then quantised (see `wan.lora.merge.LoRAMerge`). With it,
            weights are read in groups too.
    Raises:
        WanError: names, shapes or dtypes that don't fit, both ways, grouped; or not finite.
    """
    check_quantize(quantize)
    names = match_names(checkpoint, component)
    module = build_on_meta(build)
    wanted = module.state_dict()
    check_fit(checkpoint, component, names, wanted)
    float32 = cast(Any, type(module)).FLOAT32_PARAMETERS
    targets = {
        name: target_dtype(name, names.stored[name].entry.dtype, dtype, float32) for name in wanted
    }
    changes = changes or {}
    reads = targets | {
        name: torch.promote_types(names.stored[name].entry.dtype, torch.float32)
        for name in wanted
        if name in changes
    }
    stored = {name: names.stored[name] for name in wanted}
    state: dict[str, Tensor] = {}
    zero: set[str] = set()
    whole = quantize == "none" and not changes
    for group in [list(wanted)] if whole else group_names(wanted, reads):
        read, zeros = read_tensors(
            {name: stored[name] for name in group},
            reads,
            torch.device(device),
            threads=min(8, os.cpu_count() or 1) if threads is None else threads,
            check_finite=check_finite,
            share_mapping=share_mapping,
        )
        zero |= zeros
        for name in group:
            if name in changes:
                read[name] = changes[name](read[name]).to(targets[name])
        state |= read if quantize == "none" else quantize_state(read, quantize)
        del read  # before the next group needs the room
    warn_of_zeros(checkpoint, [stored[name] for name in sorted(zero)])
    if quantize != "none":
        quantize_layers(module, quantize)
    module.load_state_dict(state, assign=True)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without a value: {left}"
    return module


def build_on_meta(build: Callable[[], M]) -> M:
    """The module without values."""
    with torch.device("meta"), _NoInitialisation():
        return build()


def group_names(
    wanted: Mapping[str, Tensor], targets: Mapping[str, torch.dtype]
) -> Iterator[list[str]]:
    """Names in order, in groups of at most `GROUP_BYTES`; a larger tensor is one by itself."""
    group: list[str] = []
    size = 0
    for name, tensor in wanted.items():
        nbytes = tensor.numel() * targets[name].itemsize
        if group and size + nbytes > GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    yield group


def warn_of_zeros(checkpoint: Checkpoint, zero: list[StoredTensor]) -> None:
    """A file whose writer or download was killed can be whole in length and zero in content."""
    matrices = [t for t in zero if len(t.entry.shape) > 1]
    count = sum(t.entry.num_elements for t in matrices)
    total = sum(t.entry.num_elements for t in checkpoint.tensors.values())
    if count > 0.1 * total:  # a new network has some: modulation tables, last projections
        warnings.warn(
            f"{checkpoint.path}: {count / total:.0%} of the weights are matrices of zeros: "
            f"{grouped(t.name for t in matrices)}; the file may not have been written to its end",
            stacklevel=3,
        )


def load_state(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """Every tensor under our name, as views of the mapped files in the stored dtype.

    Raises:
        WanError: a name that isn't one of this component.
    """
    names = match_names(checkpoint, component)
    if names.unexpected:
        raise WanError(
            f"{checkpoint.path}: {len(names.unexpected)} unexpected: {grouped(names.unexpected)}"
        )
    mapped = checkpoint.map()
    return {ours: mapped[tensor.name] for ours, tensor in names.stored.items()}


@dataclass(frozen=True)
class MatchedNames:
    """A checkpoint's tensors by our names."""

    layout: KeyLayout
    stored: dict[str, StoredTensor]
    unexpected: list[str]  # names in the file that no parameter has


def match_names(checkpoint: Checkpoint, component: str) -> MatchedNames:
    """Detect the layout and translate every name."""
    try:
        layout = detect_layout(component, checkpoint.tensors)
    except WanError as error:
        raise WanError(f"{checkpoint.path}: {error}") from error
    aliases = ALIASES.get((component, layout.layout), {})
    stored, unexpected = {}, []
    for name, tensor in checkpoint.tensors.items():
        bare = name.removeprefix(layout.prefix)
        first = aliases.get(bare)
        if first is not None:
            if layout.prefix + first in checkpoint.tensors:
                check_same(checkpoint, name, layout.prefix + first)
                continue
            bare = first
        ours = our_name(component, layout.layout, bare, layout.vae_levels)
        if ours is None:
            unexpected.append(name)
        else:
            stored[ours] = tensor
    return MatchedNames(layout, stored, unexpected)


def check_same(checkpoint: Checkpoint, alias: str, name: str) -> None:
    """A tensor that is stored twice must be the same twice."""
    both = [checkpoint.tensors[key] for key in (alias, name)]
    if both[0].entry.dtype != both[1].entry.dtype or both[0].entry.shape != both[1].entry.shape:
        equal = False
    else:
        views = [map_tensors(t.file)[t.name] for t in both]
        equal = torch.equal(views[0], views[1])
    if not equal:
        raise WanError(f"{checkpoint.path}: {alias} and {name} are one parameter but differ")


def check_fit(
    checkpoint: Checkpoint, component: str, names: MatchedNames, wanted: Mapping[str, Tensor]
) -> None:
    """One error with all that is missing, unexpected, or of another shape or dtype."""
    layout = names.layout

    def in_layout(name: str) -> str:
        return layout.prefix + released_name(component, layout.layout, name, layout.vae_levels)

    missing = [in_layout(name) for name in wanted if name not in names.stored]
    unexpected = names.unexpected + [
        t.name for ours, t in names.stored.items() if ours not in wanted
    ]
    shapes, dtypes = {}, {}
    for ours, tensor in names.stored.items():
        entry = tensor.entry
        if ours in wanted and entry.shape != tuple(wanted[ours].shape):
            shapes[tensor.name] = f"{entry.shape} for {tuple(wanted[ours].shape)}"
        if entry.dtype not in WEIGHT_DTYPES:
            dtypes[tensor.name] = str(entry.dtype).removeprefix("torch.")
    holds = describe(component, {name: t.entry.shape for name, t in names.stored.items()})
    asks = describe(component, {name: tuple(t.shape) for name, t in wanted.items()})
    hint = "" if holds == asks else f"holds {holds}, but config.json describes {asks}; "
    limit = 12 if holds == asks else 4
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing: {grouped(missing, limit=limit)}")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected: {grouped(unexpected, limit=limit)}")
    if shapes:
        problems.append(f"{len(shapes)} of another shape: {grouped(shapes, shapes, limit)}")
    if dtypes:
        problems.append(
            f"{len(dtypes)} of a dtype that holds no plain weights: "
            f"{grouped(dtypes, dtypes, limit)}"
        )
    if not problems:
        return
    raise WanError(
        f"{checkpoint.path}: {hint}{'; '.join(problems)}. Weights and config.json must come from "
        "the same release"
    )


def describe(component: str, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a set of our names and shapes is, in the words of a model card."""
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
    """Names that differ in their first number (and agree in their note) as one:
    `blocks.{0..29}.norm2.weight (30)`."""
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


def target_dtype(
    name: str, stored: torch.dtype, dtype: torch.dtype | None, float32: tuple[str, ...]
) -> torch.dtype:
    wanted = stored if dtype is None else dtype
    if wanted.itemsize < 4 and any(re.search(pattern, name) for pattern in float32):
        return torch.float32
    return wanted


# --- dtypes ---------------------------------------------------------------------------------------


def dtype_census(module: nn.Module) -> dict[torch.dtype, int]:
    """Number of parameters per dtype, the largest share first."""
    census: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        census[parameter.dtype] = census.get(parameter.dtype, 0) + parameter.numel()
    return dict(sorted(census.items(), key=lambda item: -item[1]))


def census_line(module: nn.Module) -> str:
    """The census for a person: `5.00 B parameters, 9.33 GiB: 4.98 B bfloat16, 15.2 M float32`."""
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


# --- saving ---------------------------------------------------------------------------------------


def save_component(
    state: Mapping[str, Tensor],
    folder: str | Path,
    component: str,
    layout: str = "diffusers",
    *,
    vae_levels: VAELevels | None = None,
    prefix: str = "",
    dtypes: Mapping[str, torch.dtype] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a state dict with our names as a released component; bits don't change.

    Every file is written beside its place and renamed; the index comes last. The folder is made if
    need be and may hold other things, but no weights of the same name: nobody could tell a
    checkpoint that was replaced halfway from a whole one.

    Args:
        vae_levels: of the VAE's config, for a VAE.
        prefix: put in front of every released name, as repacked files have it.
        dtypes: to convert to, by our names; converted shard by shard. None keeps all.
    Returns:
        The weight files, and the index if there are several.
    Raises:
        WanError: not our names, weights already there, too little space, or no right to write.
    """
    folder = Path(folder)
    released = {n: prefix + released_name(component, layout, n, vae_levels) for n in state}
    wanted = {released[n]: t.dtype if dtypes is None else dtypes[n] for n, t in state.items()}
    named = {released[n]: t for n, t in state.items()}
    stem = file_stem(component, layout, vae_levels)
    try:
        return write_shards(named, wanted, folder, stem, max_shard_bytes, metadata or {})
    except OSError as error:
        raise WanError(f"{folder}: can't be written: {error.strerror or error}") from error


def write_shards(
    named: Mapping[str, Tensor],
    wanted: Mapping[str, torch.dtype],
    folder: Path,
    stem: str,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
) -> list[Path]:
    """Write tensors under their final names in the wanted dtypes; see `save_component`."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [f.name for f in folder.iterdir() if family(f.name) == stem]
    if old:
        raise WanError(f"{folder}: already holds {', '.join(sorted(old))}; choose an empty folder")
    total = sum(tensor.numel() * wanted[name].itemsize for name, tensor in named.items())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise WanError(f"{folder}: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")
    shards = split_shards(named, wanted, max_shard_bytes)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(
            folder / name,
            {n: tensor.to(wanted[n]) for n, tensor in shard.items()},  # itself where it is so
            {"format": "pt", **metadata},
        )
    written = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {t: name for name, s in zip(names, shards, strict=True) for t in s}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        written.append(folder / f"{stem}{INDEX_SUFFIX}")
        write_text(written[-1], json.dumps(index, indent=2) + "\n")
    return written


def file_stem(component: str, layout: str, vae_levels: VAELevels | None) -> str:
    """The released name of a component's weight file, less shard number and suffix."""
    if layout == "official" and component == "vae":
        assert vae_levels is not None
        return "Wan2.2_VAE" if vae_levels.is_residual else "Wan2.1_VAE"
    if component == "text_encoder":
        return "models_t5_umt5-xxl-enc" if layout == "official" else "model"
    return "diffusion_pytorch_model"


def split_shards(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[dict[str, Tensor]]:
    """Consecutive tensors, at most `max_bytes` each as written, unless one alone is larger."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards

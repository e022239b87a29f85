"""Checkpoints -> our modules: the strict load.

Loading is strict both ways: every parameter is in the files and every tensor in the files is a
parameter of the right shape, or stands beside one (see `wan.weights.scaled`); one error lists all
that don't fit. The module is built on the meta device and filled as tensors are read, so peak
memory stays near the weights that are kept.
"""

import os
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wan.errors import WanError
from wan.weights.checkpoint import Checkpoint, StoredTensor
from wan.weights.digests import check_published
from wan.weights.keys import (
    ALIASES,
    PLAIN_WEIGHTS,
    SPIECE,
    KeyLayout,
    bare_name,
    detect_layout,
    our_name,
    released_name,
    stands_beside,
)
from wan.weights.names import describe, grouped
from wan.weights.quantize import check_quantize, quantize_layers, quantize_state
from wan.weights.safetensors_file import MappedFile, MappedFiles, SafetensorsFile, map_tensors
from wan.weights.scaled import FP8, plain_dtype, read_scale, read_small, restored, with_scales
from wan.weights.tensor_reader import CHUNK_BYTES, read_tensors

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, *FP8.values())

# Bytes of unquantised weights that are in memory at a time while a model is quantised.
GROUP_BYTES = 256 << 20
PAGE_BYTES = 4096

M = TypeVar("M", bound=nn.Module)


class _NoInitialisation(TorchFunctionMode):
    """Skips the initialisation of parameters, which have no values on the meta device.

    A random draw on the meta device would import parts of PyTorch's compiler, which takes longer
    than loading a small model.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@torch.inference_mode(False)  # weights outlive the caller's mode, and several threads fill them
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
        dtype: dtype of the weights; None keeps the stored dtypes, but for 8-bit numbers, which
            become bfloat16. Parameters whose names match a pattern in the class's
            `FLOAT32_PARAMETERS` get at least float32.
        threads: number of threads that read; None takes the number of cores, at most 8.
        check_finite: refuse NaN and infinity while the tensors pass by, and warn of zero matrices.
        share_mapping: let tensors that need no conversion be views of the mapped file (on the CPU),
            copied page by page only where they are written to. False reads them into memory. The
            module's `mapped_files` notices if such a file is overwritten.
        quantize: see `wan.weights.quantize`; weights are then read in groups of `GROUP_BYTES`, so
            that few of them are in memory unquantised.
        changes: our name -> a function that gets the stored parameter in at least float32 and
            returns its new value, which is rounded to `dtype`, then quantised (for example
            `wan.lora.merge.LoRAMerge`). Weights are then read in groups, too.
    Raises:
        WanError: names, shapes or dtypes do not fit (one message lists all), weights are not
            finite, or a file ends in zeros or is not the published one.
    """
    check_quantize(quantize)
    check_published(file.path for file in checkpoint.files)
    names = match_names(checkpoint, component)
    module = build_on_meta(build)
    wanted = module.state_dict()
    check_fit(checkpoint, component, names, wanted)
    tables = {t.name for name, t in names.stored.items() if name.startswith("token_embedding.")}
    for file in checkpoint.files:
        check_end(file, tables)
    float32 = cast(Any, type(module)).FLOAT32_PARAMETERS
    targets = {
        name: target_dtype(name, names.stored[name].entry.dtype, dtype, float32) for name in wanted
    }
    changes = changes or {}
    # A parameter that is changed is read in at least float32, and rounded once afterwards.
    reads = targets | {
        name: torch.promote_types(plain_dtype(names.stored[name].entry.dtype), torch.float32)
        for name in wanted
        if name in changes
    }
    stored = {name: names.stored[name] for name in wanted}
    state: dict[str, Tensor] = {}
    zero: set[str] = set()
    mapped: list[MappedFile] = []
    whole = quantize == "none" and not changes
    for group in [list(wanted)] if whole else group_names(wanted, reads):
        read, zeros, files = read_tensors(
            {name: stored[name] for name in group},
            reads,
            torch.device(device),
            threads=min(8, os.cpu_count() or 1) if threads is None else threads,
            check_finite=check_finite,
            share_mapping=share_mapping,
        )
        zero |= zeros
        mapped += files
        for name in group:
            if name in changes:
                read[name] = changes[name](read[name]).to(targets[name])
        state |= read if quantize == "none" else quantize_state(read, quantize)
        del read  # frees it before the next group is read
    warn_of_zeros(checkpoint, [stored[name] for name in sorted(zero)])
    if quantize != "none":
        quantize_layers(module, quantize)
    module.load_state_dict(state, assign=True)
    cast(Any, module).mapped_files = MappedFiles(mapped)
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    assert not left, f"buffers without a value: {left}"
    return module


def build_on_meta(build: Callable[[], M]) -> M:
    """Build a module on the meta device, without values."""
    with torch.device("meta"), _NoInitialisation():
        return build()


def group_names(
    wanted: Mapping[str, Tensor], targets: Mapping[str, torch.dtype]
) -> Iterator[list[str]]:
    """Names in order, in groups of at most `GROUP_BYTES`; a larger tensor is a group alone."""
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
    """Warn of matrices of zeros: a download can leave a hole, but a new network has some too."""
    matrices = [t.name for t in zero if len(t.entry.shape) > 1]
    if matrices:
        warnings.warn(
            f"{checkpoint.path}: only zeros, in all or in {CHUNK_BYTES >> 20} MB on end of "
            f"{grouped(matrices)}; where this is no new network, the file was not written as a "
            "whole: fetch it again",
            stacklevel=3,
        )


def check_end(file: SafetensorsFile, tables: Collection[str]) -> None:
    """Refuse a file whose space was reserved and never filled to its end.

    It reads a page or two of the last matrices. One matrix of zeros at the end may be a new
    network's; several of them, or one that turns into zeros, are not.

    Args:
        tables: names of tables of which a hundredth, the last rows, may be unused.

    Raises:
        WanError: the file ends in zeros; names where they begin.
    """
    matrices = [(e.end, e.start, name) for name, e in file.tensors.items() if len(e.shape) > 1]
    ends: list[str] = []  # matrices that end in zeros, from the last one on
    turned = False  # from numbers to zeros
    with file.open() as content:

        def is_empty(start: int) -> bool:
            content.seek(start)
            return not any(content.read(page))

        for end, start, name in sorted(matrices, reverse=True):
            used = end - (end - start) // 100 if name in tables else end
            page = min(PAGE_BYTES, max(256, (end - start) // 16), used - start)
            if len(ends) > 1 or not is_empty(used - page):
                break
            ends += [name] if page else []
            if turned := not is_empty(start):
                break
    if len(ends) > 1 or turned:
        raise WanError(
            f"{file.path}: ends in zeros, from {ends[-1]} on or before: its space was reserved and "
            "never filled, as by a download that did not finish; fetch it again"
        )


def load_state(checkpoint: Checkpoint, component: str) -> dict[str, Tensor]:
    """Every tensor under our name, as views of the mapped files in the stored dtype.

    A weight with a scale is their product, in the dtype of `plain_dtype`, and no view.

    Raises:
        WanError: a name does not belong to this component.
    """
    state, scales = stored_state(checkpoint, component)
    for name, scale in scales.items():
        state[name] = restored(state[name], scale, plain_dtype(state[name].dtype))
    return state


def stored_state(
    checkpoint: Checkpoint, component: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Every tensor as a view, as it is stored, and the scales of those that have one.

    Raises:
        WanError: a name does not belong to this component.
    """
    names = match_names(checkpoint, component)
    if names.unexpected:
        raise WanError(
            f"{checkpoint.path}: {len(names.unexpected)} unexpected: {grouped(names.unexpected)}"
        )
    mapped = checkpoint.map()
    state = {ours: mapped[tensor.name] for ours, tensor in names.stored.items()}
    scales = {n: read_scale(t.scale) for n, t in names.stored.items() if t.scale is not None}
    return state, scales


def stored_tokenizer(checkpoint: Checkpoint) -> bytes | None:
    """The SentencePiece model that ComfyUI's text encoders carry as a tensor of bytes."""
    for name, tensor in checkpoint.tensors.items():
        if name.rpartition(".")[2] == SPIECE and tensor.entry.dtype in (torch.uint8, torch.int8):
            return read_small(tensor).numpy().tobytes()
    return None


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
    beside = {name: t for name, t in checkpoint.tensors.items() if stands_beside(name)}
    tensors = {name: t for name, t in checkpoint.tensors.items() if name not in beside}
    tensors, unexpected = with_scales(tensors, beside)
    if component != "text_encoder":
        unexpected += [name for name in beside if name.rpartition(".")[2] == SPIECE]
    by_name: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if by_name.setdefault(bare_name(name, layout.prefix), tensor) is not tensor:
            unexpected.append(name)  # a second tensor of that name, but for a wrapper's segment
    for second, first in aliases.items():
        if second in by_name:
            if first in by_name:
                warn_of_difference(checkpoint, by_name[second], by_name[first])
            by_name[first] = by_name.pop(second)
    stored = {}
    for bare, tensor in by_name.items():
        ours = our_name(component, layout.layout, bare, layout.vae_levels)
        if ours is None:
            unexpected.append(tensor.name)
        else:
            stored[ours] = tensor
    return MatchedNames(layout, stored, unexpected)


def warn_of_difference(checkpoint: Checkpoint, used: StoredTensor, other: StoredTensor) -> None:
    """Warn if two stored copies of one parameter differ; the network reads one of them.

    transformers 5.0 saves the embedding of a text encoder under both of its names.
    """
    views = [map_tensors(t.file)[t.name] for t in (used, other)]
    equal = used.entry.shape == other.entry.shape and all(
        torch.equal(*(part.float() for part in parts))
        for parts in zip(*(view.split(4096) for view in views), strict=True)
    )
    if not equal:
        warnings.warn(
            f"{checkpoint.path}: {used.name} and {other.name} differ; {used.name} is taken, which "
            "is what the encoder reads",
            stacklevel=3,
        )


def check_fit(
    checkpoint: Checkpoint, component: str, names: MatchedNames, wanted: Mapping[str, Tensor]
) -> None:
    """Raise one error that lists all missing and unexpected names and wrong shapes or dtypes."""
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
    remedy = "Weights and config.json must come from the same release"
    if not (missing or unexpected or shapes):
        remedy = f"Use {PLAIN_WEIGHTS}"
    raise WanError(f"{checkpoint.path}: {hint}{'; '.join(problems)}. {remedy}")


def target_dtype(
    name: str, stored: torch.dtype, dtype: torch.dtype | None, float32: tuple[str, ...]
) -> torch.dtype:
    wanted = plain_dtype(stored) if dtype is None else dtype
    if wanted.itemsize < 4 and any(re.search(pattern, name) for pattern in float32):
        return torch.float32
    return wanted

"""Fill tensors from checkpoint files: shared with the mapped file, or read by several threads.

A tensor that is needed on the CPU in its stored dtype can be a view of the mapped file. Any other
is read, checked, converted and copied in pieces, through a buffer of fixed size per thread. Beside
the tensors themselves only these buffers need memory, however large a tensor or shard is.

A tensor with a scale is multiplied with it once it is whole.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from wan.errors import WanError
from wan.weights.checkpoint import StoredTensor
from wan.weights.safetensors_file import (
    MappedFile,
    changed_while_loaded,
    file_identity,
    read_bytes,
)
from wan.weights.scaled import FP8, read_scale, scale_in_place

CHUNK_BYTES = 32 << 20


@dataclass(frozen=True)
class Piece:
    """A run of elements of one tensor, small enough to pass through a thread's buffer."""

    name: str
    stored: StoredTensor
    target: Tensor  # (count,) view of the tensor to fill
    offset: int  # first byte of the piece in the file
    file: BinaryIO | None  # None: `target` is a view of the mapped file, and is only checked

    @property
    def is_whole_chunk(self) -> bool:
        return self.target.numel() * self.stored.entry.dtype.itemsize >= CHUNK_BYTES


def read_tensors(
    stored: Mapping[str, StoredTensor],
    dtypes: Mapping[str, torch.dtype],
    device: torch.device,
    *,
    threads: int,
    check_finite: bool,
    share_mapping: bool,
) -> tuple[dict[str, Tensor], set[str], list[MappedFile]]:
    """Read tensors in the given dtypes; unconverted ones on the CPU may be views of the file.

    Returns:
        The tensors, the names of those that are all zeros (if `check_finite`), and the files that
        some of the tensors are views of.
    Raises:
        WanError: NaN or infinity (if `check_finite`); or a file changed or ends early.
    """
    state: dict[str, Tensor] = {}
    mapped: dict[Path, MappedFile] = {}
    pieces: list[Piece] = []
    with ExitStack() as stack:
        files: dict[Path, BinaryIO] = {}
        for name, tensor in stored.items():
            path, entry = tensor.file.path, tensor.entry
            shared = share_mapping and device.type == "cpu" and dtypes[name] == entry.dtype
            shared &= tensor.scale is None
            if shared:
                if path not in mapped:
                    mapped[path] = MappedFile(tensor.file)
                state[name] = mapped[path].tensors[tensor.name]
            else:
                if path not in files:
                    files[path] = stack.enter_context(tensor.file.open())
                state[name] = torch.empty(entry.shape, dtype=dtypes[name], device=device)
            if shared and not check_finite:
                continue
            flat = state[name].view(-1)
            size = CHUNK_BYTES // entry.dtype.itemsize
            for i, part in enumerate(flat.split(size)) if len(flat) else ():
                offset = entry.start + i * CHUNK_BYTES
                pieces.append(Piece(name, tensor, part, offset, None if shared else files[path]))
        # Every file is read from front to back.
        pieces.sort(key=lambda piece: (piece.stored.file.path, piece.offset))
        zero = fill(pieces, device, threads, check_finite)
        for tensor in stored.values():
            if (file := files.get(tensor.file.path)) is not None and (
                file_identity(os.fstat(file.fileno())) != tensor.file.identity
            ):
                raise WanError(changed_while_loaded(tensor.file.path))
    for name, tensor in stored.items():
        if tensor.scale is not None:
            scale_in_place(state[name], read_scale(tensor.scale))
    return state, zero, list(mapped.values())


def fill(pieces: list[Piece], device: torch.device, threads: int, check_finite: bool) -> set[str]:
    """Fill all pieces; returns the names of tensors that are zero, or are for a whole chunk.

    Without `check_finite` nothing is looked at, and nothing returned.
    """
    scratch = threading.local()

    def run(piece: Piece) -> bool:
        """Fill one piece; true if it is all zeros."""
        source = piece.target
        if piece.file is not None:
            dtype = piece.stored.entry.dtype
            if device.type != "cpu" or dtype != source.dtype:
                if not hasattr(scratch, "buffer"):
                    pin = device.type == "cuda"
                    scratch.buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=pin)
                source = scratch.buffer[: source.numel() * dtype.itemsize].view(dtype)
            read_bytes(piece.file, source, piece.offset)
        # 8-bit numbers have no minimum and maximum of their own; as wider ones they are the same.
        narrow = source.dtype in FP8.values()
        zero = check_finite and not narrow and is_zero(piece, source)
        if source is not piece.target:
            piece.target.copy_(source)
            if check_finite and (narrow or piece.target.dtype == torch.float16):
                # float16 may overflow in the conversion
                zero = is_zero(piece, piece.target) and (zero or narrow)
        return zero

    with ThreadPoolExecutor(threads) as pool:
        results = list(pool.map(run, pieces))
    touched = {p.name for p, zero in zip(pieces, results, strict=True) if not zero}
    holes = {p.name for p, zero in zip(pieces, results, strict=True) if zero and p.is_whole_chunk}
    return holes | {piece.name for piece in pieces} - touched if check_finite else set()


def is_zero(piece: Piece, values: Tensor) -> bool:
    """Whether all values are 0.

    The minimum and maximum carry every NaN and infinity and need no memory, unlike `isfinite`.

    Raises:
        WanError: a value is NaN or infinite.
    """
    low, high = (bound.item() for bound in torch.aminmax(values))
    if low != low or low == float("-inf") or high == float("inf"):
        stored = piece.stored.entry.dtype
        overflow = values.dtype == torch.float16 != stored and stored not in FP8.values()
        remedy = "too large for float16: load as bfloat16" if overflow else "the file is damaged"
        raise WanError(
            f"{piece.stored.file.path}: tensor {piece.stored.name} is not finite "
            f"({low}..{high}); {remedy}"
        )
    return low == high == 0

"""One safetensors file: check its header, map or read its tensors, write it.

Layout: the header's length in 8 bytes, little-endian; a JSON header that maps each name to dtype,
shape and data_offsets; the tensors' bytes without gaps. `read_header` checks all that can be known
without reading a tensor, because damage that is trusted shows later as a wrong video or a crash far
away. It refuses two things that the reference reader accepts: a JSON key that occurs twice, and a
name that isn't made of plain ASCII words and dots.

Source: the format's README (huggingface/safetensors).
"""

import json
import math
import mmap
import os
import re
import shlex
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import open_regular, parse_json, written_beside

# The format allows 100 MB. A whole Wan model in one file needs 150 kB; the small limit keeps a
# hostile header from taking seconds and gigabytes to parse.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 50_000
MAX_ELEMENTS = 1 << 48  # of one tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The format's other dtypes, all of quantised files: their numbers mean nothing without more.
BLOCK_DTYPES = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0")
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OnBytes = Callable[[int], None]  # called with the number of bytes that were just written

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
TENSOR_NAME = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")  # no slash, no "..", ASCII


@dataclass(frozen=True)
class TensorEntry:
    """Dtype, shape and place of one tensor: `start` and `end` are byte offsets in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class SafetensorsFile:
    """A file whose header passed all checks; `open` notices if it was replaced since."""

    path: Path
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]
    identity: tuple[int, int, int]  # inode, size, modification time: notices a replaced file

    def open(self) -> BinaryIO:
        """Open for reading the body.

        Raises:
            WanError: the file is not the one whose header was read.
        """
        file = open_regular(self.path)
        if file_identity(os.fstat(file.fileno())) != self.identity:
            file.close()
            raise WanError(changed_while_loaded(self.path))
        return file


def changed_while_loaded(path: Path) -> str:
    return f"{path}: changed while it was being loaded; load it again"


def file_identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


# --- reading the header ---------------------------------------------------------------------------


def read_header(path: Path) -> SafetensorsFile:
    """Check a file's header and return what it lists; no tensor is read.

    Raises:
        WanError: not a safetensors file (its real kind is named), damaged, or cut short.
    """
    path = Path(path)
    if path.suffix in PICKLE_SUFFIXES:
        raise WanError(refuse_pickle(path))
    if path.suffix == GGUF_SUFFIX and path.is_file():
        raise WanError(f"{path}: not a safetensors file but {GGUF}")
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            start = file.read(64)
            length = header_length(path, start, status.st_size)
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise WanError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    if raw.count(b'"data_offsets"') > MAX_TENSORS:
        raise WanError(f"{path}: more than {MAX_TENSORS:,} tensors; no Wan checkpoint has so many")
    header = parse_json(raw, str(path), REFETCH)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WanError(f"{path}: __metadata__ must map strings to strings; {REFETCH}")
    entries = {n: parse_entry(path, n, value, 8 + length) for n, value in header.items()}
    check_offsets(path, entries, 8 + length, status.st_size)
    return SafetensorsFile(path, entries, metadata, file_identity(status))


REFETCH = "the file is damaged: fetch or write it again"


def header_length(path: Path, start: bytes, size: int) -> int:
    """The header's length from the first 8 bytes; an error names another kind of file."""
    if size < 8:
        raise WanError(f"{path}: {size} bytes, no safetensors file is that short: {CUT_SHORT}")
    length = int.from_bytes(start[:8], "little")
    if start[8:9] not in (b"{", b" ") or length > MAX_HEADER_BYTES:
        kind = sniff(start)
        if kind == PICKLE:
            raise WanError(refuse_pickle(path))
        if kind is not None:
            raise WanError(f"{path}: not a safetensors file but {kind}")
    if length > MAX_HEADER_BYTES:
        raise WanError(
            f"{path}: header of {length:,} bytes, over the limit of {MAX_HEADER_BYTES:,}; {REFETCH}"
        )
    if length < 2:
        raise WanError(f"{path}: header of {length} bytes is no JSON object; {REFETCH}")
    if 8 + length > size:
        raise WanError(
            f"{path}: {size:,} bytes, the header alone needs {8 + length:,}: {CUT_SHORT}"
        )
    return length


CUT_SHORT = "cut short, probably an interrupted download; fetch it again"


PICKLE = "a pickle (.pt, .pth, .bin)"
GGUF_SUFFIX = ".gguf"
GGUF = (
    "a GGUF file (quantised); use the float32, bfloat16 or float16 safetensors release, or one in "
    "fp8; quantize=int8 makes it small as it is loaded"
)


def sniff(start: bytes) -> str | None:
    """Recognise another format by its first bytes: its name and what to do; None if unknown."""
    text = start.lstrip().lower()
    if start.startswith(b"PK\x03\x04"):
        return PICKLE
    if start[0] == 0x80 and start[1] in (2, 3, 4, 5):
        return PICKLE
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page: the download went to a login or error page; fetch the file itself"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: fetch the file behind it with `git lfs pull` or `hf download`"
    if start.startswith(b"GGUF"):
        return GGUF
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8")) or start[4:8] == b"ftyp":
        return "a picture or a video"
    if start.startswith(b"\x1f\x8b"):
        return "a gzip archive: unpack it first"
    if text.startswith((b"{", b"[")):
        return "a JSON text, perhaps an index: give the folder or the weights themselves"
    if not start.strip(b"\0"):
        return "a run of zero bytes: space was reserved and never written; fetch it again"
    return None


def refuse_pickle(path: Path) -> str:
    """The message for a pickle, with the command that makes a safetensors file of it."""
    target = path.with_suffix(".safetensors")
    if target == path:
        target = path.with_name(f"{path.stem}-converted.safetensors")
    program = (
        "import sys, torch, safetensors.torch as s; "
        "state = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "s.save_file({k: v.contiguous().clone() for k, v in state.items()}, sys.argv[2])"
    )
    command = f'python -c "{program}" {shlex.quote(str(path))} {shlex.quote(str(target))}'
    return (
        f"{path}: {PICKLE}. Opening one can run code, so only .safetensors files are read. "
        f"Convert it once, in an environment kept apart: {command}"
    )


def parse_entry(path: Path, name: str, value: Any, body: int) -> TensorEntry:
    """Check one header entry by itself; `body` is the offset at which tensors begin."""
    if not TENSOR_NAME.fullmatch(name) or len(name) > 512:
        raise WanError(
            f"{path}: tensor name {ascii(name)[:80]}: only ASCII letters, digits, _ and - between "
            "dots are allowed; this is no Wan checkpoint"
        )
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WanError(f"{path}: tensor {name} needs dtype, shape and data_offsets; {REFETCH}")
    if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
        if value["dtype"] in BLOCK_DTYPES:
            raise WanError(
                f"{path}: a quantised checkpoint, tensor {name} has dtype {value['dtype']}; use "
                "the float32, bfloat16 or float16 weights"
            )
        raise WanError(
            f"{path}: tensor {name} has dtype {value['dtype']!r}; readable: {', '.join(DTYPES)}"
        )
    dtype = DTYPES[value["dtype"]]
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise WanError(
                f"{path}: tensor {name}: shape {shape} and data_offsets {offsets} must be lists of "
                f"whole numbers from 0 on; {REFETCH}"
            )
    # A tensor of no elements costs nothing in the file, whatever its other dimensions say.
    if len(offsets) != 2 or len(shape) > 8 or math.prod(max(n, 1) for n in shape) > MAX_ELEMENTS:
        raise WanError(f"{path}: tensor {name}: shape {shape}, data_offsets {offsets}; {REFETCH}")
    start, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        raise WanError(
            f"{path}: tensor {name} of shape {shape} and dtype {value['dtype']} needs {needed:,} "
            f"bytes, its offsets {start}..{end} hold {end - start:,}; {REFETCH}"
        )
    return TensorEntry(dtype, tuple(shape), body + start, body + end)


def check_offsets(path: Path, entries: dict[str, TensorEntry], body: int, size: int) -> None:
    """Check that the tensors cover the file after its header without gaps or overlaps."""
    end, previous = body, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            problem = "overlaps" if entry.start < end else "leaves a hole behind"
            raise WanError(f"{path}: tensor {name} {problem} {previous}; {REFETCH}")
        end, previous = entry.end, name
    if size < end:
        raise WanError(f"{path}: {size:,} bytes, the header promises {end:,}: {CUT_SHORT}")
    if size > end:
        raise WanError(
            f"{path}: {size:,} bytes, {size - end:,} more than the header promises; {REFETCH}"
        )


# --- reading tensors ------------------------------------------------------------------------------


class MappedFile:
    """The tensors of a file that is mapped, and whether the file is still what was mapped.

    Attributes:
        tensors: views of the file, read when touched; unaligned ones are copies.

    The mapping is private: writing to a tensor changes memory, never the file. The other way round
    there is no such wall: what is written into the file in place, as `cp` does with a file that is
    there, changes the weights in memory, and where the file is cut, reading them kills the process
    (SIGBUS). `is_changed` says whether anything was written. Replacing the file by a rename, as
    `write_tensors` does, is harmless.
    """

    def __init__(self, source: SafetensorsFile) -> None:
        self.path = source.path
        with source.open() as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            # Asked later, the path may lead to another file: this one stays the mapped one.
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._identity = source.identity
        start = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._addresses = range(start, start + len(mapping))
        self.tensors = views_of(mapping, source)

    def is_changed(self) -> bool:
        """Whether something was written into the file, or cut off it, since its header was read."""
        return file_identity(os.fstat(self._descriptor)) != self._identity

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor's numbers are those in the file, and no copy of them."""
        return tensor.device.type == "cpu" and tensor.data_ptr() in self._addresses


class MappedFiles:
    """The files that a network's weights are views of; copies of the network may share it."""

    def __init__(self, files: Iterable[MappedFile] = ()) -> None:
        self._files = tuple(files)

    def check(self, weights: Callable[[], Mapping[str, Tensor]]) -> None:
        """Refuse weights that are no longer what was loaded; asks the system once for each file.

        Args:
            weights: gives the weights in use.

        Raises:
            WanError: a file that holds some of them was written to.
        """
        for changed in [file for file in self._files if file.is_changed()]:
            if any(changed.holds(tensor) for tensor in weights().values()):
                raise WanError(
                    f"{changed.path}: was written to in place while a model was in memory whose "
                    "weights it holds, so they are not what was loaded. Load the model again; to "
                    "replace a file that is in use, write the new one beside it and rename it"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> "MappedFiles":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedFiles, ()  # what is pickled holds its weights itself


def map_tensors(source: SafetensorsFile) -> dict[str, Tensor]:
    """All tensors as views of the mapped file: see `MappedFile`."""
    return MappedFile(source).tensors


def views_of(mapping: mmap.mmap, source: SafetensorsFile) -> dict[str, Tensor]:
    tensors = {}
    for name, entry in source.tensors.items():
        if entry.num_elements == 0:
            tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            continue
        count = entry.end - entry.start
        raw = torch.frombuffer(mapping, dtype=torch.uint8, count=count, offset=entry.start)
        if raw.data_ptr() % entry.dtype.itemsize:
            raw = raw.clone()  # some writers don't align the body
        tensors[name] = raw.view(entry.dtype).view(entry.shape)
    return tensors


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read_bytes(file: BinaryIO, buffer: Tensor, offset: int) -> None:
    """Fill a contiguous CPU tensor with the bytes from `offset` on; threads may share `file`.

    Raises:
        WanError: the file ends early.
    """
    view = raw_bytes(buffer)
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise WanError(f"{file.name}: ends at byte {offset + done:,}: {CUT_SHORT}")
        done += count


# --- writing --------------------------------------------------------------------------------------


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write a safetensors file beside `path`, then rename it there: complete or not at all.

    Tensors may lie on any device and are copied out one at a time. Their order (wide dtypes first,
    then by name) keeps every tensor aligned and makes equal content equal bytes. The file gets the
    rights the umask leaves, so that a group can read it.

    Args:
        on_bytes: called after each tensor with the number of its bytes.
    Raises:
        WanError: a tensor has a dtype that the format lacks.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise WanError(f"tensor {name}: {tensor.dtype} can't be written to a safetensors file")
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start at a multiple of 8 bytes
    with written_beside(path) as beside, beside.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            tensor = tensors[name].detach().cpu().contiguous()
            file.write(raw_bytes(tensor))
            if on_bytes is not None:
                on_bytes(tensor.nbytes)

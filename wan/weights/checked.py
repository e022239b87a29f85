"""Files of tensors that are written and read again here, with a digest of all that they hold.

Released weights have digests beside them (`wan.weights.digests`). These files are caches and
measurements: whoever reads one and finds it damaged makes it again.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from wan.errors import WanError
from wan.weights.safetensors_file import raw_bytes, read_bytes, read_header, write_tensors

SHA256 = "sha256"  # the key of the digest in a file's metadata


def tensor_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(raw_bytes(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


def content_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """sha256 of names, tensors and metadata, in whatever order they come."""
    about = [sorted(metadata.items()), [(n, tensor_sha256(t)) for n, t in sorted(tensors.items())]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def write_checked(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """`write_tensors`, with a digest of everything in the metadata."""
    about = dict(metadata or {})
    write_tensors(path, tensors, about | {SHA256: content_sha256(tensors, about)})


def read_checked(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, read into memory of their own; older releases wrote no digest.

    Raises:
        WanError: the file is not there, or is not what was written.
    """
    file = read_header(path)
    tensors = {}
    with file.open() as body:
        for name, entry in file.tensors.items():
            tensors[name] = torch.empty(entry.shape, dtype=entry.dtype)
            read_bytes(body, tensors[name], entry.start)
    about = {key: value for key, value in file.metadata.items() if key != SHA256}
    if SHA256 in file.metadata and file.metadata[SHA256] != content_sha256(tensors, about):
        raise WanError(f"{path}: damaged, its content does not match its digest")
    return tensors

"""Tensors under content-addressed keys, in safetensors shards that are only ever added to.

A key is a digest of everything its tensor follows from, so what is there by its key need not be
made again: a run that was killed goes on after its last shard, and a changed clip is another clip.
A shard is written beside its place and renamed; its metadata holds, for each tensor, the sha256 of
its bytes, which every reading checks, its dtype and shape, and facts about it.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import lock_file, parse_json, sealed, unsealed
from wan.weights.safetensors_file import (
    SafetensorsFile,
    TensorEntry,
    raw_bytes,
    read_bytes,
    read_header,
    write_tensors,
)

AGAIN = "delete the file and run the command that wrote it again"


def key_of(*what: Any) -> str:
    """A digest of anything that JSON can hold, 32 hex digits."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def form(tensor: Tensor | TensorEntry) -> str:
    """Dtype and shape of a tensor, as one text."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


@dataclass(frozen=True)
class Stored:
    """One tensor of a store."""

    file: SafetensorsFile
    sha256: str
    facts: dict[str, Any]


class TensorStore:
    """Tensors of files `name-*.safetensors` in a folder, by key; empty until one is registered."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.stored: dict[str, Stored] = {}

    def shards(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}-*.safetensors"))

    def register(self, path: Path) -> list[str]:
        """Take a shard's tensors in; returns their keys."""
        file = read_header(path)
        try:
            notes = {
                key: unsealed(parse_json(file.metadata[key], str(path)), str(path))
                for key in file.tensors
            }
            found = {key: Stored(file, n["sha256"], n["facts"]) for key, n in notes.items()}
        except (KeyError, WanError) as error:
            reason = error if isinstance(error, WanError) else f"{path}: not a file of this store"
            raise WanError(f"{reason}; {AGAIN}") from error
        for key, note in notes.items():
            if note.get("form", form(file.tensors[key])) != form(file.tensors[key]):
                raise WanError(f"{path}: tensor {key} is not what was written; {AGAIN}")
        self.stored |= found
        return list(found)

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def facts(self, key: str) -> dict[str, Any]:
        return self.stored[key].facts

    def read(self, key: str) -> Tensor:
        """A tensor, its bytes checked.

        Raises:
            WanError: it is not what was written.
        """
        stored = self.stored[key]
        entry = stored.file.tensors[key]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        with stored.file.open() as file:
            read_bytes(file, tensor, entry.start)
        if hashlib.sha256(raw_bytes(tensor)).hexdigest() != stored.sha256:
            raise WanError(f"{stored.file.path}: tensor {key} is not what was written; {AGAIN}")
        return tensor

    def add(self, tensors: Mapping[str, Tensor], facts: Mapping[str, dict[str, Any]]) -> Path:
        """Write contiguous CPU tensors as one shard, complete or not at all; returns its file."""
        metadata = {
            key: json.dumps(
                sealed(
                    {
                        "sha256": hashlib.sha256(raw_bytes(tensor)).hexdigest(),
                        "form": form(tensor),
                        "facts": facts[key],
                    }
                )
            )
            for key, tensor in tensors.items()
        }
        path = self.folder / f"{self.name}-{key_of(sorted(tensors))[:16]}.safetensors"
        write_tensors(path, tensors, metadata)
        self.register(path)
        return path


def is_shard(path: Path) -> bool:
    """Whether a file is an undamaged shard of a store, as far as its header tells."""
    try:
        TensorStore(path.parent, path.stem).register(path)
    except WanError:
        return False
    return True


def open_to_read(folder: Path, name: str) -> TensorStore:
    """A store with all its shards.

    Raises:
        WanError: one of them is damaged, as far as its header tells.
    """
    store = TensorStore(folder, name)
    for path in store.shards():
        store.register(path)
    return store


def open_to_extend(folder: Path, name: str, verify: bool) -> TensorStore:
    """A store for a run that can make its tensors again: damaged shards are removed, loudly.

    Args:
        verify: read every tensor, not only the headers.
    Raises:
        WanError, OSError: a shard can't be read, which may pass; nothing is removed.
    """
    store = TensorStore(folder, name)
    for path in store.shards():
        try:
            keys = store.register(path)
            for key in keys if verify else []:
                store.read(key)
        except WanError as error:
            if isinstance(error.__cause__, OSError):  # a disk that fails proves no damage
                raise
            print(f"warning: {error}; removed, its content is made again", file=sys.stderr)
            store.stored = {k: s for k, s in store.stored.items() if s.file.path != path}
            path.unlink()
    return store


@contextmanager
def only_writer(folder: Path, lock: str = ".lock", wait: bool = False) -> Iterator[None]:
    """Keep a second run out of a folder; the lock goes with the process, however it ends.

    Args:
        lock: the file that is locked; another one where others may write something else meanwhile.
        wait: until another process has ended, instead of an error.
    Raises:
        WanError: another process is writing there.
    """
    with (folder / lock).open("w") as file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError as error:
            if not wait:
                raise WanError(f"{folder}: another process is writing there; let it end") from error
            print(f"{folder}: another process is writing there; waiting", file=sys.stderr)
            lock_file(file, wait=True)
        yield

"""Reading and writing small files.

Every file is written beside its place, flushed to the disk and then renamed, so that a reader, a
full disk or a power cut sees the old file or the new one and never half of one.
"""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wan.errors import WanError


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there becomes `path` at the end.

    After an error, such as a full disk, `path` is unchanged and the temporary file is gone. The
    content reaches the disk before the rename, so a power cut leaves either the old file or the new
    one. If two processes write at once, the last to finish wins.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield beside
        flush_to_disk(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole, in UTF-8."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole; missing folders above it are made.

    Raises:
        ValueError: a number is infinite or NaN, which JSON cannot hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is not JSON, or holds something other than an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise WanError(f"{path}: not JSON ({error}); download or write it again") from error
    if not isinstance(values, dict):
        raise WanError(f"{path}: holds a JSON {type(values).__name__}, an object is needed")
    return values


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is a folder, or not UTF-8.
    """
    if path.is_dir():
        raise WanError(f"{path}: a folder; give a text file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise WanError(f"{path}: not UTF-8 text (byte {error.start})") from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

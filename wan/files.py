"""Files that are whole or not there: written beside their place, flushed, then renamed."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A name in the folder of `path` to write to; what is there becomes `path` at the end.

    An error on the way, a full disk among them, leaves `path` as it was and nothing beside it. The
    content has reached the disk before the name points to it, so that a power cut leaves one or the
    other. Two writers at once do not meet: the last to finish wins.
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


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

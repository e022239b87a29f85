"""Reading and writing small files.

Whatever is read may come from a stranger, so `read_bytes`, `read_text` and `read_json` are the one
gate for it: they open regular files only, up to a size, and JSON is bounded before it is used.

Every file is written beside its place, flushed to the disk and then renamed, so that a reader, a
full disk or a power cut sees the old file or the new one and never half of one.
"""

import json
import math
import os
import re
import stat
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from wan.errors import WanError

# A released config.json has 2 kB, and the index of the largest model 150 kB.
MAX_JSON_BYTES = 4 << 20
MAX_TEXT_BYTES = 64 << 20
MAX_DEPTH = 32  # of objects and lists inside each other
MAX_DIGITS = 20  # of a whole number: 64 bits
MAX_NUMBER = 100  # characters of any other number
TOO_DEEP = f"is nested more than {MAX_DEPTH} levels deep"
AGAIN = "download or write it again"
LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


# --- reading --------------------------------------------------------------------------------------

FILE_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading its bytes.

    A pipe or a device is refused at once, where a plain `open` may wait for ever.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except ValueError as error:  # a name that holds a zero byte
        raise WanError(f"{path}: no file can have this name ({error})") from error
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        what = FILE_KINDS.get(kind, "no file")
        raise WanError(f"{path}: {what}, not a regular file")
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is no regular file, or larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
        if len(content) > limit:
            size = max(len(content), os.fstat(file.fileno()).st_size)
            raise WanError(f"{path}: {size:,} bytes, at most {limit:,} are read of such a file")
    return content


def read_text(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 text file, with or without a byte-order mark; every line end becomes `\\n`.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is no regular file, too large, or not UTF-8.
    """
    try:
        text = read_bytes(path, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise WanError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, limit: int = MAX_JSON_BYTES, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        limit: the most bytes that are read.
        infinite: take NaN and infinity, as Python writes them, for numbers.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is no regular file, too large, or refused by `parse_json`.
    """
    return parse_json(read_bytes(path, limit), str(path), infinite=infinite)


def parse_json(
    content: str | bytes, source: str, advice: str = AGAIN, infinite: bool = False
) -> dict[str, Any]:
    """The JSON object in a text that may come from a stranger.

    Args:
        content: the text, or its UTF-8 bytes. Whoever reads it bounds its size.
        source: where it comes from, for messages.
        advice: what to do about an error, for messages.
        infinite: see `read_json`.

    Raises:
        WanError: it is not JSON, or holds something other than an object, a key twice, NaN or
            infinity, half a character, a whole number of more than 64 bits' digits, or more than
            `MAX_DEPTH` levels.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise WanError(f"{source}: the key {key[:80]!r} occurs twice; {advice}")
        return result

    def whole(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise WanError(
                f"{source}: a number of {len(digits):,} digits, {digits[:20]}...; {advice}"
            )
        return int(digits)

    def real(text: str) -> float:
        if len(text) > MAX_NUMBER or not math.isfinite(value := float(text)):
            raise WanError(f"{source}: {text[:20]} is no number that can be used; {advice}")
        return value

    def constant(name: str) -> float:
        if infinite:
            return float(name)
        raise WanError(f"{source}: {name} where JSON has numbers; {advice}")

    hooks: dict[str, Any] = {
        "object_pairs_hook": unique,
        "parse_int": whole,
        "parse_float": real,
        "parse_constant": constant,
    }
    try:
        text = content.decode() if isinstance(content, bytes) else content
        values = json.loads(text, **hooks)
    except WanError:
        raise
    except RecursionError as error:
        raise WanError(f"{source}: its JSON {TOO_DEEP}; {advice}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise WanError(f"{source}: not valid JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise WanError(f"{source}: its JSON is not an object; {advice}")
    _check_nesting(values, source, advice)
    return values


def _check_nesting(values: dict[str, Any], source: str, advice: str) -> None:
    """Refuse JSON that is nested too deeply, and texts with half of a UTF-16 character."""
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        inside: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inside += one.keys()
                inside += one.values()
            elif isinstance(one, list):
                inside += one
            elif isinstance(one, str) and LONE_SURROGATE.search(one):
                raise WanError(f"{source}: {ascii(one)[:80]} holds half of a character; {advice}")
        if not inside:
            return
        level = inside
    raise WanError(f"{source}: its JSON {TOO_DEEP}; {advice}")


# --- writing --------------------------------------------------------------------------------------


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


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Reading and writing small files.

Whatever is read may come from a stranger, so `read_bytes`, `read_text` and `read_json` are the one
gate for it: they open regular files only, up to a size, and JSON is bounded before it is used.

Every file is written beside its place, flushed to the disk and then renamed, so that a reader, a
full disk or a power cut sees the old file or the new one and never half of one. What a killed
process leaves beside it is removed by the next process that writes into the folder: a temporary
file is locked for as long as its process lives. Records that are read again carry a digest.
"""

import hashlib
import json
import math
import os
import re
import shutil
import stat
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from wan.errors import WanError

try:
    import fcntl
except ImportError:  # Windows, where an open file is not renamed either: no leftovers are removed
    fcntl = None  # type: ignore[assignment]

# What Windows lacks (a program that is started inherits no file there), and what only it has: bytes
# as they are.
OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

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


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading its bytes.

    A pipe or a device is refused at once, where a plain `open` may wait for ever.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0))
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
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise WanError(f"{path}: {size:,} bytes, at most {limit:,} are read of such a file")
        try:
            return file.read(size)  # not more, if it grows meanwhile: no limit is allocated either
        except OSError as error:
            error.filename = str(path)  # a read does not say where
            raise


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

    values = _parsed(content, source, advice, infinite)
    if not isinstance(values, dict):
        raise WanError(f"{source}: its JSON is not an object; {advice}")
    _check_nesting(values, source, advice)
    return values


def parse_json_list(content: str | bytes, source: str, advice: str = AGAIN) -> list[Any]:
    """The JSON array in a text that may come from a stranger; see `parse_json`."""
    values = _parsed(content, source, advice, infinite=False)
    if not isinstance(values, list):
        raise WanError(f"{source}: its JSON is not an array; {advice}")
    _check_nesting(values, source, advice)
    return values


def _parsed(content: str | bytes, source: str, advice: str, infinite: bool) -> Any:
    """Any JSON value, with the checks of `parse_json` that are made while it is parsed."""

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
        return json.loads(text, **hooks)
    except WanError:
        raise
    except RecursionError as error:
        raise WanError(f"{source}: its JSON {TOO_DEEP}; {advice}") from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise WanError(f"{source}: not valid JSON ({error}); {advice}") from error


def _check_nesting(values: dict[str, Any] | list[Any], source: str, advice: str) -> None:
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


LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")


@contextmanager
def written_beside(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary name beside `path`; the file written there becomes `path` at the end.

    After an error, such as a full disk, `path` is unchanged and the temporary file is gone. The
    content reaches the disk before the rename, so a power cut leaves either the old file or the new
    one. If two processes write at once, the last to finish wins. A process that is killed leaves
    its temporary file; the next one that writes into the folder removes it.

    Args:
        flush: wait until the content is on the disk. A file that is soon replaced need not be:
            after a power cut it may be empty.

    Raises:
        OSError: the file can't be written; it names `path`.
    """
    with _claimed(path) as beside:
        yield beside
        if flush:
            flush_to_disk(beside)
        os.replace(beside, path)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Yield a new folder beside `path`, for the caller to rename; what is left of it is removed.

    As with `written_beside`, the next process removes what a killed one leaves.

    Raises:
        WanError: `path` is a file.
    """
    if path.is_file():
        raise WanError(f"{path}: is a file, and a folder is to be written; choose another name")
    with _claimed(path.resolve()) as lock:
        folder = lock.with_suffix(".part")
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """Yield an empty file beside `path` that is locked until it is gone."""
    remove_leftovers(path.parent)
    beside, descriptor = _locked_file(path)
    try:
        yield beside
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(beside)):
            error.filename = str(path)  # a write does not say where; nobody knows the other name
        raise
    finally:
        beside.unlink(missing_ok=True)
        if descriptor is not None:
            os.close(descriptor)


def _locked_file(path: Path) -> tuple[Path, int | None]:
    """An empty file beside `path`, and the descriptor that locks it; none on Windows."""
    while True:
        # The start of the name says whose it is; the whole of a long one would be too long.
        beside = path.with_name(f".{path.name[:40]}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            descriptor = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, 0o666)
        except OSError as error:
            error.filename = str(path)
            raise
        if fcntl is None:
            os.close(descriptor)
            return beside, None
        with suppress(OSError):  # disks without locks: there, leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if beside.exists():  # nobody took it for a leftover before it was locked
            return beside, descriptor
        os.close(descriptor)


@cache  # once per process: a folder may hold many files
def remove_leftovers(folder: Path) -> None:
    """Remove what processes left in a folder that were killed while they wrote there.

    A file of a process that is alive is locked. Locks of a shared disk hold on all its machines,
    unless it was mounted with local ones; where it has none, nothing is removed.
    """
    if fcntl is None or not folder.is_dir():
        return
    for path in [one for one in folder.iterdir() if LEFTOVER.fullmatch(one.name)]:
        # An error: a living process holds the lock, or another one removed the file first.
        with suppress(OSError), path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(".part"), ignore_errors=True)
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Replace a text file as a whole, in UTF-8."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8", newline="\n")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    with written_beside(path) as beside:
        beside.write_bytes(content)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Replace a JSON file as a whole; missing folders above it are made.

    Raises:
        ValueError: a number is infinite or NaN, which JSON cannot hold.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# --- locks ----------------------------------------------------------------------------------------


def lock_file(file: IO[Any], wait: bool) -> None:
    """Lock an open file that nobody reads, until it is closed or the process ends.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return
    import msvcrt

    file.seek(0)
    while True:
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            return
        except OSError as error:
            if not wait:
                raise BlockingIOError("locked by another process") from error
        time.sleep(1)


# --- records that are read again ------------------------------------------------------------------

DIGEST = "digest"  # the key of a record's own digest
DIGEST_CHARACTERS = 16  # 64 bits: enough against damage; it is no signature
MAX_RECORD_BYTES = 1 << 28


def sealed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON has them, and a digest of them under `DIGEST`.

    Raises:
        ValueError: a number is infinite or NaN, which JSON cannot hold.
    """
    plain = json.loads(json.dumps(values, allow_nan=False))
    return {**plain, DIGEST: _digest(plain)}


def unsealed(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of a record that is what was written; one of older releases has no digest.

    Args:
        source: where it comes from, for messages.
    Raises:
        WanError: the values do not match their digest.
    """
    plain = {key: value for key, value in values.items() if key != DIGEST}
    if DIGEST in values and values[DIGEST] != _digest(plain):
        raise WanError(
            f"{source}: damaged, it does not match its digest (if it was changed by hand, take the "
            f"{DIGEST!r} out)"
        )
    return plain


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST_CHARACTERS]


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """`write_json` of a record that `read_sealed` reads."""
    write_json(path, sealed(values))


def read_sealed(path: Path, limit: int = MAX_RECORD_BYTES) -> dict[str, Any]:
    """The record that `write_sealed` wrote, or an older release, without its digest.

    Raises:
        OSError: the file cannot be opened.
        WanError: it is damaged, or refused by `read_json`.
    """
    return unsealed(read_json(path, limit), str(path))


def create_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """`write_sealed` of a file that is not there yet; never is it there without its content.

    Raises:
        FileExistsError: another process took the name.
    """
    with _claimed(path) as beside:
        text = json.dumps(sealed(values), indent=2, ensure_ascii=False) + "\n"
        beside.write_text(text, encoding="utf-8", newline="\n")
        flush_to_disk(beside)
        try:
            os.link(beside, path)
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links: the name first, its content at once
            path.touch(exist_ok=False)
            os.replace(beside, path)


# --- paths ----------------------------------------------------------------------------------------


def expanded(path: str | Path) -> Path:
    """A path whose leading `~` or `~name` is replaced by that user's home folder.

    `./~name` is a file or a folder here. Its path is returned in full, so that it stays one.

    Raises:
        WanError: it is not known.
    """
    if str(Path(path)).startswith("~") and not str(path).startswith("~"):
        return Path(path).absolute()
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        user = Path(path).parts[0]
        raise WanError(
            f"{path}: {user} stands for a home folder, which is not known; write the path in full, "
            f"or ./{path} for a folder that is called {user}"
        ) from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    writable = fcntl is None  # Windows flushes files that may be written, and no folder
    if writable and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

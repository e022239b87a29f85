"""Check that a folder holds the published bytes, by the sha256 of every file.

Headers and lengths say that a file is well-formed, not that its content is right: a flipped bit, or
a download that was filled up with zeros, passes every other check. Two sources of truth are read
here: a `SHA256SUMS` file in the folder (in the format of `sha256sum`, which can check it as well),
and the hub's own digests, which name the files in the blob store of its cache.

Whoever loads weights compares them with what is published (`check_published`). A file is hashed
when it is first met and whenever its size or time has changed; what came out is remembered in the
user's cache folder.
"""

import hashlib
import os
import re
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from wan.errors import WanError
from wan.files import open_regular, read_json, read_text, write_json, write_text
from wan.paths import inside
from wan.weights.checkpoint import family, is_index, is_weights

MANIFEST = "SHA256SUMS"
SHA256 = r"[0-9a-f]{64}"
LINE = re.compile(rf"({SHA256})  (.+)")
MAX_REMEMBERED = 4000  # files
CLOCK_TICK_NS = 20_000_000  # file systems may count in steps of 10 ms


def sha256_file(path: Path) -> str:
    """The sha256 of a regular file's content, in hex."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Iterable[Path], threads: int | None = None) -> dict[Path, str]:
    """sha256 of several files, hashed side by side."""
    paths = list(paths)
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(sha256_file, paths), strict=True))


FileState = tuple[int, int, int, int]  # inode, size, times of change of content and of entry


def file_state(path: Path) -> FileState:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def memory_file() -> Path | None:
    """Where digests are remembered: below XDG_CACHE_HOME or ~/.cache; None without a home."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    except RuntimeError:  # no HOME, and no entry for this user
        return None
    return folder / "wan-few-step" / "digests.json"


def remembered_sha256(paths: Iterable[Path], threads: int | None = None) -> dict[Path, str]:
    """sha256 of several files; one is hashed only if it is new or its size or time has changed.

    Without a cache folder that can be read and written, all of them are.
    """
    states = {path: file_state(path) for path in paths}
    memory, known = memory_file(), read_memory()
    found = {}
    for path, state in states.items():
        entry = known.get(os.path.realpath(path))
        if isinstance(entry, list) and len(entry) == 5 and entry[:4] == [*state]:
            found[path] = entry[4]
    new = hash_files([path for path in states if path not in found], threads)
    # A file that is written to while or just after it is hashed may keep its time.
    settled = [p for p in new if file_state(p) == states[p] and is_settled(states[p])]
    if settled and memory is not None:
        entries = {os.path.realpath(path): [*states[path], new[path]] for path in settled}
        kept = {path: entry for path, entry in read_memory().items() if path not in entries}
        with suppress(OSError):  # then they are hashed again next time
            write_json(memory, dict([*kept.items(), *entries.items()][-MAX_REMEMBERED:]))
    return found | new


def read_memory() -> dict[str, Any]:
    """What is remembered: path -> its state and sha256; empty where nothing can be read."""
    memory = memory_file()
    try:
        return {} if memory is None or not memory.is_file() else read_json(memory)
    except (OSError, WanError):
        return {}


def is_settled(state: FileState) -> bool:
    return time.time_ns() - max(state[2:]) > CLOCK_TICK_NS


def published_digest(path: Path) -> tuple[str, str] | None:
    """The sha256 that a weight file should have, and who says so; None if nobody does.

    That is a manifest beside it or in the folder above, or its name in the hub's cache.
    """
    for folder in (path.parent, path.parent.parent):
        if (folder / MANIFEST).is_file():
            digest = read_manifest(folder).get(path.relative_to(folder).as_posix())
            if digest is not None:
                return digest, str(folder / MANIFEST)
    blob = Path(os.path.realpath(path))
    if path.is_symlink() and blob.parent.name == "blobs" and re.fullmatch(SHA256, blob.name):
        return blob.name, "the hub"
    return None


def check_published(paths: Iterable[Path]) -> None:
    """Compare weight files with the digests that were published with them, where there are any.

    Raises:
        WanError: a file is another one; names all of them.
    """
    published = {path: found for path in paths if (found := published_digest(path)) is not None}
    digests = remembered_sha256(published)
    changed = [path for path, (digest, _) in published.items() if digests[path] != digest]
    if changed:
        names = ", ".join(path.name for path in changed[:8])
        who = published[changed[0]][1]
        raise WanError(
            f"{changed[0].parent}: {names}: the content is not what {who} says, so it is damaged "
            f"or was changed. Fetch it again; after a change of your own, delete {MANIFEST} or "
            "write it anew with `sha256sum`"
        )


def list_files(folder: Path) -> dict[str, Path]:
    """Every file below a folder by its path with slashes, without manifest and hidden files.

    A file stands for itself, an index for its shards too.
    """
    if is_index(folder.name):
        stem = family(folder.name)
        beside = sorted(path for path in folder.parent.iterdir() if is_weights(path.name))
        return {path.name: path for path in beside if family(path.name) == stem}
    if folder.is_file():
        return {folder.name: folder}
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            relative = (Path(root) / name).relative_to(folder).as_posix()
            if not name.startswith(".") and relative != MANIFEST:
                found[relative] = Path(root) / name
    return found


def write_manifest(folder: str | Path) -> Path:
    """Write the sha256 of every file below a folder into its `SHA256SUMS`."""
    folder = Path(folder)
    files = list_files(folder)
    broken = [name for name, path in files.items() if not path.is_file()]
    if broken:
        raise WanError(f"{folder}: {', '.join(broken)}: not regular files, can't be hashed")
    digests = hash_files(files.values())
    listing = "".join(f"{digests[path]}  {name}\n" for name, path in files.items())
    write_text(folder / MANIFEST, listing)
    return folder / MANIFEST


def verify_manifest(folder: str | Path) -> int:
    """Compare every file below a folder with its `SHA256SUMS`; returns the number of files.

    Raises:
        WanError: no manifest, or files are missing, changed or not listed; names all of them.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise WanError(f"{folder}: has no {MANIFEST}; verify it against the hub's digests instead")
    listed = read_manifest(folder)
    files = {name: file for name, file in list_files(folder).items() if file.is_file()}
    digests = hash_files(file for name, file in files.items() if name in listed)
    problems = [f"{name} is missing" for name in listed if name not in files]
    problems += [f"{name} is not listed" for name in files if name not in listed]
    problems += [
        f"{name} has other content"
        for name, file in files.items()
        if name in listed and digests[file] != listed[name]
    ]
    report(folder, problems)
    return len(listed)


def read_manifest(folder: Path) -> dict[str, str]:
    """What a folder's `SHA256SUMS` lists: file below the folder -> sha256.

    Raises:
        WanError: it is damaged, or names a file elsewhere.
    """
    path = inside(folder / MANIFEST, folder)
    listed = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        match = LINE.fullmatch(line)
        if match is None or match[2].startswith("/") or ".." in Path(match[2]).parts:
            raise WanError(f"{path}: line {number} is not `<sha256>  <file below this folder>`")
        listed[match[2]] = match[1]
    return listed


def verify_hub_digests(folder: str | Path) -> int:
    """Compare a snapshot in the hub's cache with the digests in the names of its blobs.

    Large files are named by their sha256, small ones by their git object id (sha1).

    Returns:
        The number of files.
    Raises:
        WanError: not such a snapshot, or a file's content differs from the hub's.
    """
    folder = Path(folder)
    files = list_files(folder)
    if not files:
        raise WanError(f"{folder}: no files to verify")
    blobs = {name: file.resolve().name for name, file in files.items()}
    for name, file in files.items():
        if not file.is_symlink() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blobs[name]):
            raise WanError(f"{file}: not a link into the hub cache's blobs; no digest to compare")
    problems = [f"{name} is missing" for name, file in files.items() if not file.is_file()]
    present = {name: file for name, file in files.items() if file.is_file()}
    sha256 = hash_files(file for name, file in present.items() if len(blobs[name]) == 64)
    problems += [
        f"{name} has other content"
        for name, file in present.items()
        if (sha256[file] if file in sha256 else git_object_id(file)) != blobs[name]
    ]
    report(folder, problems)
    return len(files)


def verify_digests(folder: str | Path) -> int:
    """Compare a folder with its manifest if it has one, else with the hub's digests."""
    has_manifest = (Path(folder) / MANIFEST).is_file()
    return verify_manifest(folder) if has_manifest else verify_hub_digests(folder)


def git_object_id(path: Path) -> str:
    """The id git gives a file's content."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest.update(path.read_bytes())
    return digest.hexdigest()


def report(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WanError(f"{folder}: {'; '.join(problems[:8])}{more}; fetch these files again")

"""Training checkpoints: one folder per step, safetensors and JSON, committed by a rename.

A checkpoint is written beside its place, flushed to the disk, and renamed; a folder under its final
name is complete. `manifest.json` holds the sha256 of each file, and loading verifies it, so that a
damaged checkpoint is noticed and the one before it is used, loudly. The manifest also says its step
and how healthy it was measured to be: which one is the best follows from those that are there.

A run uses, counts and removes only what it wrote: folders whose name and manifest say one step. A
copy, a renamed folder or a link is left alone.

Of a sharded run every process writes a file with its own rows of each tensor, and says in the
file's header which they are. Any number of processes can read them, one included: each takes the
rows it needs, from whichever files have them.
"""

import json
import math
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from train.parallel import ALONE, Ranks, Rows
from wan.errors import WanError
from wan.files import flush_to_disk, read_sealed, sealed
from wan.weights.digests import sha256_file

PREFIX = "step-"
MANIFEST = "manifest.json"
UNFINISHED = ".writing-"


def split_tensors(tree: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Replace each tensor of a nested state by a reference; dict keys may be str or int."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach()
        return {"__tensor__": path}
    if isinstance(tree, dict):
        items = [[k, split_tensors(v, tensors, f"{path}.{k}")] for k, v in tree.items()]
        return {"__dict__": items}
    if isinstance(tree, list | tuple):
        return [split_tensors(v, tensors, f"{path}.{i}") for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path}: cannot save a {type(tree).__name__}")


def join_tensors(tree: Any, tensors: Mapping[str, Tensor | None]) -> Any:
    """The inverse of `split_tensors`; tuples come back as lists."""
    if isinstance(tree, dict) and "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if isinstance(tree, dict):
        return {k: join_tensors(v, tensors) for k, v in tree["__dict__"]}
    if isinstance(tree, list):
        return [join_tensors(v, tensors) for v in tree]
    return tree


def write_part(folder: Path, state: dict[str, Any], ranks: Ranks) -> dict[str, str]:
    """Write one process's files of a checkpoint; returns their names and sha256."""
    tensors: dict[str, Tensor] = {}
    tree = split_tensors(state, tensors)
    own: dict[str, Tensor] = {}
    first_rows: dict[str, int] = {}
    for path, tensor in tensors.items():
        if (stored := ranks.stored_rows(tensor)) is not None:
            local, (first_rows[path], _) = stored
            own[path] = local.cpu().contiguous().clone()  # clone: tied weights share memory
    files = []
    if ranks.size == 1 or own:
        alone = ranks.size == 1
        files.append("state.safetensors" if alone else f"state-{ranks.rank:05d}.safetensors")
        header = None if alone else {"first_rows": json.dumps(first_rows)}
        try:
            save_file(own, folder / files[-1], header)
        except SafetensorError as error:  # the library's name for a full disk, too
            raise OSError(f"{folder / files[-1]}: {error}") from error
    if ranks.is_main:
        (folder / "state.json").write_text(json.dumps(tree))
        files.append("state.json")
    for name in files:
        flush_to_disk(folder / name)
    return {name: sha256_file(folder / name) for name in files}


def save_checkpoint(
    root: Path,
    step: int,
    state: dict[str, Any],
    keep_last: int = 2,
    ranks: Ranks = ALONE,
    health: float | None = None,
) -> Path:
    """Write `root/step-N`, then remove all but the best and the last `keep_last` up to N.

    All processes call this; the folder must be one that all of them see.

    Args:
        health: the best checkpoint is the one where it is highest; None or not finite: none.
    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    final = root / name_of(step)
    beside = root / f"{UNFINISHED}{final.name}-{ranks.first(os.getpid())}"
    try:
        with ranks.together():
            if ranks.is_main:
                beside.mkdir(parents=True)
        with ranks.together():
            digests = write_part(beside, state, ranks)
        parts = ranks.gather(digests)
        with ranks.together():
            if ranks.is_main:
                every_digest = {k: v for part in parts for k, v in part.items()}
                commit(beside, final, step, every_digest, health)
                prune(root, final, keep_last)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a write does not say where
            raise OSError(error.errno, error.strerror, str(final)) from error
        raise
    finally:
        if ranks.is_main:
            shutil.rmtree(beside, ignore_errors=True)
    return final


def commit(
    beside: Path, final: Path, step: int, digests: dict[str, str], health: float | None
) -> None:
    """Write the manifest of a checkpoint whose files are on the disk, then give it its name."""
    manifest: dict[str, Any] = {"step": step, "sha256": dict(sorted(digests.items()))}
    if health is not None and math.isfinite(health):
        manifest["health"] = health
    (beside / MANIFEST).write_text(json.dumps(sealed(manifest)))
    for path in (beside / MANIFEST, beside):
        flush_to_disk(path)
    if is_own(final):  # left by a run that was set back to an earlier step
        discard(final)
    elif os.path.lexists(final):
        aside = move_aside(final)
        words = f"was no checkpoint of step {step}; it is called {aside.name} now"
        print(f"warning: {final} {words}", file=sys.stderr)
    beside.rename(final)
    flush_to_disk(final.parent)


def move_aside(path: Path) -> Path:
    """Give a file or folder the first free name of `<path>-aside-1`, `-2`, ..; returns it."""
    free = next(n for n in count(1) if not os.path.lexists(f"{path}-aside-{n}"))
    return path.rename(f"{path}-aside-{free}")


def prune(root: Path, final: Path, keep_last: int) -> None:
    own = [folder for folder in list_checkpoints(root) if is_own(folder)]
    # Later steps are of a run that was set back to an earlier one, because they were damaged.
    before = [folder for folder in own if step_of(folder) <= step_of(final)]
    sound = [folder for folder in before if said_by(folder) is not None]
    kept = [best_checkpoint(root, step_of(final)), *sound[-keep_last:]]
    for folder in own:
        if folder not in kept:
            discard(folder)


def discard(folder: Path) -> None:
    """Remove a checkpoint; a kill midway leaves nothing under its name."""
    aside = folder.with_name(f"{UNFINISHED}{folder.name}-discarded")
    folder.rename(aside)
    shutil.rmtree(aside)


def best_checkpoint(root: Path, last: float = math.inf) -> Path | None:
    """The healthiest checkpoint up to step `last`, the newest of equals; None if none has been
    measured."""
    candidates = [
        (health, step_of(folder), folder)
        for folder in list_checkpoints(root)
        if (health := health_of(folder)) is not None and step_of(folder) <= last
    ]
    return max(candidates)[2] if candidates else None


def health_of(folder: Path) -> float | None:
    """What a checkpoint was measured at, by its manifest; None if it was not."""
    return (said_by(folder) or {}).get("health")


# --- which folders are checkpoints of this run ----------------------------------------------------


def name_of(step: int) -> str:
    return f"{PREFIX}{step:07d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 if it has another name."""
    digits = folder.name.removeprefix(PREFIX)
    step = int(digits) if digits.isdecimal() and digits.isascii() else -1
    return step if folder.name == name_of(step) else -1


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest: "step", "sha256" of each file, and "health" if it was measured.

    Raises:
        WanError: it is not there, or damaged.
    """
    try:
        manifest = read_sealed(folder / MANIFEST)
    except (OSError, WanError) as error:
        raise WanError(f"{folder}: damaged checkpoint: {error}") from error
    step, digests, health = (manifest.get(name) for name in ("step", "sha256", "health"))
    names_files = isinstance(digests, dict) and all(Path(name).name == name for name in digests)
    measured = health is None or isinstance(health, int | float)
    if not (isinstance(step, int) and names_files and measured):
        raise WanError(f"{folder}: damaged checkpoint: {MANIFEST} is none of a checkpoint")
    return manifest


def said_by(folder: Path) -> dict[str, Any] | None:
    """`read_manifest`, or None where it is damaged; loading the checkpoint reports that."""
    try:
        return read_manifest(folder)
    except WanError:
        return None


def is_own(folder: Path) -> bool:
    """Whether a run may replace or remove a folder: a checkpoint that it wrote at this place.

    Copies, renamed folders and links are their owner's: name and manifest have to say one step. A
    damaged manifest says none.
    """
    if step_of(folder) < 0 or folder.is_symlink() or not folder.is_dir():
        return False
    said = said_by(folder)
    return said is None or said["step"] == step_of(folder)


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first: folders whose name and manifest say one step.

    A damaged manifest says none; a link may lead to a checkpoint elsewhere.
    """
    named = [folder for folder in root.glob(f"{PREFIX}*") if step_of(folder) >= 0]
    there = [folder for folder in named if folder.is_dir()]
    said = [(said_by(folder) or {"step": step_of(folder)}, folder) for folder in there]
    return sorted((one for what, one in said if what["step"] == step_of(one)), key=step_of)


def others(root: Path) -> list[str]:
    """Checkpoints under names that are not those of their steps, and how to use them."""
    if not root.is_dir():
        return []
    mine = set(list_checkpoints(root))
    said = {p: said_by(p) for p in sorted(root.iterdir()) if p.is_dir() and p not in mine}
    return [
        f"{folder} holds step {manifest['step']} under another name and is not used; to go on from "
        f"it, rename it to {name_of(manifest['step'])}"
        for folder, manifest in said.items()
        if manifest is not None and not folder.name.startswith(UNFINISHED)
    ]


# --- reading --------------------------------------------------------------------------------------


class StoredTensors:
    """The tensors of a checkpoint, whose rows may lie in several files."""

    def __init__(self, paths: list[Path]) -> None:
        self.pieces: dict[str, list[tuple[Rows, Any]]] = {}  # rows, slice of a mapped file
        for path in paths:
            file = safe_open(path, framework="pt")
            first_rows = json.loads((file.metadata() or {}).get("first_rows", "{}"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                piece = file.get_slice(name)
                rows = (first_rows.get(name, 0), (piece.get_shape() or [1])[0])
                self.pieces.setdefault(name, []).append((rows, piece))
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def shape(self, name: str) -> tuple[int, ...]:
        (first, number), piece = self.pieces[name][-1]
        shape = piece.get_shape()
        return (first + number, *shape[1:]) if shape else ()

    def read(self, name: str, rows: Rows) -> Tensor:
        """Some rows of one tensor: `rows` is the first and their number."""
        start, stop = rows[0], rows[0] + rows[1]
        _, some = self.pieces[name][0]
        if not some.get_shape():
            return some[...]
        parts = [some[:1][:0]]  # for a process that reads no rows
        for (first, number), piece in self.pieces[name]:
            begin, end = max(start, first), min(stop, first + number)
            if begin < end:
                parts.append(piece[begin - first : end - first])
        return parts[-1] if len(parts) < 3 else torch.cat(parts)


def verified_files(folder: Path, ranks: Ranks) -> list[str]:
    """The files of a checkpoint, once this process's share of them has the manifest's digests.

    Raises:
        WanError: a file is missing or its content has changed.
    """
    files = list(read_manifest(folder)["sha256"].items())
    own = files[ranks.rank :: ranks.size]
    try:
        changed = [name for name, digest in own if sha256_file(folder / name) != digest]
    except OSError as error:
        raise WanError(f"{folder}: damaged checkpoint: {error}") from error
    if changed:
        raise WanError(f"{folder / changed[0]}: content does not match its sha256 in the manifest")
    return [name for name, _ in files]


# From a state without its tensors to the beginnings of the dotted names of those that are read,
# such as ("averages.student.",).
Choose = Callable[[dict[str, Any]], tuple[str, ...]]


def everything(tree: dict[str, Any]) -> tuple[str, ...]:
    return ("",)


def load_checkpoint(
    folder: Path, ranks: Ranks = ALONE, choose: Choose = everything
) -> dict[str, Any]:
    """Read one checkpoint after checking every digest, each process its share of the files.

    All processes call this: none opens a file before all have found theirs sound.

    Args:
        choose: says which tensors are read; None comes back in place of the others.

    Raises:
        WanError: a file is missing or its content has changed.
    """
    with ranks.together():
        files = verified_files(folder, ranks)
    try:
        tree = json.loads((folder / "state.json").read_text())
        stored = StoredTensors([folder / n for n in files if n.endswith(".safetensors")])
        chosen = choose(join_tensors(tree, dict.fromkeys(stored.pieces)))
        tensors = {
            name: ranks.restore(stored.shape(name), partial(stored.read, name))
            if name.removeprefix("state.").startswith(chosen)
            else None
            for name in stored.pieces
        }
        return join_tensors(tree, tensors)
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise WanError(f"{folder}: damaged checkpoint: {error}") from error


def newest_settings(root: Path) -> dict[str, Any]:
    """The settings that the newest readable checkpoint keeps; of its files, only that one is read.

    {} if there is none; loading a checkpoint reports what is damaged.
    """
    for folder in reversed(list_checkpoints(root)):
        path = folder / "state.json"
        try:
            if sha256_file(path) == read_manifest(folder)["sha256"].get(path.name):
                tree = join_tensors(json.loads(path.read_text()), defaultdict(lambda: None))
                return tree["settings"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError, WanError):
            continue
    return {}


def load_latest(root: Path, ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Raises:
        WanError: checkpoints exist and none of them verifies, or none has the name of its step.
    """
    with ranks.together():
        if ranks.is_main:
            for leftover in root.glob(f"{UNFINISHED}*"):  # of a run that was killed while it saved
                shutil.rmtree(leftover)
            found = others(root)
            if found and not list_checkpoints(root):
                raise WanError(f"{found[0]}; or move it elsewhere to begin anew")
            for line in found:
                print(f"warning: {line}", file=sys.stderr)
    return load_newest(root, ranks)


def load_newest(
    root: Path, ranks: Ranks = ALONE, choose: Choose = everything
) -> dict[str, Any] | None:
    """`load_latest` that changes nothing on the disk: a run may be at work there.

    Args:
        choose: see `load_checkpoint`.
    """
    folders = ranks.first(list_checkpoints(root))
    for folder in reversed(folders):
        try:
            with ranks.together():
                tree = load_checkpoint(folder, ranks, choose)
            return tree
        except WanError as error:
            if ranks.is_main:
                print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if folders:
        raise WanError(f"{root}: none of the {len(folders)} checkpoints can be read")
    return None

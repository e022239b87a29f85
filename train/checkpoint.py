"""Training checkpoints: one folder per step, safetensors and JSON, committed by a rename.

A checkpoint is written beside its place, flushed to the disk, and renamed; a folder under its final
name is complete. `manifest.json` holds the sha256 of each file, and loading verifies it, so that a
damaged checkpoint is noticed and the one before it is used, loudly.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from wan.digests import sha256_file
from wan.errors import WanError

PREFIX = "step-"
UNFINISHED = ".writing-"
BEST = "best.json"


def split_tensors(tree: Any, tensors: dict[str, Tensor], path: str = "state") -> Any:
    """Replace each tensor of a nested state by a reference; dict keys may be str or int."""
    if isinstance(tree, Tensor):
        tensors[path] = tree.detach().cpu().contiguous().clone()  # clone: tied weights share memory
        return {"__tensor__": path}
    if isinstance(tree, dict):
        items = [[k, split_tensors(v, tensors, f"{path}.{k}")] for k, v in tree.items()]
        return {"__dict__": items}
    if isinstance(tree, list | tuple):
        return [split_tensors(v, tensors, f"{path}.{i}") for i, v in enumerate(tree)]
    if tree is None or isinstance(tree, bool | int | float | str):
        return tree
    raise TypeError(f"{path}: cannot save a {type(tree).__name__}")


def join_tensors(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `split_tensors`; tuples come back as lists."""
    if isinstance(tree, dict) and "__tensor__" in tree:
        return tensors[tree["__tensor__"]]
    if isinstance(tree, dict):
        return {k: join_tensors(v, tensors) for k, v in tree["__dict__"]}
    if isinstance(tree, list):
        return [join_tensors(v, tensors) for v in tree]
    return tree


def save_checkpoint(root: Path, step: int, state: dict[str, Any], keep_last: int = 2) -> Path:
    """Write `root/step-N`, then remove all but the best and the last `keep_last` up to N.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"{PREFIX}{step:07d}"
    beside = root / f"{UNFINISHED}{final.name}-{os.getpid()}"
    try:
        beside.mkdir()
        tensors: dict[str, Tensor] = {}
        tree = split_tensors(state, tensors)
        save_file(tensors, beside / "state.safetensors")
        (beside / "state.json").write_text(json.dumps(tree))
        digests = {p.name: sha256_file(p) for p in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps({"step": step, "sha256": digests}))
        for path in [*beside.iterdir(), beside]:
            flush_to_disk(path)
        if final.exists():  # left by a run that was set back to an earlier step
            shutil.rmtree(final)
        beside.rename(final)
        flush_to_disk(root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    # Later steps are of a run that was set back to an earlier one, because they were damaged.
    earlier = [p for p in list_checkpoints(root) if p.name < final.name]
    later = [p for p in list_checkpoints(root) if p.name > final.name]
    outdated = [p for p in earlier[: len(earlier) - (keep_last - 1)] if p != best_checkpoint(root)]
    for old in [*later, *outdated]:
        shutil.rmtree(old)
    return final


def mark_best(root: Path, step: int, value: float) -> None:
    """Note that `root/step-N` is the best so far, if no checkpoint that is still there beats it."""
    if best_checkpoint(root) is not None and json.loads((root / BEST).read_text())["value"] > value:
        return
    beside = root / f".{BEST}-{os.getpid()}"
    beside.write_text(json.dumps({"step": step, "value": value}))
    beside.replace(root / BEST)


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint that `mark_best` noted; None if there is none, or no longer."""
    if not (root / BEST).exists():
        return None
    folder = root / f"{PREFIX}{json.loads((root / BEST).read_text())['step']:07d}"
    return folder if folder.is_dir() else None


def list_checkpoints(root: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(p for p in root.glob(f"{PREFIX}*") if p.is_dir())


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read one checkpoint after checking every digest.

    Raises:
        WanError: a file is missing or its content has changed.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, digest in manifest["sha256"].items():
            if sha256_file(folder / name) != digest:
                raise WanError(
                    f"{folder / name}: content does not match its sha256 in the manifest"
                )
        tree = json.loads((folder / "state.json").read_text())
        return join_tensors(tree, load_file(folder / "state.safetensors"))
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise WanError(f"{folder}: damaged checkpoint: {error}") from error


def load_latest(root: Path) -> dict[str, Any] | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Raises:
        WanError: checkpoints exist and none of them verifies.
    """
    for leftover in root.glob(f"{UNFINISHED}*"):  # of a process that was killed while it saved
        shutil.rmtree(leftover)
    folders = list_checkpoints(root)
    for folder in reversed(folders):
        try:
            return load_checkpoint(folder)
        except WanError as error:
            print(f"warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if folders:
        raise WanError(f"{root}: none of the {len(folders)} checkpoints can be read")
    return None


def flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

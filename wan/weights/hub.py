"""A model by name: a local folder, or a repository on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from wan.errors import WanError

# The shipped models, in the released folder layout. The teacher's folder holds its transformer and
# refers to the student's for the other parts.
MINIATURE = Path(__file__).parents[1] / "miniature"
STUDENT = MINIATURE / "student"  # three steps: what commands run by default
TEACHER = MINIATURE / "teacher"  # many steps, with guidance: what the student was distilled from

BUILTIN = "builtin:miniature"
BUILTIN_TEACHER = "builtin:miniature-teacher"
SHIPPED = {"mini": BUILTIN, "mini-teacher": BUILTIN_TEACHER}  # by their names on a command line

# Weights as safetensors, configs, indices, tokenizer.json and the sentencepiece model: nothing that
# could carry code, and not the same weights a second time in another format.
PATTERNS = ("*.safetensors", "*.json", "*spiece.model")
CONFIGS = ("*.json", "*spiece.model")  # all but the weights: a few megabytes
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)


def builtin_folder(name: str) -> Path | None:
    """The folder of a shipped model by its `builtin:` name; None for any other name."""
    return {BUILTIN: STUDENT, BUILTIN_TEACHER: TEACHER}.get(name)


def resolve_model(
    name: str | Path,
    revision: str | None = None,
    offline: bool = False,
    patterns: Sequence[str] = PATTERNS,
) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's snapshot in its cache.

    Args:
        name: a folder, `owner/name` on the hub, or a shipped model (`BUILTIN`).
        revision: branch, tag or commit; a commit id pins the bytes. For hub ids only.
        offline: do not use the network, only the cache. (The hub library also obeys
            HF_HUB_OFFLINE and HF_HOME.)
        patterns: which files are fetched.
    Raises:
        WanError: there is no such model, or it can't be fetched; names the command to fetch it.
    """
    if (shipped := builtin_folder(str(name))) is not None:
        if revision is not None:
            raise WanError(f"{name} is shipped here; revision={revision} is for models on the hub")
        return shipped
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise WanError(f"{name} is a folder; revision={revision} is for models on the hub")
        return folder
    if folder.exists():
        raise WanError(f"{name}: a file; give the folder that holds model_index.json")
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise WanError(f"{name}: no such folder, and not a hub id of the form owner/name")
    try:
        found = snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), local_files_only=offline
        )
    except (OSError, ValueError) as error:  # all of the hub's errors, and the network's
        raise WanError(unavailable(name, revision, offline, patterns, error)) from error
    return Path(found)


def unavailable(
    name: str, revision: str | None, offline: bool, patterns: Sequence[str], error: Exception
) -> str:
    at = "" if revision is None else f" --revision {revision}"
    include = " ".join(f"--include '{pattern}'" for pattern in patterns)
    reason = str(error).strip().splitlines()
    where = "offline, and not in the hub's cache" if offline else "can't be fetched from the hub"
    detail = "" if offline or not reason else f" ({type(error).__name__}: {reason[0]})"
    return (
        f"{name}: no such folder, and {where}{detail}. On a machine with a network: "
        f"hf download {name}{at} {include}"
    )

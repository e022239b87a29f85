"""A model by name: a local folder, or a repository on the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download

from wan.errors import WanError
from wan.files import expanded

# The shipped models, in the released folder layout. The teacher's folder holds its transformer and
# refers to the student's for the other parts.
MINIATURE = Path(__file__).parents[1] / "miniature"
STUDENT = MINIATURE / "student"  # three steps: what commands run by default
TEACHER = MINIATURE / "teacher"  # many steps, with guidance: what the student was distilled from

BUILTIN = "builtin:miniature"
BUILTIN_TEACHER = "builtin:miniature-teacher"
OUTPUTS = ("runs", "outputs")  # no owners on the hub, but where our own commands write
SHIPPED = {"mini": BUILTIN, "mini-teacher": BUILTIN_TEACHER}  # by their names on a command line

# Weights as safetensors, configs, indices, tokenizer.json and the sentencepiece model: nothing that
# could carry code, and not the same weights a second time in another format.
PATTERNS = ("*.safetensors", "*.json", "*spiece.model")
CONFIGS = ("*.json", "*spiece.model")  # all but the weights: a few megabytes
# The same weights again in another dtype, which nothing reads unless it is asked for.
VARIANTS = ("*diffusion_pytorch_model.*.safetensors", "*/model.*.safetensors")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*", re.ASCII)
# The address of one file, as the hub's pages show it, or the path that diffusers also takes.
HUB_FILE = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/(?P<repo>[^/]+/[^/]+)/(?:blob|resolve)/"
    r"(?P<revision>[^/]+)/(?P<file>[^?#]+)"
)


def builtin_folder(name: str) -> Path | None:
    """The folder of a shipped model by its `builtin:` name; None for any other name."""
    return {BUILTIN: STUDENT, BUILTIN_TEACHER: TEACHER}.get(name)


def resolve_model(
    name: str | Path,
    revision: str | None = None,
    offline: bool = False,
    patterns: Sequence[str] = PATTERNS,
    *,
    variant: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
) -> Path:
    """The folder of a model: `name` itself if it is one, else the hub's snapshot in its cache.

    Args:
        name: a folder, `owner/name` on the hub, or a shipped model (`BUILTIN`).
        revision: branch, tag or commit; a commit id pins the bytes. For hub ids only.
        offline: do not use the network, only the cache. (The hub library also obeys
            HF_HUB_OFFLINE and HF_HOME.)
        patterns: which files are fetched.
        variant: fetch the weights of that variant, such as "fp16", where a part has it, and no
            others; see `wan.weights.checkpoint`.
        cache_dir: in place of the hub library's own folder for what is fetched.
        token: the hub's access token, True for the one that is stored on this machine.
        force_download: fetch again what is in the cache.
    Raises:
        WanError: there is no such model, or it can't be fetched; names the command to fetch it.
    """
    if not isinstance(name, str | Path):
        raise WanError(f"a model named {name!r}: give a folder, or a hub id of the form owner/name")
    if (shipped := builtin_folder(str(name))) is not None:
        if revision is not None:
            raise WanError(f"{name} is shipped here; revision={revision} is for models on the hub")
        return shipped
    folder = expanded(name)
    if folder.is_dir():
        if revision is not None:
            raise WanError(f"{name} is a folder; revision={revision} is for models on the hub")
        return folder
    if folder.exists():
        raise WanError(
            f"{name}: a file; give the folder that holds model_index.json, and a part's file as "
            "transformer=, vae= or text_encoder="
        )
    if folder.parent.name in OUTPUTS and len(folder.parts) == len(Path(name).parts) == 2:
        there = sorted(one.name for one in folder.parent.glob("*/"))[:5]
        raise WanError(
            f"{name}: no such folder; {folder.parent}/ is where commands write what they make, so "
            f"the hub is not asked. In it: {', '.join(there) or 'nothing'}"
        )
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        raise WanError(f"{name}: no such folder, and not a hub id of the form owner/name")
    options: dict[str, Any] = {"cache_dir": cache_dir, "token": token}
    options = {key: value for key, value in options.items() if value is not None}
    if force_download:
        options["force_download"] = True

    def fetch(allowed: Sequence[str], ignored: Sequence[str]) -> Path:
        try:
            found = snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(allowed),
                ignore_patterns=list(ignored) or None,
                local_files_only=offline,
                **options,
            )
        except RuntimeError as error:  # nobody knows the home folder
            raise WanError(f"{name}: {error} HF_HOME=FOLDER keeps what is fetched there") from error
        except (OSError, ValueError) as error:  # all of the hub's errors, and the network's
            raise WanError(unavailable(name, revision, offline, allowed, error)) from error
        return Path(found)

    if variant is None or "*.safetensors" not in patterns:
        return fetch(patterns, VARIANTS if "*.safetensors" in patterns else ())
    others = [pattern for pattern in patterns if pattern != "*.safetensors"]
    found = fetch([*others, f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"], ())
    without = [part.parent for part in sorted(found.glob("*/config.json"))]
    without = [part for part in without if not any(part.glob("*.safetensors"))]
    if without:
        found = fetch([f"{part.name}/*.safetensors" for part in without], VARIANTS)
    return found


def hub_id(folder: Path) -> str | None:
    """The hub id of a snapshot in the hub's cache; None for any other folder."""
    *_, repository, snapshots, _ = ("", "", *folder.absolute().parts)
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def resolve_file(
    path: str | Path, revision: str | None = None, offline: bool = False, **where: Any
) -> Path:
    """One file: a local one, or one on the hub by its address, downloaded if it is not cached.

    Args:
        path: a file, or https://huggingface.co/owner/name/blob/REVISION/FILE.
        revision, offline, where: as for `resolve_model`; a revision in the address is used if
            none is given.

    Raises:
        WanError: there is no such file, or it can't be fetched.
    """
    found = HUB_FILE.fullmatch(str(path))
    if found is None:
        file = expanded(path)
        if not file.is_file():
            raise WanError(f"{path}: no such file; give one .safetensors file, or its hub address")
        return file
    repo, version = found["repo"], revision or found["revision"]
    try:
        return Path(
            hf_hub_download(
                repo, found["file"], revision=version, local_files_only=offline, **where
            )
        )
    except (OSError, ValueError) as error:
        patterns = (found["file"],)
        raise WanError(unavailable(repo, version, offline, patterns, error)) from error


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

"""Find a LoRA file: by its path, in a folder, or in a repository on the Hugging Face hub."""

from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download

from wan.errors import WanError
from wan.files import expanded
from wan.lora.files import FOLDER_NAMES, is_hub_id, lora_file


def find_lora(
    name: str | Path,
    weight_name: str | None = None,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The path of a LoRA file; one on the hub is downloaded if it is not in the cache.

    Args:
        name: a file, a folder, or `owner/name` on the hub.
        weight_name: the file in the folder or repository; needed if there are several.
        subfolder: the folder in it.
        revision, cache_dir, token, local_files_only, force_download: for the hub, as for
            `huggingface_hub.hf_hub_download`.

    Raises:
        WanError: there is no such file, or several that it could be.
    """
    path = expanded(name)
    if path.is_file():
        if weight_name not in (None, path.name) or subfolder:
            raise WanError(
                f"{name}: a file, so weight_name and subfolder say nothing; give one or the other"
            )
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        return lora_file(folder if weight_name is None else folder / weight_name)
    if not is_hub_id(str(name)):
        raise WanError(f"LoRA {name}: no such file or folder, and not a hub id (owner/name)")
    front = f"{subfolder.strip('/')}/" if subfolder else ""
    hub: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    try:
        if weight_name is None and (local_files_only or constants.HF_HUB_OFFLINE):
            return lora_file(Path(snapshot_download(str(name), **hub)) / front)
        if weight_name is None:
            files = HfApi().list_repo_files(str(name), revision=revision, token=token)
            weight_name = only_lora(str(name), [f for f in files if f.startswith(front)], front)
        place = PurePosixPath(front + weight_name)
        found = Path(hf_hub_download(str(name), str(place), **hub))
        if found.name == FOLDER_NAMES[1]:  # peft keeps alpha in a file beside it
            hf_hub_download(str(name), str(place.with_name("adapter_config.json")), **hub)
    except WanError:
        raise
    except (OSError, ValueError) as error:  # all of the hub's errors, and the network's
        reason = str(error).strip().splitlines() or [""]
        raise WanError(
            f"LoRA {name}: no such file or folder, and it can't be fetched from the hub "
            f"({type(error).__name__}: {reason[0]})"
        ) from error
    return found


def only_lora(name: str, files: list[str], front: str) -> str:
    """The one LoRA among the files of a repository, without the folder in front.

    Raises:
        WanError: there is none, or several and none of them has a usual name.
    """
    bare = [file.removeprefix(front) for file in files]
    for usual in FOLDER_NAMES:
        if usual in bare:
            return usual
    found = sorted(file for file in bare if file.endswith(".safetensors"))
    if len(found) != 1:
        listed = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if found[12:] else "")
        raise WanError(
            f"LoRA {name}: name its file with weight_name=; it holds "
            f"{listed or 'no .safetensors file'}"
        )
    return found[0]

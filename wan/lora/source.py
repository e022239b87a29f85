"""Find a LoRA file: by its path, in a folder, or in a repository on the Hugging Face hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download

from wan.errors import WanError
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
    path = Path(name).expanduser()
    if path.is_file():
        if weight_name not in (None, path.name) or subfolder:
            raise WanError(
                f"{name}: a file, so weight_name and subfolder say nothing; give one or the other"
            )
        return path
    if path.is_dir():
        folder = path / (subfolder or "")
        found = lora_file(folder if weight_name is None else folder / weight_name)
        return found
    if not is_hub_id(str(name)):
        raise WanError(f"LoRA {name}: no such file or folder, and not a hub id (owner/name)")
    hub: dict[str, Any] = {"revision": revision, "token": token}
    front = f"{subfolder.strip('/')}/" if subfolder else ""
    download = hub | {
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    try:
        if weight_name is None:
            if local_files_only:
                raise WanError(f"LoRA {name}: without the network, weight_name= must name its file")
            files = HfApi().list_repo_files(str(name), **hub)
            weight_name = only_lora(str(name), [f for f in files if f.startswith(front)], front)
        found = Path(hf_hub_download(str(name), front + weight_name, **download))
        if found.name == FOLDER_NAMES[1]:  # peft keeps alpha in a file beside it
            hf_hub_download(str(name), f"{front}adapter_config.json", **download)
    except (OSError, ValueError) as error:  # all of the hub's errors, and the network's
        if isinstance(error, WanError):
            raise
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

"""Our modules -> checkpoints in a released layout, in shards that are written atomically."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import folder_beside, write_json
from wan.weights.checkpoint import INDEX_SUFFIX, family
from wan.weights.keys import VAELevels, released_name
from wan.weights.safetensors_file import OnBytes, write_tensors
from wan.weights.scaled import plain_dtype, restored


def save_component(
    state: Mapping[str, Tensor],
    folder: str | Path,
    component: str,
    layout: str = "diffusers",
    *,
    vae_levels: VAELevels | None = None,
    prefix: str = "",
    dtypes: Mapping[str, torch.dtype] | None = None,
    scales: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
    variant: str | None = None,
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Write a state dict with our names as a component in a released layout.

    Every file is written beside its place and renamed; the index comes last. The folder is created
    if missing. It may hold other files, but no weights of the same name: a checkpoint that was
    replaced halfway would look like a whole one.

    Args:
        vae_levels: for a VAE, the settings that its names depend on.
        prefix: put in front of every released name, as in repacked files.
        dtypes: our name -> dtype to convert to, shard by shard. None changes no bits of a tensor
            without a scale.
        scales: our name -> the scale of an 8-bit weight, which is restored shard by shard.
        variant: put into the names of the files, as in `<name>.fp16.safetensors`.
        on_bytes: called after each tensor with the number of bytes that were written.
    Returns:
        The weight files, and the index if there are several.
    Raises:
        WanError: a name is not ours, weights are already there, or there is no space or right
            to write.
    """
    folder = Path(folder)
    scales = scales or {}
    released = {n: prefix + released_name(component, layout, n, vae_levels) for n in state}
    kept = {n: plain_dtype(t.dtype) if n in scales else t.dtype for n, t in state.items()}
    wanted = {released[n]: dtype for n, dtype in (dtypes or kept).items()}
    named = {released[n]: t for n, t in state.items()}
    factors = {released[n]: scale for n, scale in scales.items()}
    stem = file_stem(component, layout, vae_levels) + ("" if variant is None else f".{variant}")
    try:
        return write_shards(
            named, wanted, factors, folder, stem, max_shard_bytes, metadata or {}, on_bytes
        )
    except OSError as error:
        raise WanError(f"{folder}: can't be written: {error.strerror or error}") from error


def write_shards(
    named: Mapping[str, Tensor],
    wanted: Mapping[str, torch.dtype],
    scales: Mapping[str, Tensor],
    folder: Path,
    stem: str,
    max_shard_bytes: int,
    metadata: Mapping[str, str],
    on_bytes: OnBytes | None = None,
) -> list[Path]:
    """Write tensors under their final names in the wanted dtypes; see `save_component`."""
    folder.mkdir(parents=True, exist_ok=True)
    old = [f.name for f in folder.iterdir() if family(f.name) == stem]
    if old:
        raise WanError(f"{folder}: already holds {', '.join(sorted(old))}; choose an empty folder")
    total = sum(tensor.numel() * wanted[name].itemsize for name, tensor in named.items())
    free = shutil.disk_usage(folder).free
    if total > free:
        raise WanError(f"{folder}: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB free")
    shards = split_shards(named, wanted, max_shard_bytes)
    names = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [f"{stem}.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        write_tensors(
            folder / name,
            # No copy of what does not change.
            {n: restored(tensor, scales.get(n), wanted[n]) for n, tensor in shard.items()},
            {"format": "pt", **metadata},
            on_bytes,
        )
    written = [folder / name for name in names]
    if len(shards) > 1:
        weight_map = {t: name for name, s in zip(names, shards, strict=True) for t in s}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        written.append(folder / index_name(stem))
        write_json(written[-1], index)
    return written


def index_name(stem: str) -> str:
    """The index of shards: the variant stands at its end, as diffusers and transformers write."""
    plain, dot, variant = stem.partition(".")
    return f"{plain}{INDEX_SUFFIX.removesuffix('.json')}{dot}{variant}.json"


def same_weights(folder: Path, name: str) -> list[Path]:
    """The files in a folder that hold the same weights as the file of that name: all shards."""
    if not name.endswith((".safetensors", ".json")) or name == "config.json":
        return []
    return [
        file for file in folder.iterdir() if file.is_file() and family(file.name) == family(name)
    ]


def move_files(source: Path, target: Path) -> None:
    """Move the files of a folder into another one, where older weights of their names go away."""
    target.mkdir(parents=True, exist_ok=True)
    files = [file for file in source.iterdir() if file.is_file()]
    for file in files:
        for old in same_weights(target, file.name):
            old.unlink()
    # An index comes last: a reader must not find it before its shards.
    for file in sorted(files, key=lambda file: file.suffix == ".json"):
        file.replace(target / file.name)


def replace_component(
    state: Mapping[str, Tensor],
    folder: Path,
    component: str,
    config: Mapping[str, Any],
    **options: Any,
) -> None:
    """Write config.json and weights into a folder; older weights of their names go away first.

    Args:
        options: further arguments of `save_component`.

    Raises:
        WanError: see `save_component`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder) as beside:
        save_component(state, beside, component, **options)
        write_json(beside / "config.json", config)
        if folder.exists():
            move_files(beside, folder)
        else:  # it appears as a whole
            beside.rename(folder)


def size_in_bytes(size: int | str) -> int:
    """A number of bytes from a number or a text such as "5GB" or "200MB" (decimal units).

    Raises:
        WanError: neither.
    """
    match = (
        re.fullmatch(r"(\d+)\s*([KMGT]?)(i?)B", size, re.IGNORECASE)
        if isinstance(size, str)
        else None
    )
    if match is not None:
        unit = 1024 if match[3] else 1000
        size = int(match[1]) * unit ** " KMGT".index(match[2].upper() or " ")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise WanError(f"max_shard_size={size!r}: need a number of bytes, or a text such as 5GB")
    return size


def file_stem(component: str, layout: str, vae_levels: VAELevels | None) -> str:
    """The released name of a component's weight file, without shard number and suffix."""
    if layout == "official" and component == "vae":
        assert vae_levels is not None
        return "Wan2.2_VAE" if vae_levels.is_residual else "Wan2.1_VAE"
    if component == "text_encoder":
        return "models_t5_umt5-xxl-enc" if layout == "official" else "model"
    return "diffusion_pytorch_model"


def split_shards(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> list[dict[str, Tensor]]:
    """Group consecutive tensors into shards of at most `max_bytes`; a larger one is alone."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * dtypes[name].itemsize
        if shards[-1] and size + nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += nbytes
    return shards

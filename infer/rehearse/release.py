"""Folders of released models with random weights, written fast and in little memory."""

import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.command_line import preset_checkpoint
from infer.parity.models import TEXT, drawn_like, small_vae
from wan.errors import WanError
from wan.files import folder_beside, read_json, write_json
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.pipeline.config import (
    FEW_STEP,
    PipelineConfig,
    SamplingDefaults,
    released_config,
    write_configs,
)
from wan.pipeline.folder import module_builders
from wan.pipeline.parts import vae_levels, weight_kind
from wan.pipeline.tokenizer_files import write_tokenizer
from wan.sampling.schedule import FEW_STEP_TIMESTEPS
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.hub import STUDENT
from wan.weights.load import build_on_meta, target_dtype
from wan.weights.save import save_component

BF16, F32 = torch.bfloat16, torch.float32
MARK = "rehearsal.json"  # says that the weights are random, and which
POOL = 1 << 24  # random numbers that all weights are cut from


@dataclass(frozen=True)
class Release:
    """A released model as its files describe it.

    Attributes:
        config: all settings.
        dtypes: of the stored weights, by kind of part. A transformer in bfloat16 still has some
            parameters in float32, as `WanDiT.FLOAT32_PARAMETERS` names them.
    """

    config: PipelineConfig
    dtypes: Mapping[str, torch.dtype]

    def parameters(self, part: str) -> dict[str, Tensor]:
        """Our names -> tensors on the meta device, in the stored dtypes."""
        module: Any = build_on_meta(module_builders(self.config)[part])
        stored, exact = self.dtypes[weight_kind(part)], type(module).FLOAT32_PARAMETERS
        return {
            name: tensor.to(target_dtype(name, tensor.dtype, stored, exact))
            for name, tensor in module.state_dict().items()
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of all weights."""
        parts = map(self.parameters, self.config.components)
        return sum(tensor.nbytes for part in parts for tensor in part.values())


def tiny() -> PipelineConfig:
    """A few-step student of small networks, for a try of the command."""
    vae = small_vae("2.2")
    dit = DiTConfig(
        3, 32, 2, 64, in_channels=vae.z_dim, out_channels=vae.z_dim, text_dim=TEXT.d_model
    )
    text = UMT5Config(**{**vars(TEXT), "vocab_size": 1024})
    defaults = SamplingDefaults(128, 128, 5, max_sequence_length=128)
    return PipelineConfig(FEW_STEP, dit, vae, text, timesteps=FEW_STEP_TIMESTEPS, defaults=defaults)


HALF = {"transformer": BF16, "text_encoder": BF16, "vae": F32}
FULL = {"transformer": F32, "text_encoder": F32, "vae": F32}
DTYPES = {
    "fastwan_ti2v_5b": HALF,
    "wan22_ti2v_5b": HALF | {"transformer": F32},
    "wan22_t2v_a14b": HALF | {"transformer": F32},
    "wan21_t2v_14b": FULL,
    "wan21_t2v_1_3b": FULL,
}
# Releases with the networks of another one: whose they are, and what is their own.
LIKE_OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "fastwan_ti2v_5b": (
        "wan22_ti2v_5b",
        {"class_name": FEW_STEP, "timesteps": FEW_STEP_TIMESTEPS},
    ),
    "wan22_t2v_a14b": (
        "wan21_t2v_14b",
        {"boundary_ratio": 0.875, "scheduler": SchedulerSettings(shift=12.0)},
    ),
}


def release_named(name: str) -> Release:
    """A release by its name in `configs.rehearsal.RELEASES`.

    Sources of sizes and dtypes: the config.json and the indices of the released repositories.
    """
    if name == "tiny":
        return Release(tiny(), HALF)
    sizes_of, own = LIKE_OTHERS.get(name, (name, {}))
    config = released_config(preset_checkpoint(sizes_of))
    assert config is not None, "the presets name what is known"
    return Release(replace(config, **own), DTYPES[name])


def random_state(release: Release, part: str, seed: int) -> dict[str, Tensor]:
    """Weights of a part, by our names: overlapping views of few random numbers.

    Each weight starts at a place of its own in a pool, and the rows of a large matrix overlap, each
    shifted against the one before. Spreads are those of `infer.parity.models.drawn_like`, so that
    activations keep their size through all layers.
    """
    parameters = release.parameters(part)
    count = min(POOL, 4 * max(tensor.numel() for tensor in parameters.values()))
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    pools: dict[tuple[float, float, torch.dtype], Tensor] = {}
    state = {}
    for name, tensor in parameters.items():
        mean, std = drawn_like(name, tensor, weight_kind(part), release.config.text_encoder)
        key = (mean, std, tensor.dtype)
        if key not in pools:
            pools[key] = (mean + std * numbers).to(tensor.dtype)
        state[name] = cut(pools[key], tensor.shape, zlib.crc32(f"{part}.{name}".encode()))
    return state


def cut(pool: Tensor, shape: torch.Size, number: int) -> Tensor:
    """A view of a pool (n,) as a tensor of that shape, from a place that a number decides."""
    rows, columns = shape[0], shape[1:].numel()
    step = min(columns, (len(pool) // 2 - columns) // rows)  # from row to row
    start = number % (len(pool) - step * (rows - 1) - columns + 1)
    strides = [shape[i + 1 :].numel() for i in range(len(shape))]
    return pool.as_strided(shape, [step, *strides[1:]], start)


def write_release(name: str, folder: Path, seed: int) -> bool:
    """Write a release with random weights into a folder, unless it is there already.

    Returns:
        Whether it was written now.

    Raises:
        WanError: the folder holds something else, or the disk has no room.
    """
    made = {"release": name, "seed": seed, "weights": "random"}
    if folder.exists():
        if (folder / MARK).is_file() and read_json(folder / MARK) == made:
            return False
        raise WanError(
            f"{folder}: holds something else than {name} of seed {seed} with random weights; give "
            "another folder=, or remove it"
        )
    release = release_named(name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(folder.parent).free, release.num_bytes
    if needed > free:
        raise WanError(
            f"folder={folder.parent}: the weights of {name} take {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free; give a folder= on another disk, or a smaller "
            "release="
        )
    with folder_beside(folder) as beside:
        write_configs(release.config, beside)
        write_tokenizer(STUDENT / "tokenizer", beside / "tokenizer")
        for part in release.config.components:
            kind = weight_kind(part)
            save_component(
                random_state(release, part, seed),
                beside / part,
                kind,
                vae_levels=vae_levels(release.config.vae) if kind == "vae" else None,
            )
        write_json(beside / MARK, made)
        beside.rename(folder)
    return True

"""A model's folder in the released layout: find its parts, load them, write a new folder."""

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan.errors import WanError, check_names
from wan.files import read_json
from wan.lora.files import refuse_other_expert
from wan.lora.merge import Merges, all_changes, merge_lists
from wan.models.attention import AttentionChoice, NetworkAttention
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import (
    PipelineConfig,
    component_config,
    part_folder,
    read_pipeline_config,
    shared_parts,
    write_configs,
)
from wan.pipeline.inputs import OnProgress, report
from wan.weights.checkpoint import open_checkpoint
from wan.weights.keys import VAELevels
from wan.weights.load import build_on_meta, load_module
from wan.weights.save import save_component

# part -> the dataclass of its config.json, and its network
PARTS: dict[str, tuple[Any, type[nn.Module]]] = {
    "transformer": (DiTConfig, WanDiT),
    "vae": (VAEConfig, WanVAE),
    "text_encoder": (UMT5Config, UMT5Encoder),
}
QUANTIZED_PARTS = ("transformer", "transformer_2", "text_encoder")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk whose settings have been read: each JSON file once.

    Attributes:
        path: the folder that holds model_index.json.
        config: what its JSON files say.
        places: part -> where its files lie, for parts that are not below `path`.
    """

    path: Path
    config: PipelineConfig
    places: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, Path] | None = None) -> "ModelFolder":
        """Read all settings of a folder.

        Args:
            overrides: part -> another folder or file with its weights; a config.json in that
                folder is used.

        Raises:
            WanError: see `read_pipeline_config`.
        """
        shared = shared_parts(path)
        places = shared | dict(overrides or {})
        return cls(path, read_pipeline_config(path, overrides, shared), places)

    def part(self, name: str) -> Path:
        """The folder or file that holds a part."""
        return self.places.get(name, self.path / name)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read when it is first needed."""
        return Tokenizer.from_folder(self.part("tokenizer"))


def weight_kind(part: str) -> str:
    """The component name of a part: both experts are "transformer"."""
    return "transformer" if part == "transformer_2" else part


def vae_levels(config: VAEConfig) -> VAELevels:
    """The settings that the key table of a VAE depends on."""
    return VAELevels(config.is_residual, config.num_res_blocks)


def part_builder(part: str, config: Any, **options: Any) -> Callable[[], Any]:
    """A function that makes a part's network.

    Args:
        config: the part's dataclass of settings, or its config.json as a dict.
        options: further arguments of the network's class, such as `attention` of `WanDiT`.
    """
    config_class, network_class = PARTS[weight_kind(part)]
    if isinstance(config, Mapping):
        config = config_class.from_json(config)
    return lambda: network_class(config, **options)


def load_part(
    folder: Path,
    part: str,
    config: Any = None,
    options: Mapping[str, Any] | None = None,
    **loading: Any,
) -> Any:
    """Load one network of a model's folder, in evaluation mode.

    Args:
        folder: in the released layout.
        part: "transformer", "transformer_2", "vae" or "text_encoder".
        config: its settings; None reads its config.json.
        options: further arguments of the network's class.
        loading: arguments of `wan.weights.load.load_module`: dtype, device and others.

    Raises:
        WanError: a file is missing, damaged or of another model.
    """
    if config is None:
        config = read_json(component_config(folder, part, {}))
    build = part_builder(part, config, **(options or {}))
    checkpoint = open_checkpoint(part_folder(folder, part))
    return load_module(build, checkpoint, weight_kind(part), **loading).eval()


def module_builders(
    config: PipelineConfig, attention: AttentionChoice = "sdpa"
) -> dict[str, Callable[[], Any]]:
    """Functions that make the networks of a pipeline, by part."""
    transformer = part_builder("transformer", config.transformer, attention=attention)
    return {
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": part_builder("vae", config.vae),
        "text_encoder": part_builder("text_encoder", config.text_encoder),
    }


def load_modules(
    folder: ModelFolder,
    config: PipelineConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: NetworkAttention,
    quantize: str = "none",
    loras: Merges | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Load every network of a pipeline, in evaluation mode, by part.

    Args:
        config: the folder's settings, perhaps with another pipeline class.
        quantize: 8-bit weights for the parts in `QUANTIZED_PARTS`; see `wan.weights.quantize`.
        loras: part -> the LoRA, or several, that are merged into it before it is quantised.

    Raises:
        WanError: weights are missing, damaged or of another model; or a LoRA does not fit.
    """
    merges = merge_lists(loras)
    chosen = str(attention.config)
    warn_of_attention(folder.path, config.defaults.attention, chosen)
    for merge in (one for several in merges.values() for one in several):
        warn_of_attention(merge.lora.path, merge.lora.attention, chosen)
    builders = module_builders(config, attention)
    check_names("loras", list(merges), [part for part in builders if part in config.components])
    for part, several in merges.items():
        parameters = dict(build_on_meta(builders[part]).named_parameters())
        for merge in several:
            if config.boundary_ratio is not None:
                refuse_other_expert(merge.lora.path, merge.lora.expert, part)
            merge.check(parameters)
    modules = {}
    for done, part in enumerate(config.components):
        report(on_progress, "load", done, len(config.components))
        module = load_module(
            builders[part],
            open_checkpoint(folder.part(part)),
            weight_kind(part),
            dtype=dtype,
            device=device,
            quantize=quantize if part in QUANTIZED_PARTS else "none",
            changes=all_changes(merges.get(part, [])) or None,
        )
        modules[part] = module.eval()
    report(on_progress, "load", len(config.components), len(config.components))
    return modules


def warn_of_attention(path: Path | str, trained: str | None, chosen: str) -> None:
    """Warn where a network runs with another attention than it was trained with.

    Weights trained with sparse attention make another video with full attention.
    """
    if trained is not None and chosen != trained:
        name, *options = re.split(r" (?=\w+=)", trained)
        typed = " ".join([f"attention={name}", *(f'"attention.{option}"' for option in options)])
        warnings.warn(
            f"{path}: was trained with attention={trained} and runs with {chosen}; "
            f"add {typed} to run it as it was trained",
            stacklevel=3,
        )


def save_modules(
    folder: Path,
    config: PipelineConfig,
    modules: Mapping[str, nn.Module],
    tokenizer_folder: Path | None,
) -> None:
    """Write the released layout into a temporary folder and rename it at the end.

    Raises:
        WanError: the folder holds something already, or the tokenizer's files are unknown.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WanError(f"{folder}: exists already; choose a new folder")
    if tokenizer_folder is None:
        raise WanError("saving copies the tokenizer's files: give the pipeline tokenizer_folder")
    beside = folder.with_name(f".{folder.name}.tmp")
    if beside.exists():
        shutil.rmtree(beside)
    write_configs(config, beside)
    shutil.copytree(tokenizer_folder, beside / "tokenizer")
    for part, module in modules.items():
        levels = vae_levels(config.vae) if part == "vae" else None
        save_component(module.state_dict(), beside / part, weight_kind(part), vae_levels=levels)
    if folder.exists():
        folder.rmdir()
    beside.rename(folder)

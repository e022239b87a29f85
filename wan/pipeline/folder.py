"""A model's folder in the released layout: find its parts, load them, write a new folder."""

import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan.errors import WanError, check_names
from wan.files import read_json
from wan.lora.merge import LoRAMerge
from wan.models.attention import AttentionChoice, NetworkAttention
from wan.models.tokenizer import Tokenizer
from wan.pipeline.arguments import Placement
from wan.pipeline.config import (
    PipelineConfig,
    component_config,
    part_folder,
    read_pipeline_config,
    shared_parts,
    write_configs,
)
from wan.pipeline.inputs import OnProgress, report
from wan.pipeline.parts import (
    PARTS,
    AutoencoderKLWan,
    UMT5EncoderModel,
    WanTransformer3DModel,
    vae_levels,
    weight_kind,
)
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import build_on_meta, load_module
from wan.weights.save import same_weights, save_component

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
    def read(
        cls,
        path: Path,
        overrides: Mapping[str, Path] | None = None,
        variant: str | None = None,
    ) -> "ModelFolder":
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
    """Functions that make the networks of a pipeline, by part, as scripts know them."""
    transformer: Any = lambda: WanTransformer3DModel(config.transformer, attention)  # noqa: E731
    return {
        "transformer": transformer,
        "transformer_2": transformer,
        "vae": lambda: AutoencoderKLWan(config.vae),
        "text_encoder": lambda: UMT5EncoderModel(config.text_encoder),
    }


def load_modules(
    folder: ModelFolder,
    config: PipelineConfig,
    where: Placement,
    *,
    left_out: Collection[str],
    attention: NetworkAttention,
    offload: str,
    quantize: str = "none",
    loras: Mapping[str, LoRAMerge | Sequence[LoRAMerge]] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Load the networks of a pipeline, in evaluation mode, by part.

    Args:
        config: the folder's settings, perhaps with another pipeline class.
        where: the device that computes, and the dtypes.
        left_out: parts that are not loaded.
        quantize: 8-bit weights for the parts in `QUANTIZED_PARTS`; see `wan.weights.quantize`.
        loras: part -> the LoRA that is merged into it before it is quantised.

    Raises:
        WanError: weights are missing, damaged or of another model; or a LoRA does not fit.
    """
    loras = loras or {}
    parts = [part for part in config.components if part not in left_out]
    chosen = str(attention.config)
    if "transformer" in parts:
        warn_of_attention(folder.path, config.defaults.attention, chosen)
    for merge in loras.values():
        warn_of_attention(merge.lora.path, merge.lora.attention, chosen)
    builders = module_builders(config, attention)
    check_names("loras", list(loras), [part for part in builders if part in parts])
    for part, merge in loras.items():
        merge.check(dict(build_on_meta(builders[part]).named_parameters()))
    modules = {}
    for done, part in enumerate(parts):
        report(on_progress, "load", done, len(parts))
        module = load_module(
            builders[part],
            open_checkpoint(folder.part(part)),
            weight_kind(part),
            dtype=where.dtype(part),
            device=where.device if offload == "none" else torch.device("cpu"),
            quantize=quantize if part in QUANTIZED_PARTS else "none",
            changes=loras[part].changes if part in loras else None,
        )
        modules[part] = module.eval()
    report(on_progress, "load", len(parts), len(parts))
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
    parts: Mapping[str, Any],
    variant: str | None,
    max_shard_bytes: int,
) -> None:
    """Write a model in the released layout; one that is in the folder already is replaced.

    Everything is written into a temporary folder beside it first. The old model_index.json is
    removed before the first file is replaced and the new one comes last, so that a folder that was
    replaced halfway does not look like a model.

    Args:
        parts: the tokenizer, and every network of `config.components`.
        variant: put into the names of the weight files.

    Raises:
        WanError: the tokenizer's files are unknown, or the files can't be written.
    """
    beside = folder.with_name(f".{folder.name}.tmp")
    if beside.exists():
        shutil.rmtree(beside)
    write_configs(config, beside)
    for part, network in parts.items():
        write_part(beside / part, part, network, config, variant, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").unlink(missing_ok=True)
    for part in [*parts, "scheduler"]:
        move_files(beside / part, folder / part)
    move_files(beside, folder)


def write_part(
    folder: Path,
    part: str,
    given: Any,
    config: PipelineConfig,
    variant: str | None,
    max_shard_bytes: int,
) -> None:
    """Write one part; those of other libraries know how to write themselves."""
    given = getattr(given, "_orig_mod", given)  # what torch.compile has wrapped
    if isinstance(given, Tokenizer):
        if given.folder is None:
            raise WanError("saving copies the tokenizer's files: make it by Tokenizer.from_folder")
        shutil.copytree(given.folder, folder, dirs_exist_ok=True)
    elif part == "tokenizer" or not isinstance(given, PARTS[weight_kind(part)][1]):
        shutil.rmtree(folder, ignore_errors=True)  # its config.json is of this project's class
        options = {"variant": variant} if isinstance(given, nn.Module) else {}
        given.save_pretrained(folder, **options)
    else:
        save_component(
            given.state_dict(),
            folder,
            weight_kind(part),
            vae_levels=vae_levels(config.vae) if part == "vae" else None,
            variant=variant,
            max_shard_bytes=max_shard_bytes,
        )


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
    if not any(source.iterdir()):
        source.rmdir()

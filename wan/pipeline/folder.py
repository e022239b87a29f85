"""A model's folder in the released layout: find its parts, load them, write a new folder."""

import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan.errors import WanError, check_names
from wan.files import folder_beside
from wan.lora.files import refuse_other_expert
from wan.lora.merge import Merges, all_changes, merge_lists
from wan.models.attention import AttentionChoice, NetworkAttention
from wan.models.tokenizer import Tokenizer
from wan.paths import all_inside
from wan.pipeline.arguments import Placement
from wan.pipeline.config import (
    PipelineConfig,
    component_settings,
    part_folder,
    read_pipeline_config,
    shared_parts,
    write_configs,
)
from wan.pipeline.inputs import OnProgress, report
from wan.pipeline.known_models import PARTS
from wan.pipeline.layouts import find_parts, pipeline_of_parts
from wan.pipeline.parts import (
    AutoencoderKLWan,
    UMT5EncoderModel,
    WanTransformer3DModel,
    vae_levels,
    weight_kind,
)
from wan.pipeline.tokenizer_files import is_tokenizer, read_tokenizer, write_tokenizer
from wan.weights.checkpoint import Checkpoint, has_variant, holds_weights, open_checkpoint
from wan.weights.digests import MANIFEST
from wan.weights.load import build_on_meta, load_module
from wan.weights.save import move_files, save_component

QUANTIZED_PARTS = ("transformer", "transformer_2", "text_encoder")


@dataclass(frozen=True)
class ModelFolder:
    """A model on disk whose settings have been read: each JSON file once.

    Attributes:
        path: the folder that holds model_index.json, or of one of the layouts that
            `wan.pipeline.layouts` knows.
        config: what its JSON files say.
        places: part -> where its files lie, for parts that are not below `path`.
        variant: the variant of the weights that is read where a part has it, such as "fp16".
    """

    path: Path
    config: PipelineConfig
    places: Mapping[str, Path] = field(default_factory=dict)
    variant: str | None = None

    @classmethod
    def read(
        cls,
        path: Path,
        overrides: Mapping[str, Path] | None = None,
        variant: str | None = None,
    ) -> "ModelFolder":
        """Read all settings of a folder.

        Args:
            overrides: part -> another folder or file with its weights, or the tokenizer's folder; a
                config.json in that folder is used, see `wan.pipeline.config.component_settings`.
            variant: read the weights of that variant where a part has it.

        Raises:
            WanError: see `read_pipeline_config` and `wan.pipeline.layouts.find_parts`; or no part
                has the variant.
        """
        overrides = dict(overrides or {})
        for place in overrides.values():
            all_inside(place, place)
        if parts := find_parts(path, overrides):
            config = pipeline_of_parts(path, parts)
            folder = cls(path, config, parts, variant)
            warnings.warn(
                f"{path}: nothing here says what the model is; it is taken for a base model with "
                f"shift {config.shift:g}",
                stacklevel=2,
            )
        else:
            shared = shared_parts(path)
            config = read_pipeline_config(path, overrides, shared)
            folder = cls(path, config, folder_places(path, shared | overrides), variant)
            for part in {*config.components, "tokenizer"} - overrides.keys():
                all_inside(folder.part(part), path, *overrides.values())
        if variant is not None:
            networks = folder.config.components
            here = any(holds_weights(folder.part(part)) for part in networks)
            if here and not any(folder.has_variant(part) for part in networks):
                raise WanError(f"{path}: no part has weights of variant={variant}; leave it out")
        return folder

    def part(self, name: str) -> Path:
        """The folder or file that holds a part."""
        return self.places.get(name, self.path / name)

    def has_variant(self, name: str) -> bool:
        """Whether a part has weights of the variant that was asked for."""
        return self.variant is not None and has_variant(self.part(name), self.variant)

    def checkpoint(self, name: str) -> Checkpoint:
        """The weights of a part.

        Raises:
            WanError: see `wan.weights.checkpoint.open_checkpoint`.
        """
        variant = self.variant if self.has_variant(name) else None
        return open_checkpoint(self.part(name), variant, self.path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, read when it is first needed."""
        return read_tokenizer(self.part("tokenizer"))


def folder_places(path: Path, places: dict[str, Path]) -> dict[str, Path]:
    """`places`, with the text encoder's file as the tokenizer of a folder that has no other."""
    text_encoder = places.get("text_encoder", path / "text_encoder")
    if "tokenizer" in places or is_tokenizer(path / "tokenizer"):
        return places
    files = [text_encoder] if text_encoder.is_file() else sorted(text_encoder.glob("*.safetensors"))
    if len(files) == 1 and is_tokenizer(files[0]):
        return places | {"tokenizer": files[0]}
    return places


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
    overrides: Mapping[str, Path] | None = None,
    **loading: Any,
) -> Any:
    """Load one network of a model's folder, in evaluation mode.

    Args:
        folder: in the released layout.
        part: "transformer", "transformer_2", "vae" or "text_encoder".
        config: its settings; None reads its config.json.
        options: further arguments of the network's class.
        overrides: part -> another folder or file with its weights.
        loading: arguments of `wan.weights.load.load_module`: dtype, device and others.

    Raises:
        WanError: a file is missing, damaged or of another model.
    """
    if config is None:
        config = component_settings(folder, part, overrides or {})
    build = part_builder(part, config, **(options or {}))
    place = (overrides or {}).get(part) or part_folder(folder, part)
    checkpoint = open_checkpoint(place, model=folder)
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
    loras: Merges | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Load the networks of a pipeline, in evaluation mode, by part.

    Args:
        config: the folder's settings, perhaps with another pipeline class.
        where: the device that computes, and the dtypes.
        left_out: parts that are not loaded.
        quantize: 8-bit weights for the parts in `QUANTIZED_PARTS`; see `wan.weights.quantize`.
        loras: part -> the LoRA, or several, that are merged into it before it is quantised.

    Raises:
        WanError: weights are missing, damaged or of another model; or a LoRA does not fit.
    """
    merges = merge_lists(loras)
    parts = [part for part in config.components if part not in left_out]
    chosen = str(attention.config)
    if "transformer" in parts:
        warn_of_attention(folder.path, config.defaults.attention, chosen)
    for merge in (one for several in merges.values() for one in several):
        warn_of_attention(merge.lora.path, merge.lora.attention, chosen)
    builders = module_builders(config, attention)
    check_names("loras", list(merges), [part for part in builders if part in parts])
    for part, several in merges.items():
        parameters = dict(build_on_meta(builders[part]).named_parameters())
        for merge in several:
            if config.boundary_ratio is not None:
                refuse_other_expert(merge.lora.path, merge.lora.expert, part)
            merge.check(parameters)
    modules = {}
    for done, part in enumerate(parts):
        report(on_progress, "load", done, len(parts))
        module = load_module(
            builders[part],
            folder.checkpoint(part),
            weight_kind(part),
            dtype=where.dtype(part),
            device=where.device if offload == "none" else torch.device("cpu"),
            quantize=quantize if part in QUANTIZED_PARTS else "none",
            changes=all_changes(merges.get(part, [])) or None,
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder_beside(folder) as beside:
        write_configs(config, beside)
        for part, network in parts.items():
            write_part(beside / part, part, network, config, variant, max_shard_bytes)
        folder.mkdir(exist_ok=True)
        for old in ("model_index.json", MANIFEST):
            (folder / old).unlink(missing_ok=True)
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
        if given.source is None:
            raise WanError("saving copies the tokenizer's files: make it by Tokenizer.from_folder")
        write_tokenizer(given.source, folder)
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

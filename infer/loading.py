"""Load the model that a command names, and keep it between the points of a sweep."""

import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch

from configs.progress import Steps, doing
from configs.schema import STRENGTH, LoadingConfig, PartsConfig, SampleConfig
from infer.sharing import Sharing
from wan.errors import WanError
from wan.files import expanded
from wan.lora.files import read_lora
from wan.lora.merge import LoRAMerge
from wan.lora.names import EXPERTS
from wan.models.attention import AttentionChoice, NetworkAttention
from wan.models.taehv import TinyDecoder
from wan.paths import kept_path
from wan.pipeline.arguments import known_dtype
from wan.pipeline.config import (
    PipelineConfig,
    model_files,
    parts_from_elsewhere,
    shared_parts,
)
from wan.pipeline.folder import ModelFolder
from wan.pipeline.layouts import find_parts
from wan.pipeline.pipeline import PIPELINES, WanPipeline
from wan.pipeline.tiny_decoder import load_tiny_decoder
from wan.runtime.offload import resolve_device
from wan.weights.digests import remembered_sha256, verify_digests
from wan.weights.hub import PATTERNS, resolve_model
from wan.weights.names import census_line

LoRAs = Mapping[str, Sequence[LoRAMerge]]  # network -> what is merged into it, in this order


def folder_of(config: LoadingConfig) -> Path:
    """The folder of the model that a command's settings name, downloaded if it is missing."""
    return resolve_model(config.checkpoint, config.revision, variant=config.variant)


def model_folder(config: LoadingConfig, patterns: Sequence[str] = PATTERNS) -> ModelFolder:
    """The model that a command's settings name, with the parts that they take from elsewhere.

    Args:
        patterns: which files are fetched from the hub; `wan.weights.hub.CONFIGS` is all but the
            weights.

    Raises:
        WanError: see `ModelFolder.read`; or a part does not exist.
    """
    where = (config.checkpoint, config.revision)
    path = resolve_model(*where, patterns=patterns, variant=config.variant)
    folder = ModelFolder.read(path, parts_of(config), config.variant)
    if "transformer_2" in parts_of(config) and folder.config.boundary_ratio is None:
        raise WanError("transformer_2=: this model has one network, not two experts; leave it out")
    return folder


def parts_of(config: LoadingConfig) -> dict[str, Path]:
    """The parts that a command takes from elsewhere; not every command can."""
    return config.parts if isinstance(config, PartsConfig) else {}


def digests_of(config: LoadingConfig) -> dict[str, str]:
    """`weight_digests` of the model that a command's settings name."""
    return weight_digests(folder_of(config), places_of(config))


def places_of(config: LoadingConfig) -> dict[str, Path]:
    """Where the parts are that a command's model does not have in folders of their names."""
    given = parts_of(config)
    return find_parts(folder_of(config), given) or given


def sampling(config: Any) -> dict[str, Any]:
    """A command's sampling settings, under the names of the pipeline's arguments."""
    return {
        "num_inference_steps": config.sampler.steps,
        "timesteps": config.sampler.timesteps,
        "sampler": config.sampler.name,
        "grid": config.sampler.grid,
        "shift": config.sampler.shift,
        "guidance_scale": config.guidance_scale,
        "allow_untrained": config.allow_untrained,
    }


def load_pipeline(
    folder: ModelFolder, config: LoadingConfig, attention: AttentionChoice, **options: Any
) -> WanPipeline:
    """Load a model with the dtype, device, offload and other settings of a command.

    Args:
        options: further arguments of `WanPipeline.from_pretrained`.
    """
    device = resolve_device(config.device)
    return PIPELINES[folder.config.class_name].from_pretrained(
        folder,
        dtype=known_dtype(config.dtype, device),
        device=device,
        attention=attention,
        offload=config.offload,
        compile=config.compile,
        quantize=config.quantize,
        **options,
    )


def weight_digests(folder: Path, places: Mapping[str, Path] | None = None) -> dict[str, str]:
    """sha256 of every file in `model_files`, hashed again only if its size or time changed.

    Args:
        places: part -> where it is, for parts that are not in the model's folder.

    Raises:
        WanError: there is nothing to hash.
    """
    files = model_files(folder, shared_parts(folder) | dict(places or {}))
    if not files:
        raise WanError(f"{folder}: no such folder, or an empty one")
    states = {name: path.stat() for name, path in files.items()}
    return _digests(
        tuple((name, files[name], s.st_size, s.st_mtime_ns) for name, s in states.items())
    )


@cache
def _digests(files: tuple[tuple[str, Path, int, int], ...]) -> dict[str, str]:
    with doing("hashing the weights"):
        digests = remembered_sha256(path for _, path, _, _ in files)
    return {name: digests[path] for name, path, _, _ in files}


class WeightDigests:
    """sha256 of every file in `model_files` and of the LoRAs, computed while the model runs.

    `more` are further files, by the names that the digests have.

    It uses a daemon thread: hashing does not block other threads, and Ctrl-C does not wait for it.
    """

    def __init__(self, folder: ModelFolder, loras: LoRAs, more: Mapping[str, Path]) -> None:
        self._digests: dict[str, str] | None = None
        self._thread = threading.Thread(target=self._hash, args=(folder, loras, more), daemon=True)
        self._thread.start()

    def _hash(self, folder: ModelFolder, loras: LoRAs, more: Mapping[str, Path]) -> None:
        found = model_files(folder.path, folder.places) | dict(more)
        for part, merges in loras.items():
            for number, merge in enumerate(merges, 1):
                found[lora_name(part, number)] = Path(merge.lora.path)
        files = {name: path for name, path in found.items() if path.is_file()}
        digests = remembered_sha256(files.values(), threads=2)
        self._digests = {name: digests[path] for name, path in files.items()}

    def result(self) -> dict[str, str]:
        """Wait until all files are hashed; returns {file: sha256}."""
        self._thread.join()
        if self._digests is None:
            raise OSError("the weight files could not be read again to hash them")
        return self._digests


def lora_name(part: str, number: int) -> str:
    """How the digests call a LoRA: whatever its file is named, by its place in the list."""
    return f"LoRA {number} of {part}"


# What a stage of a pipeline counts.
STAGES = {
    "load": "parts loaded",
    "encode": "texts encoded",
    "denoise": "steps",
    "decode": "latent frames decoded",
}


class StageBars:
    """How far a pipeline is: the `on_progress` of its calls, which tells one stage after another.

    Args:
        quiet: say nothing; for all processes of a run but one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet, self._stage = quiet, ""
        self._steps: Steps | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._steps is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._steps = Steps(STAGES.get(stage, stage), total, done, self._quiet)
        elif done > self._steps.done:
            self._steps.add(done - self._steps.done)
        if done >= total:
            self.close()

    def close(self) -> None:
        if self._steps is not None:
            self._steps.close()
        self._stage, self._steps = "", None


class LoadedModel:
    """A loaded pipeline, and the facts about it that the record of a video holds.

    Attributes:
        begun, seconds: when loading began (Unix time), and how long it took.
    """

    def __init__(
        self,
        folder: ModelFolder,
        config: SampleConfig,
        attention: NetworkAttention,
        loras: LoRAs,
        sharing: Sharing,
        with_vae: bool = True,
    ) -> None:
        self.begun, started = time.time(), time.perf_counter()
        if config.verify and not sharing.helps:
            with doing("hashing all files of the model"):
                verify_files(folder.path, folder.places)
        place = resolve_device(config.device)
        options: dict[str, Any] = {"loras": loras}
        if sharing.helps:  # the main process encodes texts
            options["text_encoder"] = None
        if not with_vae:
            options["vae"] = None
        how: LoadingConfig = config
        if sharing.sharded:  # no device could hold the whole
            dtype = str(known_dtype(config.dtype, place)).removeprefix("torch.")
            how = replace(config, device="cpu", dtype=dtype)
        with StageBars() as bars:
            self.pipeline = load_pipeline(folder, how, attention, on_progress=bars, **options)
        self.folder = folder.path
        self.set_decoders(config)
        reports = [(part, one.report) for part, merges in loras.items() for one in merges]
        kept = [replace(r, path=kept_path(r.path, config.output_dir)) for _, r in reports]
        self.merges = [f"{part}: {r}" for (part, _), r in zip(reports, kept, strict=True)]
        hashed = config.hash_weights and not sharing.helps
        more = {} if config.decoder is None else {"decoder": expanded(config.decoder)}
        self.digests = WeightDigests(folder, loras, more) if hashed else None
        self.census = {part: census_line(module) for part, module in self.pipeline.modules.items()}
        if sharing.together:
            choices = sharing.config
            self.pipeline.enable_parallelism(
                choices.weights, guidance=choices.guidance, device=place
            )
        self.seconds = time.perf_counter() - started

    def set_decoders(self, config: SampleConfig) -> None:
        """Load the tiny decoders that a command asks for, in the dtype of the networks."""

        def load(path: str | None) -> TinyDecoder | None:
            if path is None:
                return None
            device = self.pipeline.device
            return load_tiny_decoder(path, device, known_dtype(config.dtype, device))

        self.pipeline.decoder = load(config.decoder)
        self.preview_decoder = load(config.preview_decoder)

    def describe(self, verbose: bool) -> str:
        """What LoRAs changed, a line each, and with `verbose` what the parts hold."""
        lines = [f"{part}: {line}" for part, line in self.census.items()]
        return "\n".join([*(lines if verbose else ()), *self.merges])


def verify_files(folder: Path, places: Mapping[str, Path] | None = None) -> None:
    """Compare all files of a model with their published digests, and print their number.

    Args:
        places: part -> where it is, if that is not below the folder.

    Raises:
        WanError: a file is missing, changed or not listed.
    """
    # The manifest of a part in another folder lies in the folder above the part.
    elsewhere = parts_from_elsewhere(folder, places).values()
    distinct = dict.fromkeys(place.resolve() for place in [folder, *(p.parent for p in elsewhere)])
    number = sum(verify_digests(place) for place in distinct)
    print(f"{number} files match their sha256", file=sys.stderr)


class ModelCache:
    """Keeps the last loaded model, for the next point of a sweep with the same settings."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._model: LoadedModel | None = None

    def get(
        self,
        folder: ModelFolder,
        config: SampleConfig,
        attention: NetworkAttention,
        loras: LoRAs,
        device: torch.device,
        sharing: Sharing | None = None,
        with_vae: bool = True,
    ) -> LoadedModel:
        """The model with these settings; it is loaded unless the last one had the same.

        Args:
            attention: attention functions that were verified on the device.
            loras: from `read_loras`.
            sharing: what several processes do; None for one that is alone.
            with_vae: load the autoencoder; where a tiny decoder decodes, only pictures need it.
        """
        sharing = Sharing() if sharing is None else sharing
        key = (
            *(folder.path, *sorted(folder.places.items()), folder.variant),
            *(device, config.dtype, config.offload, config.compile, config.quantize),
            *(config.lora, config.lora_2, config.lora_strength, config.lora_strength_2),
            *(config.hash_weights, config.verify, config.decoder, config.preview_decoder),
            *(sharing.together, config.parallel.weights, config.parallel.guidance, with_vae),
        )
        if self._model is None or key != self._key:
            self._model = None  # frees its memory before the next model is loaded
            self._model = LoadedModel(folder, config, attention, loras, sharing, with_vae)
            self._key = key
            if sharing.team.is_main and (about := self._model.describe(config.verbose)):
                print(about, file=sys.stderr)
        self._model.pipeline.tile = config.tile
        self._model.pipeline.chunk_latents = config.chunk_latents
        self._model.pipeline.set_attention(attention)
        return self._model

    def bytes_on(self, device: torch.device) -> int:
        """Bytes of the loaded model on a device; loading another model frees them."""
        if self._model is None:
            return 0
        return sum(
            tensor.nbytes
            for module in self._model.pipeline.modules.values()
            for tensor in module.state_dict().values()
            if tensor.device.type == device.type
        )


def file_and_strength(entry: str) -> tuple[Path, float]:
    """An entry of `lora=`: FILE, or FILE:STRENGTH. What is there under its whole name is a file."""
    path = expanded(entry)
    match = STRENGTH.fullmatch(entry)
    if match is None or path.exists():
        file, _, strength = entry.rpartition(":")
        if file and not path.exists() and expanded(file).exists():
            raise WanError(
                f"lora={entry}: {strength!r} is no number; write FILE:STRENGTH, as in {file}:0.8"
            )
        return path, 1.0
    return expanded(match[1]), float(match[2])


def read_loras(config: SampleConfig, model: PipelineConfig) -> dict[str, list[LoRAMerge]]:
    """Read a command's LoRA files: network -> the LoRAs with their strengths, in their order.

    Raises:
        WanError: a file cannot be read, or is for an expert that the model lacks.
    """
    two = model.boundary_ratio is not None
    if config.lora_2 is not None and not two:
        raise WanError("lora_2=: for models with two experts; this one has one network: use lora=")
    strength_2 = config.lora_strength_2
    if strength_2 is None:
        strength_2 = config.lora_strength
    options = {
        "transformer": (config.lora, config.lora_strength),
        "transformer_2": (config.lora_2, strength_2),
    }
    found = {
        part: [
            LoRAMerge(read_lora(path, part if two else None), factor * strength)
            for path, strength in map(file_and_strength, entries)
        ]
        for part, (entries, factor) in options.items()
        if entries
    }
    used = {part: [merge.lora.path for merge in merges] for part, merges in found.items()}
    for part, merges in found.items():
        for lora in (merge.lora for merge in merges):
            if lora.other_expert and any(lora.path not in used.get(one, ()) for one in EXPERTS):
                warnings.warn(
                    f"LoRA {lora.path}: holds layers for both experts, and those for {part} alone "
                    "are used; give it as lora= and as lora_2= to use all",
                    stacklevel=2,
                )
    return found

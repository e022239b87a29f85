"""What is made of a run's weights: a LoRA file, or a folder that pipelines and diffusers load.

Every training command says once what becomes of its weights, as `Artefacts`. The end of the run,
`loop.export_every=` and `python -m train.export` all write from that, so that they write the same.
It needs the trained weights by name, and no network, process group, data or text encoder.
"""

import hashlib
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.progress import doing
from train.card import CARD, Origin, model_card
from train.checkpoint import move_aside, name_of
from train.lora import Scales
from train.optim import trainable
from train.parallel import Ranks, gathered
from train.state import TrainState
from train.tensor_cache import only_writer
from wan.errors import WanError
from wan.files import flush_to_disk, folder_beside, read_sealed, write_sealed, write_text
from wan.lora.files import ATTENTION, FOLDER_NAMES, LowRank
from wan.lora.merge import file_tensors, write_lora
from wan.models.attention import SPARSE
from wan.models.attention_config import AttentionConfig
from wan.pipeline.config import PipelineConfig, part_folder, write_configs
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import list_files
from wan.weights.load import stored_state
from wan.weights.safetensors_file import raw_bytes
from wan.weights.save import replace_component, save_component
from wan.weights.scaled import restored

EXPORTS = "exports"  # the folder of a run that holds what was made of its steps
OTHER_PARTS = ("vae", "text_encoder", "tokenizer")

Weights = Mapping[str, Tensor]  # trained weights by our names, whole, on the CPU


class Artefact(Protocol):
    """One file or folder that is made of trained weights."""

    @property
    def final(self) -> str:
        """Its name in the run's folder at the end of the run."""

    @property
    def ending(self) -> str:
        """What follows the name of a step elsewhere: ".safetensors", or "" of a folder."""

    def write(self, weights: Weights, place: Path) -> None:
        """Write it, complete or not at all; what is there is replaced."""

    def num_bytes(self, weights: Weights) -> int:
        """How large it will be; of the weights, only shapes are read."""


@dataclass(frozen=True)
class TrainedLoRA:
    """The pairs of a LoRA, as a file in the format of diffusers.

    Attributes:
        scales: alpha / r, which is multiplied into lora_B.
        attention: what it was trained with; a sparse one is noted in the file.
    """

    scales: Scales
    attention: AttentionConfig
    final: str = FOLDER_NAMES[0]
    ending: str = ".safetensors"

    def write(self, weights: Weights, place: Path) -> None:
        trained = trained_attention(self.attention)
        metadata = {} if trained is None else {ATTENTION: trained}
        write_lora(place, file_tensors(weights, scales_of(weights, self.scales)), metadata)

    def num_bytes(self, weights: Weights) -> int:
        return 4 * sum(tensor.numel() for tensor in weights.values())


@dataclass(frozen=True)
class TrainedModel:
    """A complete folder in the released layout, with the trained transformer in float32.

    Attributes:
        source: the folder whose other parts are copied.
        settings: what the result says about itself; a sparse attention is added.
        attention: what the transformer was trained with.
        folded: for a LoRA, the base that its pairs are added to, and their scales; None if the
            trained weights are the transformer's own.
        origin: what the model card says of its training; None writes no card.
    """

    source: Path
    settings: PipelineConfig
    attention: AttentionConfig
    folded: tuple[Path, Scales] | None = None
    origin: Origin | None = None
    final: str = "model"
    ending: str = ""

    def write(self, weights: Weights, place: Path) -> None:
        defaults = replace(self.settings.defaults, attention=trained_attention(self.attention))
        state = weights if self.folded is None else folded_state(*self.folded, weights)
        with folder_beside(place) as beside:
            for name, path in self.other_files():
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, beside / name)
                flush_to_disk(beside / name)
            settings = replace(self.settings, defaults=defaults)
            write_configs(settings, beside)
            if self.origin is not None:
                write_text(beside / CARD, model_card(self.origin, settings))
            save_component(state, beside / "transformer", "transformer")
            put_in_place(beside, place)

    def num_bytes(self, weights: Weights) -> int:
        if self.folded is None:
            numbers = sum(tensor.numel() for tensor in weights.values())
        else:
            base = open_checkpoint(self.folded[0])
            numbers = sum(math.prod(tensor.entry.shape) for tensor in base.tensors.values())
        return 4 * numbers + sum(path.stat().st_size for _, path in self.other_files())

    def other_files(self) -> Iterator[tuple[str, Path]]:
        """The files of the parts that are copied, by their paths in the new folder."""
        for part in OTHER_PARTS:
            for name, path in list_files(part_folder(self.source, part)).items():
                yield f"{part}/{name}", path


def put_in_place(beside: Path, place: Path) -> None:
    """Give a finished folder its name; one of that name is removed once the new one is there.

    A kill in between leaves the old folder as `.replaced-NAME`, which the next call removes.
    """
    aside = place.with_name(f".replaced-{place.name}")
    if place.exists():
        if aside.exists():
            shutil.rmtree(aside)
        place.rename(aside)
    beside.rename(place)
    flush_to_disk(place.parent)
    if aside.exists():
        shutil.rmtree(aside)


def trained_attention(attention: AttentionConfig) -> str | None:
    """What a model says about the attention it was trained with; None for a full one."""
    return str(attention) if attention.name in SPARSE else None


def scales_of(weights: Weights, scales: Scales) -> dict[str, float]:
    """alpha / r of every pair by its layer's name."""
    layers = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
    return {name: scales[name] if isinstance(scales, Mapping) else scales for name in layers}


def folded_state(base: Path, scales: Scales, weights: Weights) -> dict[str, Tensor]:
    """A transformer's stored weights in float32, with the pairs of a LoRA added to them.

    Args:
        base: the folder of the transformer.
        weights: `<layer>.lora_A` (r, in) and `<layer>.lora_B` (out, r).
    """
    stored, factors = stored_state(open_checkpoint(base), "transformer")
    state = {n: restored(t, factors.get(n), torch.float32) for n, t in stored.items()}
    for layer, scale in scales_of(weights, scales).items():
        pair = LowRank(weights[f"{layer}.lora_A"], weights[f"{layer}.lora_B"], scale)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] + pair.delta()
    return state


def export_part(module: Any, folder: Path, name: str, **options: Any) -> None:
    """Write one part of a model in the released layout: config.json and weights.

    Args:
        options: for `wan.weights.save.replace_component`.
    """
    replace_component(module.state_dict(), folder, name, module.config.to_json(), **options)


# --- all that a run leaves ------------------------------------------------------------------------


@dataclass(frozen=True)
class Artefacts:
    """What becomes of one of a run's networks.

    Attributes:
        network: its name in the run's `TrainState`.
        made: a LoRA file, a folder, or both.
    """

    network: str
    made: Sequence[Artefact]

    def weights(self, state: TrainState, ranks: Ranks) -> dict[str, Tensor]:
        """The network's trained weights, averaged where the run averages them.

        All processes call this; the main one gets them whole, the others get nothing.
        """
        average = state.averages.get(self.network)
        own = trainable(state.modules[self.network])
        whole = {}
        for name, weight in (own if average is None else average.weights).items():
            tensor = gathered(weight.detach())
            if ranks.is_main:
                whole[name] = tensor.cpu()
        return whole

    def write_step(self, state: TrainState, folder: Path, ranks: Ranks) -> None:
        """Write what is made of the present step, but for what is there already.

        All processes call this. What is there of other weights is moved aside, with a line that
        says so: it is of a run that was set back or begun anew. `folder/exports.json` keeps the
        sha256 of the weights that each step was made of.
        """
        name = name_of(state.step)
        places = step_places(self.made, folder / EXPORTS / name)
        weights = self.weights(state, ranks)
        with ranks.together():
            if ranks.is_main:
                clear_others(folder / f"{EXPORTS}.json", name, digest_of(weights), places)
                write_new(weights, places)

    def write_end(self, state: TrainState, folder: Path, ranks: Ranks) -> None:
        """Write what the end of a run leaves; an earlier end of the same run is replaced.

        All processes call this.

        Raises:
            WanError: another process is writing to `folder`.
        """
        weights = self.weights(state, ranks)
        with ranks.together():
            if ranks.is_main:
                with only_writer(folder):
                    for artefact in self.made:
                        with doing(f"writing {folder / artefact.final}"):
                            artefact.write(weights, folder / artefact.final)
                        print(f"wrote {folder / artefact.final}")


Places = Sequence[tuple[Artefact, Path]]


def step_places(made: Sequence[Artefact], stem: Path) -> Places:
    """Where artefacts lie whose names begin alike."""
    return [(artefact, stem.with_name(stem.name + artefact.ending)) for artefact in made]


def digest_of(weights: Weights) -> str:
    """The sha256 of weights with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(raw_bytes(tensor.contiguous()))
    return digest.hexdigest()


def clear_others(record: Path, name: str, digest: str, places: Places) -> None:
    """Move artefacts of a step aside that were made of other weights, and note the new digest.

    It is noted before the first artefact is written and after the last one has moved: so a kill in
    between never leaves artefacts of two runs under one name.

    Args:
        record: a file of the digests, by the names of steps; a damaged one says nothing.
        name: of the step.
    """
    try:
        made_of = read_sealed(record) if record.exists() else {}
    except WanError as error:
        print(f"warning: {error}; it is written anew", file=sys.stderr)
        made_of = {}
    if made_of.get(name) == digest:
        return
    for _, place in places:
        if place.exists():
            aside = move_aside(place)
            words = f"was not made of this run's weights; it is called {aside.name} now"
            print(f"warning: {place} {words}", file=sys.stderr)
    write_sealed(record, made_of | {name: digest})


def write_new(weights: Weights, places: Places) -> None:
    """Write artefacts, but for those that are there already."""
    for artefact, place in places:
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            with doing(f"writing {place}"):
                artefact.write(weights, place)
            print(f"wrote {place}")

"""LoRA files of every common format, as changes to our parameters.

A LoRA changes a weight W (out, in) by  strength * (alpha / r) * up @ down,  with down (r, in) and
up (out, r); without an alpha, alpha / r is 1. It may also hold whole differences of a parameter's
shape. Names are read by `wan.lora.names`. Alpha is a tensor of its own, or stands in the file's
metadata or in adapter_config.json beside it.

Every tensor of a file must find its place here; one that does not is an error, never skipped.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import parse_json, read_text
from wan.lora.names import (
    DIFF_ROLES,
    EXPERTS,
    LAYOUTS,
    PAIR_ROLES,
    Parameter,
    TensorName,
    best_layout,
    read_name,
    target,
)
from wan.paths import inside
from wan.settings import is_of
from wan.weights.hub import HUB_ID
from wan.weights.names import grouped
from wan.weights.safetensors_file import map_tensors, read_header

# Names a folder may use for its one LoRA file: diffusers', then peft's.
FOLDER_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
ATTENTION = "trained_attention"  # in the metadata of our own files

# Adapters that are not a sum of low-rank products: recognised, and refused by name.
OTHER_METHODS = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.|$)"),
    "LoHa": re.compile(r"\.hada_[wt]\d"),
    "LoKr": re.compile(r"\.lokr_[wt]\d"),
    "LoCon with a Tucker core": re.compile(r"\.lora_mid(\.|$)"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "IA3": re.compile(r"\.on_input$"),
    "OFT": re.compile(r"\.(oft_|boft_)"),
    "weight replacement": re.compile(r"\.(set_weight|set_param|reshape_weight)$"),
}
# Starting points of peft that also change the base weights, so the pair alone is not the adapter.
BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
IMAGE_TO_VIDEO = re.compile(r"k_img|v_img|img_emb|add_[kv]_proj|image_embedder")


@dataclass(frozen=True)
class LowRank:
    """One pair of factors; `scale` is alpha / r (or alpha / sqrt(r) where the file says so)."""

    down: Tensor  # (r, in, ...)
    up: Tensor  # (out, r, ...)
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the change, a convolution's kernel flattened into `in`."""
        return self.up.shape[0], self.down[0].numel()

    def fits(self, shape: torch.Size) -> bool:
        return len(shape) >= 2 and self.shape == (shape[0], shape[1:].numel())

    def delta(self, device: torch.device | str = "cpu") -> Tensor:
        """scale * up @ down in float32, with the shape (out, in); a new tensor."""
        up = self.up.to(device, torch.float32).flatten(1)
        down = self.down.to(device, torch.float32).flatten(1)
        return (up @ down).mul_(self.scale)


@dataclass(frozen=True)
class FullDelta:
    """A difference of the parameter's full shape, added after scaling by `scale`."""

    value: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def fits(self, shape: torch.Size) -> bool:
        return self.value.shape == shape

    def delta(self, device: torch.device | str = "cpu") -> Tensor:
        """scale * value in float32; a new tensor."""
        return self.scale * self.value.to(device, torch.float32)


@dataclass(frozen=True, eq=False)  # compared by identity
class LoRA:
    """A LoRA file: changes by the names of our DiT's parameters (see wan/weights/keys.py)."""

    path: str
    format: str  # for people: "official names, lora_down/lora_up, alpha per layer"
    num_tensors: int
    pairs: dict[str, LowRank]
    deltas: dict[str, FullDelta]
    attention: str | None = None  # sparse self-attention it was trained with; None: not recorded
    expert: str | None = None  # of a two-expert model, if its names say it
    other_expert: bool = False  # the file has layers for the other expert too, not read here

    @property
    def names(self) -> list[str]:
        """The parameters that it changes."""
        return sorted({*self.pairs, *self.deltas})

    def copied(self, device: torch.device | str = "cpu") -> "LoRA":
        """With tensors of its own, which neither their file nor their owner can change."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, copy=True)

        pairs = {n: replace(p, down=copy(p.down), up=copy(p.up)) for n, p in self.pairs.items()}
        deltas = {n: replace(d, value=copy(d.value)) for n, d in self.deltas.items()}
        return replace(self, pairs=pairs, deltas=deltas)


def read_lora(path: str | Path, expert: str | None = None) -> LoRA:
    """Read a LoRA for Wan's DiT: a .safetensors file, or a folder that holds one.

    Args:
        expert: which network of a two-expert model it is for ("transformer" is the high-noise one,
            "transformer_2" the low-noise one): of a file for both, that half is read. Not needed
            for models with one network.

    Raises:
        FileNotFoundError: there is no such file.
        WanError: the file is no safetensors file, no LoRA, of the other expert, or of another
            method such as DoRA; or it has unknown names, half a pair, or an unusable alpha or
            tensor, all of them listed.
    """
    path = lora_file(Path(path))
    source = read_header(path)
    beside = path.with_name("adapter_config.json")
    settings = None
    if path.name == "adapter_model.safetensors" and beside.is_file():
        settings = (str(beside), read_text(inside(beside, path.parent)))
    return parse_lora(map_tensors(source), source.metadata, str(path), expert, settings)


def parse_lora(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    path: str = "state dict",
    expert: str | None = None,
    settings: tuple[str, str] | None = None,
) -> LoRA:
    """Read the tensors of a LoRA file by their names in the file.

    Args:
        metadata: the strings of the file's header.
        path: what messages and reports call the file.
        expert: see `read_lora`.
        settings: the place and the JSON text of peft's settings, for files without them in their
            metadata.

    Raises:
        WanError: see `read_lora`.
    """
    metadata = metadata or {}
    refuse_other_methods(path, tensors)
    names, unknown = read_names(path, tensors)
    num_names = len(names)
    names, label = one_expert(path, names, expert)
    if PEFT_METADATA in metadata:
        settings = (f"its {PEFT_METADATA}", metadata[PEFT_METADATA])
    peft_config = NO_PEFT_CONFIG
    if settings is not None:
        peft_config = read_peft_config(path, *settings, label or EXPERTS[0])
    layout = best_layout(names)
    layers: dict[str, Layer] = defaultdict(dict)
    for name in names:
        layer = layers[name.key]
        if name.role in layer:
            raise WanError(
                f"LoRA {path}: two tensors for one place: {layer[name.role][0].text} and "
                f"{name.text}; a file must hold one adapter"
            )
        layer[name.role] = (name, tensors[name.text])
    check_layers(path, layers, unknown, layout)
    pairs: dict[str, LowRank] = {}
    deltas: dict[str, FullDelta] = {}
    for layer in layers.values():
        for parameter, change in layer_changes(layer, layout, peft_config):
            places: dict[str, Any] = pairs if isinstance(change, LowRank) else deltas
            if parameter.ours in places:
                raise WanError(f"LoRA {path}: two changes of one kind for {parameter.released}")
            places[parameter.ours] = change
    about = describe(names, layout, peft_config)
    other = len(names) < num_names
    trained = metadata.get(ATTENTION)
    return LoRA(path, about, len(tensors), pairs, deltas, trained, label, other)


# --- the file -------------------------------------------------------------------------------------


# For messages: what each expert is, and where a LoRA for it is given.
NOISE = {"transformer": "high noise", "transformer_2": "low noise"}
OPTIONS = {
    "transformer": "as lora= (in Python, load_into_transformer_2=False)",
    "transformer_2": "as lora_2= (in Python, load_into_transformer_2=True)",
}


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name, and is not that of a LoRA file."""
    return HUB_ID.fullmatch(name) is not None and not name.endswith(".safetensors")


def lora_file(path: Path) -> Path:
    """The path of the LoRA file, from that path or from its folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        hint = f"; if it is on the hub, get it first: hf download {path}"
        raise FileNotFoundError(
            f"LoRA {path}: no such file or folder{hint if is_hub_id(str(path)) else ''}"
        )
    for name in FOLDER_NAMES:
        if (path / name).is_file():
            return inside(path / name, path)
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise WanError(
            f"LoRA {path}: a folder needs exactly one .safetensors file (it has: {listed}); "
            "give the path of the file"
        )
    return inside(found[0], path)


def refuse_other_methods(path: str, names: Iterable[str]) -> None:
    for name in names:
        for method, pattern in OTHER_METHODS.items():
            if pattern.search(name):
                raise WanError(
                    f"LoRA {path}: is a {method} adapter (see {name}), which is not a low-rank sum "
                    "and can't be merged here; export it as plain LoRA or merge it where it "
                    "was trained"
                )


# --- names ----------------------------------------------------------------------------------------

Layer = dict[str, tuple[TensorName, Tensor]]  # role -> (its name in the file, the tensor)


def read_names(path: str, texts: Iterable[str]) -> tuple[list[TensorName], list[str]]:
    """The names of a file taken apart, and those whose suffix is unknown.

    Raises:
        WanError: no name is one of a LoRA.
    """
    names, unknown = [], []
    for text in texts:
        name = read_name(text)
        if name is None:
            unknown.append(text)
        else:
            names.append(name)
    if names:
        return names, unknown
    problem = f"LoRA {path}: no LoRA layers in its {len(unknown)} tensors ({grouped(unknown)})"
    if any("lora" in text.lower() for text in unknown):
        raise WanError(
            f"{problem}; they are of a form that is not known here: export the file with names "
            "that end in lora_A.weight and lora_B.weight"
        )
    whole = any(is_whole(layout, text) for text in unknown for layout in LAYOUTS)
    raise WanError(
        f"{problem}; it is a whole model, not a change to one: give it as transformer="
        if whole
        else f"{problem}; it is no LoRA for Wan"
    )


def is_whole(layout: str, text: str) -> bool:
    """Whether a name is a parameter's own: a suffix is added, as a difference of it would have."""
    name = read_name(f"{text}.diff_param")
    return name is not None and target(layout, name) is not None


def refuse_other_expert(path: str, label: str | None, expert: str) -> None:
    """Raise a WanError if a file's names say another expert than the one it is given for.

    Args:
        label: the expert that the names say; None fits both.
    """
    if label not in (None, expert):
        assert label is not None
        raise WanError(
            f"LoRA {path}: its names say {label} ({NOISE[label]}), and it was given for "
            f"{expert} ({NOISE[expert]}); give it for {label}, {OPTIONS[label]}"
        )


def one_expert(
    path: str, names: list[TensorName], expert: str | None
) -> tuple[list[TensorName], str | None]:
    """The names of one expert where a file holds both, and the expert that these names say.

    In a file that also has names of the low-noise expert, names without an expert are those of the
    high-noise one.

    Raises:
        WanError: the file holds both and none is asked for, or it is of the other expert.
    """
    if expert not in (None, *EXPERTS):
        raise WanError(f"expert={expert!r}: must be one of {', '.join(EXPERTS)}")
    labels = {name.expert for name in names}
    low_too = EXPERTS[1] in labels
    owners = [name.expert or (EXPERTS[0] if low_too else None) for name in names]
    if not set(EXPERTS) <= set(owners):
        label = next((owner for owner in owners if owner is not None), None)
        if expert is not None:
            refuse_other_expert(path, label, expert)
        return names, label
    if expert is None:
        raise WanError(
            f"LoRA {path}: holds layers for both experts of a model with two; for such a model "
            "choose expert='transformer' (high noise) or expert='transformer_2' (low noise)"
        )
    kept = [name for name, owner in zip(names, owners, strict=True) if owner == expert]
    return kept, expert


# --- alpha ----------------------------------------------------------------------------------------

PEFT_METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's settings
MAX_REPETITIONS = 3  # in a key of alpha_pattern
MAX_PATTERN = 1000  # characters


@dataclass(frozen=True)
class PeftConfig:
    """The settings of peft that decide the scale of a pair."""

    alpha: float | None = None
    patterns: tuple[tuple[re.Pattern[str], float], ...] = ()  # the first that fits a module counts
    use_rslora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """alpha / r of a module by its released name, with dots."""
        fitting = (alpha for pattern, alpha in self.patterns if pattern.fullmatch(module))
        alpha = next(fitting, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


NO_PEFT_CONFIG = PeftConfig()


def read_peft_config(path: str, source: str, text: str, expert: str) -> PeftConfig:
    """peft's settings, from diffusers' file metadata or from adapter_config.json beside the file.

    Raises:
        WanError: not a JSON object, or a setting whose adapters are not a plain low-rank sum.
    """
    entries = parse_json(text, f"LoRA {path}: {source}")
    entries = {key.removeprefix(f"{expert}."): value for key, value in entries.items()}
    refuse_other_settings(path, source, entries)
    alpha, pattern = entries.get("lora_alpha"), entries.get("alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(
        value is None or is_of(float, value) for value in (alpha, *pattern.values())
    ):
        raise WanError(f"LoRA {path}: {source}: lora_alpha and alpha_pattern must hold numbers")
    patterns = tuple((module_pattern(path, source, key), value) for key, value in pattern.items())
    return PeftConfig(alpha, patterns, bool(entries.get("use_rslora")))


def module_pattern(path: str, source: str, key: str) -> re.Pattern[str]:
    """A key of `alpha_pattern`: a regular expression for the end of a module's name, as in peft.

    It comes from a file, so expressions that could take long are refused: groups that repeat, and
    more than a few repetitions.

    Raises:
        WanError: the expression is refused, or is none.
    """
    simple = re.sub(r"\\.|\[[^\]]*\]", "x", key)
    repeats = len(re.findall(r"[*+?{]", simple))
    if re.search(r"\(\?|\)[*+?{]", simple) or repeats > MAX_REPETITIONS or len(key) > MAX_PATTERN:
        raise WanError(
            f"LoRA {path}: {source}: the key {key[:80]!r} of alpha_pattern is not read: it repeats "
            f"a group, repeats more than {MAX_REPETITIONS} times, or has more than {MAX_PATTERN} "
            "characters; write out the layers' names"
        )
    try:
        return re.compile(rf"(.*\.)?({key})")
    except (re.error, OverflowError) as error:
        raise WanError(
            f"LoRA {path}: {source}: the key {key!r} of alpha_pattern is not a regular expression "
            f"({error})"
        ) from error


def refuse_other_settings(path: str, source: str, entries: dict[str, Any]) -> None:
    for setting in ("use_dora", "fan_in_fan_out", "layer_replication", "use_qalora"):
        if entries.get(setting):
            raise WanError(
                f"LoRA {path}: {source} says {setting}={entries[setting]}; only plain LoRA can be "
                "merged here"
            )
    start = entries.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(BASE_CHANGING_STARTS):
        raise WanError(
            f"LoRA {path}: {source} says init_lora_weights={start!r}, which also changes the base "
            "weights; convert it to plain LoRA with peft's path_initial_model_for_weight_conversion"
        )


# --- layers ---------------------------------------------------------------------------------------


def check_layers(
    path: str, layers: Mapping[str, Layer], unknown: Iterable[str], layout: str
) -> None:
    """Raise one error that lists all tensors without a place, and all that cannot be used."""
    problems: dict[str, list[str]] = defaultdict(list)
    for text in unknown:
        problems["unknown kinds of tensors"].append(text)
    for layer in layers.values():
        for name, problem in layer_problems(layer, layout):
            problems[problem].append(name.text)
    if problems:
        listed = "; ".join(f"{what}: {grouped(texts)}" for what, texts in problems.items())
        texts = [text for listed_texts in problems.values() for text in listed_texts]
        image = any(IMAGE_TO_VIDEO.search(text) for text in texts)
        hint = "; image keys belong to Wan2.1 image-to-video models" if image else ""
        raise WanError(f"LoRA {path}: does not fit Wan, nothing was used: {listed}{hint}")


def layer_problems(layer: Layer, layout: str) -> Iterator[tuple[TensorName, str]]:
    """Yield (name in the file, what is wrong with it)."""
    for name, tensor in layer.values():
        if target(layout, name) is None:
            yield name, "names that are none of Wan's"
        elif problem := unusable(tensor, name.role):
            yield name, problem
    pair = [layer[role][0] for role in PAIR_ROLES if role in layer]
    if pair and not {"down", "up"} <= layer.keys():
        for name in pair:
            yield name, "half a pair"
    elif pair and not is_pair(layer):
        for name in pair:
            yield name, "pairs whose ranks differ"


def is_pair(layer: Layer) -> bool:
    down, up = layer["down"][1], layer["up"][1]
    if down.ndim < 2 or up.ndim < 2 or down.numel() == 0:
        return False
    if "rank" in layer and layer["rank"][1].tolist() not in (len(down), [len(down)]):
        return False
    return up.shape[1] == down.shape[0] and up.shape[2:].numel() == 1


def layer_changes(
    layer: Layer, layout: str, peft_config: PeftConfig
) -> Iterator[tuple[Parameter, LowRank | FullDelta]]:
    """Yield (parameter, change) for every parameter that a layer changes."""
    places = {role: target(layout, name) for role, (name, _) in layer.items()}
    if "down" in layer:
        place = places["down"]
        assert place is not None  # check_layers has seen to it, here and below
        down, up = layer["down"][1], layer["up"][1]
        rank = down.shape[0]
        if "alpha" in layer:  # a layer's own alpha has priority over the file's
            scale = float(layer["alpha"][1].item()) / rank
        else:
            scale = peft_config.scale(place.released.removesuffix(".weight"), rank)
        yield place, LowRank(down, up, scale)
        if (bias := places.get("up_bias")) is not None:
            yield bias, FullDelta(layer["up_bias"][1], scale)
    for role in DIFF_ROLES:
        if (parameter := places.get(role)) is not None:
            yield parameter, FullDelta(layer[role][1])


def unusable(tensor: Tensor, role: str) -> str | None:
    """Why no model can use a tensor in this role; None if it is usable."""
    if role == "alpha":
        if tensor.numel() != 1 or not is_of(float, tensor.item()) or tensor.item() == 0:
            return "alpha that is not one finite number other than 0"
    elif role == "rank":
        if tensor.numel() != 1:
            return "rank that is not one number"
    elif not tensor.is_floating_point():
        return "not floating point"
    elif not bool(torch.isfinite(tensor.float()).all()):
        return "NaN or infinite values"
    return None


def describe(names: Iterable[TensorName], layout: str, peft_config: PeftConfig) -> str:
    """The format in words, for the report of a merge: what was read, in the order of its roles."""
    names = sorted(names, key=lambda name: (*PAIR_ROLES, *DIFF_ROLES).index(name.role))
    underscored = any("." not in n.module and "_" in n.module for n in names if n.role == "down")
    parts = [f"{layout} names" + (" with underscores" if underscored else "")]
    parts += [name.style for name in names if name.role != "rank"]
    if peft_config != NO_PEFT_CONFIG and not any(name.role == "alpha" for name in names):
        parts.append("alpha from peft's settings")
    return ", ".join(dict.fromkeys(parts))

"""LoRA files of every common format, as changes to our parameters.

A LoRA changes a weight W (out, in) by  strength * (alpha / r) * up @ down,  with down (r, in) and
up (out, r); without an alpha, alpha / r is 1. Files differ in four things, each read on its own:

- the prefix in front of a module's name (`transformer.`, `diffusion_model.`, `lora_unet_`, ...),
- whose names follow: diffusers' or the official ones, with dots or (kohya) with underscores,
- the suffix: lora_A/lora_B or lora_down/lora_up, and whole differences diff, diff_b, diff_m,
- where alpha is: a tensor of its own, the file's metadata, or adapter_config.json beside it.

Every tensor of a file must find its place here; one that does not is an error, never skipped.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import read_text
from wan.weights.keys import LAYOUTS, our_name, table
from wan.weights.names import grouped
from wan.weights.safetensors_file import map_tensors, read_header

# Names a folder may use for its one LoRA file: diffusers', then peft's.
FOLDER_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
ATTENTION = "trained_attention"  # in the metadata of our own files
# Removed from the front of a name, repeatedly, until none matches.
PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "pipe.dit.",
    "transformer_2.",
    "transformer.",
)
EXPERTS = ("transformer", "transformer_2")
KOHYA_PREFIX = re.compile(r"^lora_unet_+")

# What the end of a tensor's name says about its role. peft puts the adapter's name in the middle.
ROLES = {
    r"\.lora_A(?:\.(?!weight$)[^.]+)?\.weight": "down",
    r"\.lora_B(?:\.(?!weight$)[^.]+)?\.weight": "up",
    r"\.lora_B(?:\.(?!bias$)[^.]+)?\.bias": "up_bias",
    r"\.lora_down\.weight": "down",
    r"\.lora_up\.weight": "up",
    r"\.alpha": "alpha",
    r"\.diff": "diff",
    r"\.diff_b": "diff_b",
    r"\.diff_m": "diff_m",
}
SUFFIX = re.compile("|".join(f"(?P<s{i}>{pattern})$" for i, pattern in enumerate(ROLES)))
ROLE_NAMES = tuple(ROLES.values())
PAIR_ROLES = ("down", "up", "up_bias", "alpha")

# Adapters that are not a sum of low-rank products: recognised, and refused by name.
OTHER_METHODS = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)(\.|$)"),
    "LoHa": re.compile(r"\.hada_[wt]\d"),
    "LoKr": re.compile(r"\.lokr_[wt]\d"),
    "LoCon with a Tucker core": re.compile(r"\.lora_mid(\.|$)"),
    "OFT": re.compile(r"\.(oft_|boft_)"),
    "weight replacement": re.compile(r"\.(set_weight|reshape_weight)$"),
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
        """scale * up @ down in float32, with the shape (out, in)."""
        up = self.up.to(device, torch.float32).flatten(1)
        down = self.down.to(device, torch.float32).flatten(1)
        return self.scale * (up @ down)


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
        return self.scale * self.value.to(device, torch.float32)


@dataclass(frozen=True)
class LoRA:
    """A LoRA file: changes by the names of our DiT's parameters (see wan/weights/keys.py)."""

    path: str
    format: str  # for people: "official names, lora_down/lora_up, alpha per layer"
    num_tensors: int
    pairs: dict[str, LowRank]
    deltas: dict[str, FullDelta]
    attention: str | None = None  # sparse self-attention it was trained with; None: not recorded

    @property
    def names(self) -> list[str]:
        """The parameters that it changes."""
        return sorted({*self.pairs, *self.deltas})


def read_lora(path: str | Path, expert: str | None = None) -> LoRA:
    """Read a LoRA for Wan's DiT: a .safetensors file, or a folder that holds one.

    Args:
        expert: which half of a file for both experts of a two-expert model ("transformer" is the
            high-noise one, "transformer_2" the low-noise one). Not needed for other files.

    Raises:
        FileNotFoundError: there is no such file.
        WanError: the file is no safetensors file, no LoRA, or of another method such as DoRA; or it
            has unknown names, half a pair, or an unusable alpha or tensor, all of them listed.
    """
    path = lora_file(Path(path))
    source = read_header(path)
    tensors = map_tensors(source)
    tensors, expert = one_expert(path, tensors, expert)
    refuse_other_methods(path, tensors)
    layers, unknown = group_by_module(tensors)
    if not layers:
        raise WanError(
            f"LoRA {path}: no LoRA layers in its {len(tensors)} tensors ({grouped(tensors)}); "
            "if it is a whole model, give it as the checkpoint"
        )
    layout = best_layout(layers)
    peft_config = read_peft_config(path, source.metadata, expert)
    lora = place(path, layers, unknown, layout, peft_config, len(tensors))
    return replace(lora, attention=source.metadata.get(ATTENTION))


# --- the file -------------------------------------------------------------------------------------


def lora_file(path: Path) -> Path:
    """The path of the LoRA file, from that path or from its folder."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"LoRA {path}: no such file or folder")
    for name in FOLDER_NAMES:
        if (path / name).is_file():
            return path / name
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        listed = ", ".join(file.name for file in found) or "none"
        raise WanError(
            f"LoRA {path}: a folder needs exactly one .safetensors file (it has: {listed}); "
            "give the path of the file"
        )
    return found[0]


def one_expert(
    path: Path, tensors: dict[str, Tensor], expert: str | None
) -> tuple[dict[str, Tensor], str]:
    """The tensors of one expert where a file holds both, and which expert that is."""
    if expert not in (None, *EXPERTS):
        raise WanError(f"expert={expert!r}: must be one of {', '.join(EXPERTS)}")
    owners = {name: e for name in tensors for e in EXPERTS if name.startswith(f"{e}.")}
    if set(owners.values()) != set(EXPERTS):
        return tensors, next(iter(owners.values()), EXPERTS[0])
    if expert is None:
        raise WanError(
            f"LoRA {path}: holds layers for both experts; choose expert='transformer' "
            "(high noise) or expert='transformer_2' (low noise)"
        )
    return {name: t for name, t in tensors.items() if owners.get(name, expert) == expert}, expert


def refuse_other_methods(path: Path, names: Iterable[str]) -> None:
    for name in names:
        for method, pattern in OTHER_METHODS.items():
            if pattern.search(name):
                raise WanError(
                    f"LoRA {path}: is a {method} adapter (see {name}), which is not a low-rank sum "
                    "and can't be merged here; export it as plain LoRA or merge it where it "
                    "was trained"
                )


# --- names ----------------------------------------------------------------------------------------

Layer = dict[str, tuple[str, Tensor]]  # role -> (name in the file, tensor)


def group_by_module(tensors: dict[str, Tensor]) -> tuple[dict[str, Layer], list[str]]:
    """Tensors by module (prefix off, roles by suffix), and the names that have no known suffix.

    Raises:
        WanError: two tensors claim the same role of the same module.
    """
    layers: dict[str, Layer] = defaultdict(dict)
    unknown = []
    for name, tensor in tensors.items():
        match = SUFFIX.search(name)
        if match is None or match.lastgroup is None:
            unknown.append(name)
            continue
        role = ROLE_NAMES[int(match.lastgroup[1:])]
        module = strip_prefixes(name[: match.start()])
        if role in layers[module]:
            raise WanError(
                f"two tensors for one place: {layers[module][role][0]} and {name}; "
                "a file must hold one adapter"
            )
        layers[module][role] = (name, tensor)
    return dict(layers), unknown


def strip_prefixes(name: str) -> str:
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


@cache
def modules_by_underscores(layout: str) -> dict[str, str]:
    """All modules of the DiT by their kohya spelling; `#` is the block number.

    Names like self_attn and k_img have underscores of their own, so a kohya name can't be split:
    it can only be looked up.
    """
    modules = {name.rpartition(".")[0] for name in table("transformer", layout).to_ours}
    return {module.replace(".", "_"): module for module in modules}


def released_module(layout: str, module: str) -> str:
    """A module's dotted name in a layout; a name that isn't kohya's is returned unchanged."""
    if KOHYA_PREFIX.match(module) is None:
        return module
    bare = KOHYA_PREFIX.sub("", module)
    number = re.match(r"blocks_(\d+)(?=_|$)", bare)
    template = bare if number is None else "blocks_#" + bare[number.end() :]
    found = modules_by_underscores(layout).get(template, module)
    return found if number is None else found.replace("#", number[1])


def target(layout: str, module: str, role: str) -> str | None:
    """Our name of the parameter that a tensor in this role changes; None if there is none."""
    leaf = {"diff_m": "modulation", "diff_b": "bias", "up_bias": "bias"}.get(role, "weight")
    return our_name("transformer", layout, f"{released_module(layout, module)}.{leaf}")


def best_layout(layers: dict[str, Layer]) -> str:
    """The layout that knows most of the modules.

    Layouts are never mixed, because `norm2` is another module in each.
    """

    def count(layout: str) -> int:
        places = [(module, role) for module, layer in layers.items() for role in layer]
        return sum(target(layout, module, role) is not None for module, role in places)

    return max(LAYOUTS, key=count)


# --- alpha ----------------------------------------------------------------------------------------


class PeftConfig(NamedTuple):
    """The settings of peft that decide the scale of a pair."""

    alpha: float | None
    alpha_pattern: dict[str, float]
    use_rslora: bool

    def scale(self, module: str, rank: int) -> float:
        alpha = self.alpha
        for pattern, value in self.alpha_pattern.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                alpha = value
                break
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


NO_PEFT_CONFIG = PeftConfig(None, {}, False)


def read_peft_config(path: Path, metadata: dict[str, str], expert: str) -> PeftConfig:
    """peft's settings from diffusers' file metadata, or from adapter_config.json beside the file.

    Raises:
        WanError: not valid JSON, or a setting whose adapters are not a plain low-rank sum.
    """
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in metadata:
        source, text = "its lora_adapter_metadata", metadata["lora_adapter_metadata"]
    elif path.name == "adapter_model.safetensors" and beside.is_file():
        source, text = str(beside), read_text(beside)
    else:
        return NO_PEFT_CONFIG
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise WanError(f"LoRA {path}: {source} is not valid JSON ({error})") from error
    if not isinstance(entries, dict):
        raise WanError(f"LoRA {path}: {source} must be a JSON object")
    entries = {key.removeprefix(f"{expert}."): value for key, value in entries.items()}
    refuse_other_settings(path, source, entries)
    alpha, pattern = entries.get("lora_alpha"), entries.get("alpha_pattern") or {}
    values = [alpha, *pattern.values()] if isinstance(pattern, dict) else [pattern]
    if not all(value is None or is_number(value) for value in values):
        raise WanError(f"LoRA {path}: {source}: lora_alpha and alpha_pattern must hold numbers")
    return PeftConfig(alpha, pattern, bool(entries.get("use_rslora")))


def refuse_other_settings(path: Path, source: str, entries: dict[str, Any]) -> None:
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


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# --- putting a file together ----------------------------------------------------------------------


def place(
    path: Path,
    layers: dict[str, Layer],
    unknown: list[str],
    layout: str,
    peft_config: PeftConfig,
    num_tensors: int,
) -> LoRA:
    """Assign every tensor to its parameter; one error lists all tensors without one."""
    problems: dict[str, list[str]] = defaultdict(list)
    for name in unknown:
        problems["unknown kinds of tensors"].append(name)
    for module, layer in layers.items():
        for name, problem in layer_problems(layout, module, layer):
            problems[problem].append(name)
    if problems:
        listed = "; ".join(f"{what}: {grouped(names)}" for what, names in problems.items())
        names = [name for listed_names in problems.values() for name in listed_names]
        image = any(IMAGE_TO_VIDEO.search(name) for name in names)
        hint = "; image keys belong to Wan2.1 image-to-video models" if image else ""
        raise WanError(f"LoRA {path}: does not fit Wan, nothing was used: {listed}{hint}")

    pairs: dict[str, LowRank] = {}
    deltas: dict[str, FullDelta] = {}
    for module, layer in layers.items():
        dotted = released_module(layout, module)
        changes = layer_changes(layer, dotted, peft_config)
        for role, change in changes:
            parameter = target(layout, module, role)
            assert parameter is not None  # layer_problems has checked this
            places: dict[str, Any] = pairs if isinstance(change, LowRank) else deltas
            if parameter in places:
                raise WanError(f"LoRA {path}: two changes of one kind for {dotted} ({parameter})")
            places[parameter] = change
    return LoRA(str(path), describe(layers, layout, peft_config), num_tensors, pairs, deltas)


def layer_problems(layout: str, module: str, layer: Layer) -> Iterator[tuple[str, str]]:
    """Yield (name in the file, what is wrong with it)."""
    for role, (name, tensor) in layer.items():
        if target(layout, module, role) is None:
            yield name, "names that are none of Wan's"
        elif problem := unusable(tensor, role):
            yield name, problem
    pair = [layer[role][0] for role in PAIR_ROLES if role in layer]
    if pair and not {"down", "up"} <= layer.keys():
        for name in pair:
            yield name, "half a pair"
    elif pair and not is_pair(layer["down"][1], layer["up"][1]):
        for name in pair:
            yield name, "pairs whose ranks differ"


def is_pair(down: Tensor, up: Tensor) -> bool:
    if down.ndim < 2 or up.ndim < 2 or down.numel() == 0:
        return False
    return up.shape[1] == down.shape[0] and up.shape[2:].numel() == 1


def layer_changes(
    layer: Layer, module: str, peft_config: PeftConfig
) -> Iterator[tuple[str, LowRank | FullDelta]]:
    """Yield (role, change) for every parameter that a layer changes."""
    if "down" in layer:
        down, up = layer["down"][1], layer["up"][1]
        rank = down.shape[0]
        if "alpha" in layer:  # a layer's own alpha has priority over the file's
            scale = float(layer["alpha"][1].item()) / rank
        else:
            scale = peft_config.scale(module, rank)
        yield "down", LowRank(down, up, scale)
        if "up_bias" in layer:
            yield "up_bias", FullDelta(layer["up_bias"][1], scale)
    for role in ("diff", "diff_b", "diff_m"):
        if role in layer:
            yield role, FullDelta(layer[role][1])


def unusable(tensor: Tensor, role: str) -> str | None:
    """Why no model can use a tensor in this role; None if it is usable."""
    if role == "alpha":
        if tensor.numel() != 1 or not is_number(tensor.item()) or tensor.item() == 0:
            return "alpha that is not one finite number other than 0"
    elif not tensor.is_floating_point():
        return "not floating point"
    elif not bool(torch.isfinite(tensor.float()).all()):
        return "NaN or infinite values"
    return None


def describe(layers: dict[str, Layer], layout: str, peft_config: PeftConfig) -> str:
    """The format in words, for the report of a merge."""
    names = [name for layer in layers.values() for name, _ in layer.values()]
    parts = ["kohya names" if any(map(KOHYA_PREFIX.match, layers)) else f"{layout} names"]
    for label, mark in (
        ("lora_A/lora_B", ".lora_A."),
        ("lora_down/lora_up", ".lora_down."),
        ("full differences", ".diff"),
    ):
        if any(mark in name for name in names):
            parts.append(label)
    if any("alpha" in layer for layer in layers.values()):
        parts.append("alpha per layer")
    elif peft_config != NO_PEFT_CONFIG:
        parts.append("alpha from peft's settings")
    return ", ".join(parts)

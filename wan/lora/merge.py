"""LoRA: merging files into the DiT, and layers to train one.

    lora = read_lora("style.safetensors")
    report = merge_lora(dit, lora, strength=0.8)

Merging computes in float32 and rounds once to the weight's dtype. For training, `add_lora` replaces
linear layers by ones that carry a trainable pair, `save_lora` writes these in the diffusers format,
and `fold_lora` turns them into plain layers again.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.errors import WanError
from wan.lora.files import FOLDER_NAMES, FullDelta, LoRA, LowRank, read_lora
from wan.precision import Linear
from wan.weights.keys import released_name
from wan.weights.names import grouped
from wan.weights.quantize import refuse_quantized
from wan.weights.safetensors_file import write_tensors

__all__ = [
    "DEFAULT_TARGETS",
    "LoRA",
    "LoRALinear",
    "LoRAMerge",
    "MergeReport",
    "add_lora",
    "continue_lora",
    "fold_lora",
    "lora_state",
    "merge_lora",
    "pair_tensors",
    "read_lora",
    "save_lora",
    "write_lora",
]

# --- merging a file -------------------------------------------------------------------------------

# Model width -> the models that have it, for error messages.
WIDTHS = {1536: "Wan2.1 1.3B", 3072: "Wan2.2 TI2V-5B", 5120: "a Wan 14B or A14B"}


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge: the file, its strength and the parameters that changed."""

    path: str
    format: str
    strength: float
    num_tensors: int  # in the file; a merge uses all of them or fails
    ranks: tuple[int, ...]  # the ranks of its pairs, each once
    parameters: tuple[str, ...]  # changed, by our names

    def __str__(self) -> str:
        ranks = f", rank {', '.join(map(str, self.ranks))}" if self.ranks else ""
        return (
            f"LoRA {self.path}: {self.num_tensors} tensors ({self.format}{ranks}) merged into "
            f"{len(self.parameters)} parameters at strength {self.strength:g}"
        )


@torch.no_grad()
def merge_lora(module: nn.Module, lora: LoRA, strength: float = 1.0) -> MergeReport:
    """Add `strength` times a LoRA to the module's weights, in place.

    The sum is taken in float32 on the parameter's device and rounded once to its dtype. Nothing is
    changed unless everything fits.

    Raises:
        WanError: the module lacks a parameter or has it in another shape (the message lists all of
            them, and the model that the LoRA seems to be for); its weights are not loaded yet or
            are quantised; or the strength is not finite.
    """
    merge = LoRAMerge(lora, strength)
    refuse_quantized(module, "merge a LoRA before (from_pretrained does, given loras=)")
    if getattr(getattr(module, "lora_adapters", None), "loras", None):
        raise WanError("the network has LoRA adapters: call unload_lora_weights() before merging")
    parameters = dict(module.named_parameters())
    merge.check(parameters)
    unloaded = [name for name in lora.names if parameters[name].is_meta]
    if unloaded:
        raise WanError(f"LoRA {lora.path}: load the model's weights first: {grouped(unloaded)}")
    for name in lora.names:
        parameters[name].copy_(merge(name, parameters[name]))
    return merge.report


@dataclass(frozen=True)
class LoRAMerge:
    """Merges a LoRA into weights, one parameter at a time: (our name, tensor) -> tensor.

    It is for weights that are being loaded, as in `load_module(..., changes=merge.changes)`;
    `merge_lora` is for loaded modules.

    Raises:
        WanError: strength is not finite.
    """

    lora: LoRA
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength):
            raise WanError(f"LoRA strength={self.strength}: must be a finite number")

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that the LoRA does not fit; they may be on the meta device."""
        check_fit(parameters, self.lora)

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        total = tensor
        if self.strength == 0:
            return tensor
        for change in changes_of(self.lora, name):
            delta = change.delta(tensor.device).reshape(tensor.shape)
            total = total.float() + self.strength * delta
        return total.to(tensor.dtype)

    @property
    def changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Our name of each parameter that the LoRA changes -> the function that merges it."""
        return {name: partial(self, name) for name in self.lora.names}

    @property
    def report(self) -> MergeReport:
        lora = self.lora
        ranks = tuple(sorted({pair.rank for pair in lora.pairs.values()}))
        return MergeReport(
            lora.path, lora.format, self.strength, lora.num_tensors, ranks, tuple(lora.names)
        )


Merges = Mapping[str, LoRAMerge | Sequence[LoRAMerge]]  # network -> what is merged into it


def merge_lists(loras: Merges | None) -> dict[str, list[LoRAMerge]]:
    """Network -> its merges as a list."""
    return {
        part: [merges] if isinstance(merges, LoRAMerge) else list(merges)
        for part, merges in (loras or {}).items()
    }


def all_changes(merges: Sequence[LoRAMerge]) -> dict[str, Callable[[Tensor], Tensor]]:
    """`LoRAMerge.changes` of several LoRAs, one after the other.

    A parameter that is read in float32, as `load_module` does, is rounded once at the end.
    """
    names = dict.fromkeys(name for merge in merges for name in merge.lora.names)
    return {name: partial(merge_all, merges, name) for name in names}


def merge_all(merges: Sequence[LoRAMerge], name: str, tensor: Tensor) -> Tensor:
    for merge in merges:
        tensor = merge(name, tensor)
    return tensor


def changes_of(lora: LoRA, name: str) -> list[LowRank | FullDelta]:
    found: list[LowRank | FullDelta] = []
    if name in lora.pairs:
        found.append(lora.pairs[name])
    if name in lora.deltas:
        found.append(lora.deltas[name])
    return found


def check_fit(parameters: Mapping[str, Tensor], lora: LoRA) -> None:
    missing = [name for name in lora.names if name not in parameters]
    misfits = [
        (name, change.shape, tuple(parameters[name].shape))
        for name in lora.names
        if name in parameters
        for change in changes_of(lora, name)
        if not change.fits(parameters[name].shape)
    ]
    problems = []
    if missing:
        problems.append(f"parameters that this model lacks: {grouped(missing)}")
    if misfits:
        name, theirs, ours = misfits[0]
        problems.append(
            f"other shapes: {grouped(name for name, _, _ in misfits)}; "
            f"for example {name}: LoRA {theirs}, model {ours}"
        )
    if problems:
        problems += [describe_model(parameters, lora)]
        raise WanError(f"LoRA {lora.path}: was made for another model: {'; '.join(problems)}")


def describe_model(parameters: Mapping[str, Tensor], lora: LoRA) -> str:
    """For an error: the size of the model, and of the one that the LoRA was made for."""
    layers = [int(m[1]) for name in lora.names if (m := re.match(r"blocks\.(\d+)\.", name))]
    model_layers = [int(m[1]) for name in parameters if (m := re.match(r"blocks\.(\d+)\.", name))]
    # The outputs of these layers have the width of the model.
    widths = {
        change.shape[0]
        for name in lora.names
        if re.search(r"attention\.\w+\.(weight|bias)$|ffn\.down\.", name)
        for change in changes_of(lora, name)
    }
    model_width = next((p.shape[-1] for n, p in parameters.items() if n == "head.modulation"), None)
    theirs = [f"blocks up to number {max(layers)}"] if layers else []
    for width in sorted(widths):
        theirs.append(f"width {width}" + (f" ({WIDTHS[width]})" if width in WIDTHS else ""))
    return (
        f"the LoRA has {', '.join(theirs) or 'no blocks'}; "
        f"this model has {max(model_layers, default=-1) + 1} blocks of width {model_width}"
    )


# --- training one ---------------------------------------------------------------------------------

# Our names of the layers that get a pair: all attention projections and both FFN layers.
DEFAULT_TARGETS = (
    r"blocks\.\d+\.(self|cross)_attention\.(query|key|value|out)",
    r"blocks\.\d+\.ffn\.(up|down)",
)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear one and nothing more."""
    return type(layer) in (nn.Linear, Linear)


class LoRALinear(Linear):
    """A linear layer with a trainable low-rank pair beside its frozen weight.

    y = W x + b + (alpha / r) * lora_B lora_A x. The pair is kept in float32, which small updates
    need, and multiplied in x's dtype like the weight. `weight` and `bias` keep their names, so that
    checkpoints load and merge as before.
    """

    def __init__(
        self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator | None = None
    ):
        # Built on meta: the weight and the bias are the base's own, not copies.
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.scale = alpha / rank
        down = torch.empty(rank, base.in_features)
        # As in the LoRA paper's code (and peft): B = 0 makes the start a no-op.
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(down.to(base.weight.device))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A.to(x.dtype))
        return super().forward(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"


def add_lora(
    module: nn.Module,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = DEFAULT_TARGETS,
    generator: torch.Generator | None = None,
) -> list[str]:
    """Freeze the module, and give every linear layer named by `targets` a trainable pair.

    Args:
        rank: r, at least 1.
        alpha: the pair is scaled by alpha / r; None means alpha = r.
        targets: regular expressions that match whole names of layers (our names).
        generator: a CPU generator for the starting values.

    Returns:
        The names of the replaced layers, in the module's order.

    Raises:
        WanError: rank or alpha is out of range; or an expression is not valid, matches nothing, or
            matches something else than a plain linear layer.
    """
    if rank < 1:
        raise WanError(f"LoRA rank={rank}: must be at least 1")
    alpha = float(rank) if alpha is None else alpha
    if not (math.isfinite(alpha) and alpha > 0):
        raise WanError(f"LoRA alpha={alpha}: must be a positive number")
    layers = dict(module.named_modules())
    names = [name for target in targets for name in matching(layers, target)]
    chosen = [name for name in layers if name in set(names)]
    for name in chosen:
        if not is_plain(layers[name]):
            kind = type(layers[name]).__name__
            raise WanError(f"LoRA target {name}: is a {kind}, only plain linear layers take a LoRA")
    module.requires_grad_(False)
    for name in chosen:
        layer = layers[name]
        assert isinstance(layer, nn.Linear)
        set_layer(module, name, LoRALinear(layer, rank, alpha, generator))
    return chosen


@torch.no_grad()
def continue_lora(module: nn.Module, lora: LoRA) -> list[str]:
    """Freeze the module, and give every layer that a LoRA file changes the file's pair to train on.

    Each pair has the rank and the scale alpha / r that it has in the file, in float32. Layers that
    the file does not change get none, so that what is saved before the first step is the file.

    Returns:
        The names of the replaced layers, in the module's order.

    Raises:
        WanError: the file was made for another model, or changes something else than the weights
            of plain linear layers by pairs; names what.
    """
    pairs = pairs_to_train(module, lora)
    layers = dict(module.named_modules())
    module.requires_grad_(False)
    chosen = [name for name in layers if name in pairs]
    for name in chosen:
        layer, pair = layers[name], pairs[name]
        assert isinstance(layer, nn.Linear)
        started = LoRALinear(layer, pair.rank, pair.rank)
        started.scale = pair.scale
        started.lora_A.copy_(pair.down.flatten(1))
        started.lora_B.copy_(pair.up.flatten(1))
        set_layer(module, name, started)
    return chosen


def pairs_to_train(module: nn.Module, lora: LoRA) -> dict[str, LowRank]:
    """The pairs of a LoRA file by the names of the module's layers.

    The module may be on the meta device.

    Raises:
        WanError: see `continue_lora`.
    """
    check_fit(dict(module.named_parameters()), lora)
    layers = dict(module.named_modules())
    pairs = {name.removesuffix(".weight"): pair for name, pair in lora.pairs.items()}
    others = [*lora.deltas]
    others += [f"{name}.weight" for name in pairs if not is_plain(layers[name])]
    if others:
        raise WanError(
            f"LoRA {lora.path}: training goes on with pairs of plain linear layers only; it also "
            f"changes {grouped(sorted(others))}; merge it into the model (load_lora_weights, "
            "fuse_lora, save_pretrained) and train a new LoRA on that"
        )
    return pairs


def matching(layers: dict[str, nn.Module], target: str) -> list[str]:
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise WanError(f"LoRA target {target!r}: not a regular expression ({error})") from error
    names = [name for name in layers if pattern.fullmatch(name)]
    if not names:
        some = ", ".join(name for name, layer in layers.items() if isinstance(layer, nn.Linear))
        raise WanError(f"LoRA target {target!r}: matches no layer; the linear layers are {some}")
    return names


def lora_layers(module: nn.Module) -> dict[str, LoRALinear]:
    """The layers with a pair, by name."""
    return {n: layer for n, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def lora_state(module: nn.Module) -> dict[str, Tensor]:
    """The trained tensors alone, by our names: `<layer>.lora_A` (r, in), `<layer>.lora_B` (out, r).

    `module.load_state_dict(state, strict=False)` takes them back.
    """
    state = {}
    for name, layer in lora_layers(module).items():
        state[f"{name}.lora_A"] = layer.lora_A.detach()
        state[f"{name}.lora_B"] = layer.lora_B.detach()
    return state


@torch.no_grad()
def fold_lora(module: nn.Module) -> list[str]:
    """Merge every pair into its weight (float32, rounded once) and make the layers plain again."""
    folded = lora_layers(module)
    for name, layer in folded.items():
        delta = LowRank(layer.lora_A, layer.lora_B, layer.scale).delta(layer.weight.device)
        plain = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight, plain.bias = layer.weight, layer.bias
        plain.weight.copy_(layer.weight.float() + delta)
        set_layer(module, name, plain)
    return list(folded)


def set_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def save_lora(
    path: str | Path,
    module: nn.Module,
    dtype: torch.dtype = torch.float32,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write the trained pairs as a LoRA file in the diffusers format (`transformer.` names).

    alpha / r is multiplied into lora_B, so that the file means the same to readers that know an
    alpha and to those that ignore it. The file appears whole or not at all.

    Args:
        path: a .safetensors file, or a folder that gets `pytorch_lora_weights.safetensors`.
        metadata: strings to keep in the file, such as the base model and the training command.

    Raises:
        WanError: the module has no pairs, or a layer that other readers would not know.
    """
    tensors = file_tensors(lora_state(module), lora_scales(module))
    return write_lora(path, {n: t.to("cpu", dtype) for n, t in tensors.items()}, metadata)


def lora_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The trained pairs under diffusers' names; alpha / r is multiplied into lora_B.

    Raises:
        WanError: the module has no pairs, or a layer that other readers would not know.
    """
    prefix = f"{FILE_PREFIXES['diffusers']}."
    tensors = file_tensors(lora_state(module), lora_scales(module))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def lora_scales(module: nn.Module) -> dict[str, float]:
    """The scale alpha / r of every layer with a pair, by the layer's name."""
    return {name: layer.scale for name, layer in lora_layers(module).items()}


def file_tensors(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The tensors of a LoRA file in the diffusers format; alpha / r is multiplied into lora_B.

    Args:
        state: as `lora_state` gives it.
        scales: alpha / r by the names of layers.
    Raises:
        WanError: there are no pairs, or other readers would not know a layer.
    """
    if not scales:
        raise WanError("no LoRA to save: the model has no LoRA layers (see add_lora)")
    tensors: dict[str, Tensor] = {}
    for name, scale in scales.items():
        up = state[f"{name}.lora_B"].float() * scale
        tensors |= pair_tensors(f"{name}.weight", state[f"{name}.lora_A"], up)
    return tensors


# The prefix of names in a LoRA file; readers tell the layouts apart by it.
FILE_PREFIXES = {"diffusers": "transformer", "official": "diffusion_model"}


def pair_tensors(
    name: str, down: Tensor, up: Tensor, layout: str = "diffusers"
) -> dict[str, Tensor]:
    """A pair under the names of a LoRA file.

    Args:
        name: our name of the weight that the pair changes.
        down, up: (r, in, ...) and (out, r, ...); they include the factor alpha / r.
    Raises:
        WanError: other readers would not know the weight.
    """
    released = released_name("transformer", layout, name).removesuffix(".weight")
    stem = f"{FILE_PREFIXES[layout]}.{released}"
    return {f"{stem}.lora_A.weight": down.contiguous(), f"{stem}.lora_B.weight": up.contiguous()}


def write_lora(
    path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> Path:
    """Write a LoRA file; in a folder it gets the name that diffusers looks for."""
    path = Path(path)
    if path.suffix != ".safetensors":
        path = path / FOLDER_NAMES[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"format": "pt", **(metadata or {})})
    return path

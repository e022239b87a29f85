"""Weight-only quantisation: the large linear layers in 8 bits, all arithmetic as before.

    dit = load_module(build, checkpoint, "transformer", dtype=torch.bfloat16, quantize="int8")

A weight (out, in) becomes 8-bit numbers q and one float32 scale per output channel, w = s q with
s = max|w| / max|q|, symmetric around 0. A layer restores its weight in the dtype of its input just
before the product, one layer at a time, on a CPU a few rows at a time: the weights take half the
memory of bfloat16, the FLOPs stay the same. `int8` rounds to 255 even steps; `fp8` (e4m3: 3 bits of
mantissa) has finer steps near 0 and coarser ones far from it, and is the less exact one on weights
without outliers.

Quantised are the linear layers of the blocks: attention and feed-forward of the DiT and of UMT5,
which hold 98 % of the 5B's and 82 % of UMT5-XXL's parameters. Embeddings, modulation, norms, biases
and the head, and the whole autoencoder, stay as they are.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from wan.errors import WanError
from wan.precision import linear

QUANTIZED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
QUANTIZE = ("none", *QUANTIZED_DTYPES)
# Our names of the weights, in the DiT and in UMT5.
QUANTIZED_WEIGHTS = re.compile(
    r"blocks\.\d+\.(((self|cross)_)?attention\.(query|key|value|out)|ffn\.(gate|up|down))\.weight"
)


def check_quantize(kind: str) -> None:
    if kind not in QUANTIZE:
        raise WanError(f"quantize={kind}: choose {', '.join(QUANTIZE)}")


def is_quantized_weight(name: str) -> bool:
    """True if `quantize` stores the parameter of this name in 8 bits."""
    return QUANTIZED_WEIGHTS.fullmatch(name) is not None


def largest(dtype: torch.dtype) -> float:
    """The largest magnitude of 8-bit numbers that is used: 127 (int8) or 448 (e4m3)."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def quantize_weight(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight (out, in) of any float dtype -> 8-bit (out, in), and scales (out, 1) float32.

    A channel of zeros has scale 0. Rounding is to nearest, halves to even.
    """
    dtype = QUANTIZED_DTYPES[kind]
    scale = weight.float().abs().amax(dim=1, keepdim=True) / largest(dtype)
    steps = weight.float() / scale.where(scale > 0, 1)
    if dtype == torch.int8:
        steps = steps.round_()
    return steps.clamp_(-largest(dtype), largest(dtype)).to(dtype), scale


def restore_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Restore a weight from 8 bits and its scales; computed in float32 and rounded once."""
    # Every int8 and e4m3 number is a bfloat16 number too, so only the product rounds.
    return weight.to(dtype).mul_(scale)


class QuantizedLinear(nn.Module):
    """A linear layer with an 8-bit weight, for inference; the product is in the input's dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weight = torch.empty(out_features, in_features, dtype=QUANTIZED_DTYPES[kind])
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        def restore(part: Tensor, rows: slice) -> Tensor:
            return restore_weight(part, self.scale[rows], x.dtype)

        return linear(x, self.weight, self.bias, restore)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Cast the bias only: a cast would change the values of weight and scale."""

        def without_cast(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if tensor is self.bias or result.dtype == tensor.dtype:
                return result
            return tensor.to(result.device)

        return super()._apply(without_cast, recurse)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, {self.weight.dtype}"


def quantize_layers(module: nn.Module, kind: str) -> None:
    """Replace the linear layers that `is_quantized_weight` names; the new ones have no values."""
    for name, layer in list(module.named_modules()):
        if is_quantized_weight(f"{name}.weight"):
            assert isinstance(layer, nn.Linear), name
            parent, _, leaf = name.rpartition(".")
            sizes = (layer.in_features, layer.out_features, layer.bias is not None)
            with torch.device(layer.weight.device):
                setattr(module.get_submodule(parent), leaf, QuantizedLinear(*sizes, kind))


def quantize_state(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Quantise a state dict to the tensors that a module has after `quantize_layers`."""
    quantized = {}
    for name, tensor in state.items():
        quantized[name] = tensor
        if is_quantized_weight(name):
            scale_name = name.removesuffix("weight") + "scale"
            quantized[name], quantized[scale_name] = quantize_weight(tensor, kind)
    return quantized


@torch.no_grad()
def quantize(module: nn.Module, kind: str) -> None:
    """Quantise a module that is loaded already, in place.

    Raises:
        WanError: the kind is unknown, or the module is quantised already.
    """
    check_quantize(kind)
    refuse_quantized(module, "quantise once, from the original weights")
    if kind != "none":
        state = quantize_state(module.state_dict(), kind)
        quantize_layers(module, kind)
        module.load_state_dict(state, assign=True)
        module.requires_grad_(False)


def quantization_of(module: nn.Module) -> str:
    """The kind of quantisation of a module: one of `QUANTIZE`."""
    kinds = (one.kind for one in module.modules() if isinstance(one, QuantizedLinear))
    return next(kinds, "none")


def refuse_quantized(module: nn.Module, remedy: str) -> None:
    """Raise a WanError if a module is quantised; `remedy` ends its message."""
    if quantization_of(module) != "none":
        raise WanError(f"the weights are quantised: {remedy}")

"""8-bit floating-point weights of files that people have, with or without a scale.

A plain fp8 file holds the weights, rounded. A scaled one, as ComfyUI writes them, holds beside
`x.weight` its scale as `x.scale_weight` or `x.weight_scale`: one number, or one per output channel.
The weight is then their product. It is formed as ComfyUI forms it: both factors in the dtype of the
result, multiplied there, so that the product is rounded once.

    w = q.to(dtype) * scale.to(dtype)

`x.scale_input` and `x.input_scale` are for products in 8 bits; here weights are restored when they
are read, and the products are those of their dtype. Scales per block (MXFP8, NVFP4) and 8-bit
integers are not read.

Source: ComfyUI comfy/utils.py (`convert_old_quants`), comfy-kitchen (`dequantize_per_tensor_fp8`).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from wan.errors import WanError
from wan.files import parse_json
from wan.weights.checkpoint import StoredTensor
from wan.weights.keys import BESIDE, FORMAT, PLAIN_WEIGHTS, SCALED_MARK, SPIECE, WEIGHT_SCALES
from wan.weights.safetensors_file import read_bytes

FP8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype that a stored weight has where no other is asked for.

    8-bit numbers become bfloat16, which holds all of them exactly and is what they are scaled in.
    """
    return torch.bfloat16 if stored in FP8.values() else stored


def restored(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A stored weight in a dtype, times its scale if it has one; no copy if that changes nothing.

    Args:
        weight: (out, ...) as it is stored.
        scale: () or (1,), or (out, 1).
    """
    if scale is None:
        return weight.to(dtype)
    return scale_in_place(weight.to(dtype, copy=True), scale)


def scale_in_place(weight: Tensor, scale: Tensor) -> Tensor:
    """Multiply a weight (out, ...) with its scale, in the weight's dtype."""
    factor = scale.to(weight.device, weight.dtype)
    one = factor.numel() == 1
    shape = () if one else (-1, *[1] * (weight.dim() - 1))
    return weight.mul_(factor.reshape(shape))


def read_small(stored: StoredTensor) -> Tensor:
    """Read a tensor of a few values into memory of its own."""
    tensor = torch.empty(stored.entry.shape, dtype=stored.entry.dtype)
    if tensor.numel():
        with stored.file.open() as file:
            read_bytes(file, tensor, stored.entry.start)
    return tensor


def read_scale(stored: StoredTensor) -> Tensor:
    """Read the scale of a weight.

    Raises:
        WanError: a value is not finite.
    """
    scale = read_small(stored)
    if not bool(scale.isfinite().all()):
        raise WanError(
            f"{stored.file.path}: tensor {stored.name} is not finite; the file is damaged"
        )
    return scale


def with_scales(
    tensors: Mapping[str, StoredTensor], beside: Mapping[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Give each weight its scale, and account for every tensor beside the weights.

    Args:
        tensors: the parameters of a file, by their names there.
        beside: all other tensors, for which `wan.weights.keys.stands_beside` is true.

    Returns:
        The parameters, some with a scale; and the names in `beside` that belong to none of them.

    Raises:
        WanError: a weight is stored in a format that is not read here.
    """
    found = dict(tensors)
    lost = []
    for name, stored in beside.items():
        stem, _, kind = name.rpartition(".")
        if kind in (SCALED_MARK, SPIECE):
            continue
        weight = found.get(f"{stem}.weight" if stem else "weight")
        if weight is None or (kind in WEIGHT_SCALES and weight.scale is not None):
            lost.append(name)
        elif kind in WEIGHT_SCALES:
            check_scale(weight, stored)
            found[weight.name] = StoredTensor(weight.name, weight.file, weight.entry, stored)
        elif kind == FORMAT:
            check_format(stored)
        assert kind in BESIDE
    return found, lost


def check_scale(weight: StoredTensor, scale: StoredTensor) -> None:
    """Refuse a scale that is neither one number nor one per output channel."""
    shape, out = scale.entry.shape, weight.entry.shape[:1]
    number = weight.entry.dtype.is_floating_point
    if scale.entry.dtype in SCALE_DTYPES and number and shape in ((), (1,), (1, 1), (*out, 1)):
        return
    raise WanError(
        f"{weight.file.path}: a quantised checkpoint: {weight.name} is {weight.entry.dtype} of "
        f"shape {weight.entry.shape}, with a scale of shape {shape}; read are fp8 weights with one "
        f"scale, or one per output channel. Use {PLAIN_WEIGHTS}".replace("torch.", "")
    )


def check_format(stored: StoredTensor) -> None:
    """Refuse a weight whose JSON beside it names another format than fp8."""
    try:
        values = parse_json(bytes(read_small(stored).tolist()), stored.name)
        kind = values["format"]
    except (ValueError, KeyError) as error:
        raise WanError(f"{stored.file.path}: {stored.name} is not JSON with a format") from error
    if kind not in FP8:
        raise WanError(
            f"{stored.file.path}: a quantised checkpoint: {stored.name} names the format {kind}; "
            f"read are {' and '.join(FP8)}. Use {PLAIN_WEIGHTS}"
        )

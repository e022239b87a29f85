"""The arguments of `from_pretrained`, of pipelines and of single networks, under diffusers' names.

Every argument is used, or refused with what to write instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from wan.errors import WanError, check_names
from wan.lora.merge import Merges
from wan.models.attention import AttentionChoice
from wan.pipeline.inputs import OnProgress
from wan.precision import default_dtype
from wan.runtime.offload import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Dtype = torch.dtype | str


class FromModel(Enum):
    """The value of a part that is neither given nor None: it is loaded from the model's folder."""

    FROM_MODEL = "the part of the model's folder"


FROM_MODEL = FromModel.FROM_MODEL


class FileArguments(TypedDict, total=False):
    """Which files are read, and where from.

    Attributes:
        revision: branch, tag or commit of a hub id.
        variant: reads `<name>.<variant>.safetensors`, such as "fp16".
        cache_dir, token, force_download: of the hub's download.
        local_files_only, offline: two names for one thing: use the cache, not the network.
        use_safetensors: None or True; False asks for pickles, which are refused.
    """

    revision: str | None
    variant: str | None
    cache_dir: str | Path | None
    token: str | bool | None
    force_download: bool
    local_files_only: bool
    offline: bool
    use_safetensors: bool | None


class PartArguments(FileArguments, total=False):
    """Arguments of `from_pretrained` of one network.

    Attributes:
        dtype, torch_dtype: two names for one thing: float32 or bfloat16, as a dtype or its name;
            for a pipeline also a mapping from parts to dtypes, with "default" for the others. None
            or "auto" is bfloat16 on a CUDA device, else float32. Parameters that a network's
            `FLOAT32_PARAMETERS` names stay float32.
        device, device_map: two names for one thing: the device that computes, also as {"": device}.
            "balanced" and others spread parts over devices, which is refused: use `offload`.
        low_cpu_mem_usage: True or None. Loading always fills the network as files are read.
        quantize: "none", "int8" or "fp8" weights; see `wan.weights.quantize`.
    """

    dtype: Dtype | Mapping[str, Dtype] | None
    torch_dtype: Dtype | Mapping[str, Dtype] | None
    device: str | torch.device | None
    device_map: str | torch.device | Mapping[str, str | int | torch.device] | None
    low_cpu_mem_usage: bool | None
    quantize: str


class LoadingArguments(PartArguments, total=False):
    """Arguments of `from_pretrained` of a pipeline, besides its parts.

    Attributes:
        boundary_ratio, expand_timesteps: in place of what model_index.json says.
        attention: see `WanPipeline.set_attention`.
        offload, compile, safety_checker: see `WanPipeline`.
        loras: "transformer" or "transformer_2" -> the LoRA, or several, merged into it while it is
            read, before it is quantised.
        on_progress: called as ("load", parts loaded, number of parts).
    """

    boundary_ratio: float | None
    expand_timesteps: bool
    attention: AttentionChoice
    offload: str
    compile: str
    loras: Merges | None
    safety_checker: Callable[[Tensor], bool] | None
    on_progress: OnProgress | None


@dataclass(frozen=True)
class Placement:
    """The device that computes, and the dtype of each part's weights."""

    device: torch.device
    default: torch.dtype
    by_part: Mapping[str, torch.dtype]

    def dtype(self, part: str) -> torch.dtype:
        return self.by_part.get(part, self.default)


REFUSED = {
    "quantization_config": 'quantize="int8" or quantize="fp8"',
    "custom_pipeline": "a function of your own that calls the pipeline's stages",
    "max_memory": 'offload="stage" or offload="block"',
    "offload_folder": 'offload="stage" or offload="block"',
    "offload_state_dict": 'offload="stage" or offload="block"',
    "from_flax": "weights in safetensors files",
    "ignore_mismatched_sizes": "weights of this network's sizes",
    "feature_extractor": "safety_checker=, a function",
}


def check_arguments(given: Mapping[str, Any], allowed: type) -> None:
    """Refuse arguments that are not in a TypedDict, and values that ask for something else.

    Raises:
        WanError: names the argument and what to write instead.
    """
    for name, remedy in REFUSED.items():
        if given.get(name) is not None:
            raise WanError(f"from_pretrained({name}=..) is not supported here: use {remedy}")
    check_names(
        "from_pretrained", sorted(given.keys() - REFUSED.keys()), sorted(allowed.__annotations__)
    )
    if given.get("use_safetensors") is False:
        raise WanError("use_safetensors=False: only safetensors files are read, pickles are not")
    if given.get("low_cpu_mem_usage") is False:
        raise WanError(
            "low_cpu_mem_usage=False: weights are always filled in as their files are read; leave "
            "it out"
        )


def file_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The `FileArguments` that were given, under the names of `wan.weights.hub.resolve_model`."""
    offline = bool(given.get("local_files_only") or given.get("offline"))
    names = ("revision", "variant", "cache_dir", "token", "force_download")
    options = {name: given[name] for name in names if given.get(name)}
    return options | ({"offline": True} if offline else {})


def placement(given: Mapping[str, Any], parts: Sequence[str]) -> Placement:
    """The device and the dtypes that the arguments ask for.

    Raises:
        WanError: two names for one thing disagree, or a device or dtype is not known.
    """
    device = resolve_device(one_device(one_of(given, "device", "device_map")))
    wanted = one_of(given, "dtype", "torch_dtype")
    if not isinstance(wanted, Mapping):
        return Placement(device, known_dtype(wanted, device), {})
    check_names("dtype", list(wanted), ["default", *parts])
    dtypes = {part: known_dtype(dtype, device) for part, dtype in wanted.items()}
    return Placement(device, dtypes.pop("default", known_dtype(None, device)), dtypes)


def one_of(given: Mapping[str, Any], first: str, second: str) -> Any:
    """The value of an argument that has two names."""
    values = {name: given[name] for name in (first, second) if given.get(name) is not None}
    if len(values) == 2 and values[first] != values[second]:
        raise WanError(
            f"{first}={values[first]} and {second}={values[second]} mean one thing: give one"
        )
    return next(iter(values.values()), None)


def one_device(device_map: Any) -> Any:
    """The device of a device map, which may be the device itself; None is the CPU.

    Raises:
        WanError: it spreads the parts over several devices.
    """
    device = device_map
    if isinstance(device, Mapping) and set(device) == {""}:
        device = device[""]
        device = f"cuda:{device}" if isinstance(device, int) else device
    spread = ("balanced", "balanced_low_0", "sequential")
    if isinstance(device, Mapping) or device in spread:
        raise WanError(
            f"device_map={device!r} spreads the parts over devices, which is not "
            'supported: give one device, such as "cuda", and offload="stage" or "block" if it is '
            "too small"
        )
    return device or "cpu"


def known_dtype(dtype: Any, device: torch.device) -> torch.dtype:
    """A dtype by itself or by its name; None and "auto" are `default_dtype` of the device.

    Raises:
        WanError: neither float32 nor bfloat16.
    """
    if dtype is None or dtype == "auto":
        return default_dtype(device)
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        narrow = str(found).removeprefix("torch.") in ("float16", "half")
        why = " (float16 is too narrow for the text encoder)" if narrow else ""
        raise WanError(f"dtype={dtype}: choose torch.bfloat16 or torch.float32{why}")
    return cast(torch.dtype, found)

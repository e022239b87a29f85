"""Networks from a released folder, and back into one."""

import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wan.errors import WanError, check_names
from wan.lora.merge import LoRAMerge
from wan.models.attention import AttentionChoice, network_attention
from wan.models.dit import WanDiT
from wan.models.umt5 import UMT5Encoder
from wan.models.vae import WanVAE
from wan.pipeline.config import PipelineConfig, part_folder, write_configs
from wan.pipeline.inputs import OnProgress, report
from wan.weights.checkpoint import open_checkpoint
from wan.weights.keys import VAELevels
from wan.weights.load import build_on_meta, load_module, save_component

QUANTIZED_PARTS = ("transformer", "transformer_2", "text_encoder")


def module_builders(
    config: PipelineConfig, attention: AttentionChoice = "sdpa"
) -> dict[str, Callable[[], nn.Module]]:
    """What makes each part, by the name of its folder."""
    return {
        "transformer": lambda: WanDiT(config.transformer, attention),
        "transformer_2": lambda: WanDiT(config.transformer, attention),
        "vae": lambda: WanVAE(config.vae),
        "text_encoder": lambda: UMT5Encoder(config.text_encoder),
    }


def load_modules(
    folder: Path,
    config: PipelineConfig,
    overrides: Mapping[str, Path],
    *,
    dtype: torch.dtype,
    device: torch.device,
    attention: AttentionChoice,
    quantize: str = "none",
    loras: Mapping[str, LoRAMerge] | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Every network of a pipeline, in evaluation mode, by the name of its folder.

    Args:
        overrides: part -> a file or folder to take instead of the folder's own.
        quantize: of the parts in `QUANTIZED_PARTS`; see `wan.weights.quantize`.
        loras: part -> what is merged into it before it is quantised.

    Raises:
        WanError: weights that are missing, damaged or of another model; a LoRA of another model.
    """
    loras = loras or {}
    chosen = str(network_attention(attention, config.transformer.num_layers).config)
    warn_of_attention(folder, config.defaults.attention, chosen)
    for merge in loras.values():
        warn_of_attention(merge.lora.path, merge.lora.attention, chosen)
    builders = module_builders(config, attention)
    check_names("loras", list(loras), [part for part in builders if part in config.components])
    for part, merge in loras.items():
        merge.check(dict(build_on_meta(builders[part]).named_parameters()))
    modules = {}
    for done, part in enumerate(config.components):
        report(on_progress, "load", done, len(config.components))
        checkpoint = open_checkpoint(overrides.get(part) or part_folder(folder, part))
        module = load_module(
            builders[part],
            checkpoint,
            weight_kind(part),
            dtype=dtype,
            device=device,
            quantize=quantize if part in QUANTIZED_PARTS else "none",
            changes=loras[part].changes if part in loras else None,
        )
        modules[part] = module.eval()
    report(on_progress, "load", len(config.components), len(config.components))
    return modules


def warn_of_attention(path: Path | str, trained: str | None, chosen: str) -> None:
    """A network that was trained with sparse attention is another one with full attention."""
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
    modules: Mapping[str, nn.Module],
    tokenizer_folder: Path | None,
) -> None:
    """Write the released layout, beside its place first and renamed at the end.

    Raises:
        WanError: the folder holds something already, or the tokenizer's files are unknown.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise WanError(f"{folder}: exists already; choose a new folder")
    if tokenizer_folder is None:
        raise WanError("saving copies the tokenizer's files: give the pipeline tokenizer_folder")
    beside = folder.with_name(f".{folder.name}.tmp")
    if beside.exists():
        shutil.rmtree(beside)
    write_configs(config, beside)
    shutil.copytree(tokenizer_folder, beside / "tokenizer")
    levels = VAELevels(config.vae.is_residual, config.vae.num_res_blocks)
    for part, module in modules.items():
        kind = weight_kind(part)
        save_component(
            module.state_dict(),
            beside / part,
            kind,
            vae_levels=levels if kind == "vae" else None,
        )
    if folder.exists():
        folder.rmdir()
    beside.rename(folder)


def weight_kind(part: str) -> str:
    """The name under which `wan.weights.keys` knows the tensors of a folder."""
    return "transformer" if part == "transformer_2" else part

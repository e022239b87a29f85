"""The published files of TAEHV, the tiny decoder, as our module.

A file holds the encoder too, which is left alone. The names of the decoder's tensors count through
one list of layers; the table here was written by hand. Source: github.com/madebyollin/taehv.
"""

from pathlib import Path

import torch

from wan.errors import WanError
from wan.files import expanded
from wan.models.latent_rgb import latent_space
from wan.models.taehv import KINDS, TinyDecoder, TinyKind
from wan.models.vae_config import VAEConfig
from wan.weights.checkpoint import StoredTensor
from wan.weights.load import WEIGHT_DTYPES, build_on_meta
from wan.weights.names import grouped
from wan.weights.safetensors_file import SafetensorsFile, read_header
from wan.weights.tensor_reader import read_tensors

# Layers before a stage's own, and its own: three blocks, doubling (no tensors), growing, the end.
FIRST_STAGE, STAGE_LAYERS = 3, 6


def published_name(name: str) -> str:
    """The name in published files of one of our parameters, such as stages.0.grow.weight."""
    *parts, leaf = name.split(".")
    if parts[0] != "stages":
        return f"decoder.{ {'conv_in': 1, 'conv_out': 22}[parts[0]] }.{leaf}"
    first = FIRST_STAGE + STAGE_LAYERS * int(parts[1])
    if parts[2] == "blocks":
        layer = {"conv_1": 0, "conv_2": 2, "conv_3": 4}[parts[4]]
        return f"decoder.{first + int(parts[3])}.conv.{layer}.{leaf}"
    return (
        f"decoder.{first + 4}.conv.{leaf}" if parts[2] == "grow" else f"decoder.{first + 5}.{leaf}"
    )


def open_tiny_decoder(path: str | Path) -> tuple[TinyKind, SafetensorsFile]:
    """Which published decoder a file holds, from its header; no tensor is read.

    Raises:
        WanError: no safetensors file, or not one of these decoders; lists what does not fit.
    """
    file = read_header(expanded(path))
    known = ", ".join(f"{kind.name}.safetensors" for kind in KINDS)
    entry = file.tensors.get(published_name("conv_in.weight"))
    shape = None if entry is None else entry.shape
    kind = next((k for k in KINDS if shape is not None and shape[1:2] == (k.channels,)), None)
    if kind is None:
        raise WanError(
            f"{file.path}: not a tiny decoder of Wan's latents; those of TAEHV are {known} "
            "(github.com/madebyollin/taehv, folder safetensors)"
        )
    wanted = build_on_meta(lambda: TinyDecoder(kind)).state_dict()
    names = {published_name(name): tuple(tensor.shape) for name, tensor in wanted.items()}
    found = {name: e for name, e in file.tensors.items() if not name.startswith("encoder.")}
    problems = [
        *(f"missing: {grouped([n])}" for n in names if n not in found),
        *(f"unexpected: {grouped([n])}" for n in found if n not in names),
        *(
            f"{n} has {e.shape}, not {names[n]}"
            for n, e in found.items()
            if n in names and e.shape != names[n]
        ),
        *(f"{n} is {e.dtype}" for n, e in found.items() if e.dtype not in WEIGHT_DTYPES),
    ]
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise WanError(
            f"{file.path}: not the layers of {known}: {'; '.join(problems[:3])}{more}. Larger "
            "variants (super, wide) are not supported"
        )
    return kind, file


def load_tiny_decoder(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TinyDecoder:
    """Load taew2_1.safetensors or taew2_2.safetensors, for previews or as a pipeline's decoder.

    Its videos resemble those of the VAE and are not the same.

    Raises:
        WanError: see `open_tiny_decoder`; or weights are not finite.
    """
    kind, file = open_tiny_decoder(path)
    decoder = build_on_meta(lambda: TinyDecoder(kind))
    names = {name: published_name(name) for name in decoder.state_dict()}
    stored = {ours: StoredTensor(n, file, file.tensors[n]) for ours, n in names.items()}
    state, _, _ = read_tensors(
        stored,
        dict.fromkeys(stored, dtype),
        torch.device(device),
        threads=1,
        check_finite=True,
        share_mapping=False,
    )
    decoder.load_state_dict(state, assign=True)
    return decoder.eval().requires_grad_(False)


def check_fits_latents(kind: TinyKind, vae: VAEConfig) -> None:
    """Refuse a decoder that was made for the latents of another autoencoder.

    Raises:
        WanError: names both, and the file that fits if there is one.
    """
    space = latent_space(vae)
    name = "an autoencoder that is not known here" if space is None else space.name
    if name == kind.latents:
        return
    fitting = [f"{k.name}.safetensors" for k in KINDS if k.latents == name]
    remedy = f"use {fitting[0]}" if fitting else "there is none for this one: leave it out"
    raise WanError(
        f"{kind.name} decodes the latents of {kind.latents}, and this model's are those of {name}: "
        f"{remedy}"
    )

"""The same video by the networks of diffusers and transformers, one network in memory at a time.

Text encoder, transformer and autoencoder are theirs, loaded by them from the same files. Noise and
solver are ours: `infer.parity` holds the solvers against theirs.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.rerun import RerunConfig
from infer.diff.records import read_record
from infer.parity.models import Sides, reference
from infer.parity.tolerance import compare
from infer.rerun.request import job_of
from infer.sample.request import Request, resolve_request
from wan.files import write_json
from wan.models.attention import network_attention
from wan.pipeline.folder import ModelFolder, load_part
from wan.sampling.denoiser import guide
from wan.sampling.noise import draw_noise, sample_generators
from wan.sampling.samplers import sample
from wan.weights.checkpoint import open_checkpoint

BF16, F32 = torch.bfloat16, torch.float32
# Relative rms of two results that round in different places, by how our weights are kept; theirs
# are in bfloat16 unless ours are in float32. From the measurements on the page of `infer`.
TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "int8": 1e-1, "fp8": 2e-1}


def make_reference(folder: Path, record_path: Path, dtype_name: str, out: Path) -> None:
    """Make the video of a record again with the references, and compare; to run in a new process.

    Args:
        folder: the model.
        dtype_name: a key of `TOLERANCES`.
        out: the JSON file that gets "begun" and "seconds" of each stage, and "rows".
    """
    for library in ("diffusers", "transformers"):
        reference(library)  # imports it, which belongs to no stage
    dtype = F32 if dtype_name == "float32" else BF16
    record = read_record(str(record_path))
    model = ModelFolder.read(folder)
    job = job_of(record, RerunConfig(record=str(record_path), checkpoint=str(folder)))
    attention = network_attention("sdpa", model.config.transformer.num_layers)
    request = resolve_request(job, model.config, attention, "cpu", dtype_name)
    sides = Sides("reference", folder, model.config.components, dtype)
    about: dict[str, Any] = {"begun": {}, "seconds": {}}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        about["begun"][name], started = time.time(), time.perf_counter()
        yield
        about["seconds"][name] = time.perf_counter() - started

    with torch.no_grad():
        with stage("encode_text"):
            contexts = encode(sides, model, request)
        with stage("denoise"):
            latents = denoise(sides, request, contexts)
        ours = open_checkpoint(record.latents).map()["latents"]
        with stage("decode"):
            pixels = decode(sides, latents)
        own_pixels = load_part(folder, "vae", dtype=dtype).decode_normalized(ours).float()
    tolerance = TOLERANCES[dtype_name]
    about["rows"] = [
        vars(compare("sampling", "latents", ours, latents, tolerance)),
        vars(compare("sampling", "pixels", own_pixels, pixels, tolerance)),
    ]
    write_json(out, about)


def encode(sides: Sides, model: ModelFolder, request: Request) -> list[Tensor]:
    """The prompt and, with guidance, the negative prompt: (1, S, text_dim) each."""
    encoder, length = sides.theirs("text_encoder"), request.max_sequence_length
    texts = [request.prompt]
    if request.plan.guided:
        texts.append(request.config.negative_prompt or "")
    contexts = []
    for text in texts:
        ids = torch.tensor([model.tokenizer(request.clean(text), length).ids])
        context = encoder(ids, torch.ones_like(ids)).last_hidden_state
        contexts.append(F.pad(context, (0, 0, 0, length - context.shape[1])))
    return contexts


def denoise(sides: Sides, request: Request, contexts: list[Tensor]) -> Tensor:
    """Latents (1, C, T, h, w), float32."""
    network, plan = sides.theirs("transformer"), request.plan
    generators = sample_generators(request.config.seed, 1)

    def velocity(x: Tensor, timestep: float) -> Tensor:
        level = torch.tensor([timestep])
        both = [
            network(x.to(sides.dtype), level, context, return_dict=False)[0].float()
            for context in contexts
        ]
        return both[0] if len(both) == 1 else guide(both[0], both[1], plan.guidance_scale)

    def noise(step: int = 0) -> Tensor:
        return draw_noise(request.latent_shape, generators, request.config.frame_first_noise)

    return sample(velocity, noise(), plan.stepper(noise))


def decode(sides: Sides, latents: Tensor) -> Tensor:
    """Pixels (1, 3, F, H, W) in [-1, 1], float32.

    Their autoencoder runs in float32, as their examples do: in bfloat16 a CPU without AVX-512 takes
    hours for the 5B's.
    """
    network = sides.theirs("vae", F32)
    config = network.config
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return network.decode(latents * std + mean, return_dict=False)[0].clamp(-1, 1)

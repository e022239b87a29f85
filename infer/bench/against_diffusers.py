"""Beside diffusers and transformers: what is timed, and what is checked before a GPU is timed."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.benchmark import BenchConfig
from infer.bench.stages import StageSize
from infer.bench.timing import CPU, Contest, Task, named
from infer.parity.models import Sides, random_part
from infer.parity.tolerance import Row, compare_to_truth
from infer.parity.with_weights import rounded
from wan.errors import WanError
from wan.models.attention import ATTENTION, BACKENDS
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import encode_text
from wan.pipeline.config import part_folder
from wan.pipeline.pipeline import WanPipeline
from wan.runtime.costs import decode_work, encode_work, network_work, text_work

BLOCK_LATENTS = (48, 5, 16, 16)  # 320 tokens
TEXT_LENGTH = 512  # tokens, padding included
# The dtypes that each target has its aim for; the others are timed in float32.
STATED = {
    "encode": ("float32", "bfloat16"),
    "decode": ("float32", "bfloat16"),
    "block": ("bfloat16",),
}
Run = Callable[[], Tensor]


def contests(target: str, sides: Sides, config: BenchConfig) -> Iterator[Contest]:
    """A target's contests, each made when it is asked for: the one before may be forgotten."""
    for name in config.dtypes or STATED.get(target, ("float32",)):
        task, ours, theirs = CONTESTS[target](replace(sides, dtype=getattr(torch, name)), config)
        task = replace(task, target=target, what=named(task.what, getattr(torch, name)))
        yield Contest(task, {"ours": ours, "reference": theirs})


def prompt_of(tokenizer: Tokenizer, num_tokens: int) -> str:
    """A prompt of so many tokens."""
    words: list[str] = []
    while len(tokenizer(" ".join(words), num_tokens + 1).ids) < num_tokens:
        words.append("red" if len(words) % 2 else "a")
    prompt = " ".join(words)
    if len(tokenizer(prompt, num_tokens + 1).ids) != num_tokens:
        raise WanError(f"prompt_tokens={num_tokens}: no such prompt; try {num_tokens + 1}")
    return prompt


def drawn(config: BenchConfig, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(config.seed))


def text(sides: Sides, config: BenchConfig) -> tuple[Task, Run, Run]:
    """Prompt to context. The reference encodes all positions, then zeroes those after the end."""
    ours, theirs = sides.ours("text_encoder"), sides.theirs("text_encoder")
    tokenizer = Tokenizer.from_folder(part_folder(sides.folder, "tokenizer"))
    their_tokenizer = sides.their_tokenizer()
    length = sides.config.defaults.max_sequence_length
    prompt = prompt_of(tokenizer, config.prompt_tokens)

    def run_theirs() -> Tensor:
        batch = their_tokenizer(
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        hidden = theirs(batch.input_ids, batch.attention_mask).last_hidden_state
        return hidden * batch.attention_mask.unsqueeze(-1)

    flops = text_work(ours.config, config.prompt_tokens)
    task = Task("", f"{config.prompt_tokens} tokens of {length}", goal=10, flops=flops)
    return task, lambda: encode_text(ours, tokenizer, [prompt], length), run_theirs


def video_size(sides: Sides, config: BenchConfig) -> tuple[int, int, int]:
    """Frames, height and width: those of the settings, or the model's own."""
    names = ("num_frames", "height", "width")
    own = sides.config.defaults
    frames, height, width = (getattr(config, name) or getattr(own, name) for name in names)
    return frames, height, width


def vae_task(sides: Sides, size: tuple[int, int, int], flops: float) -> Task:
    goal = 3 if sides.dtype == torch.float32 else 1.5
    return Task("", "x".join(map(str, size)), goal=goal, memory_goal=1, flops=flops)


def encode(sides: Sides, config: BenchConfig) -> tuple[Task, Run, Run]:
    """Pixels to latents, all weights of both sides in the dtype of `sides`."""
    # Loading keeps our encoder in float32; here it is cast, as the reference is.
    ours, theirs = sides.ours("vae").to(sides.dtype), sides.theirs("vae")
    size = video_size(sides, config)
    video = drawn(config, 1, 3, *size).clamp(-1, 1)
    cast, (mean, std) = video.to(sides.dtype), ours.latent_statistics(CPU)

    def run_theirs() -> Tensor:
        return (theirs.encode(cast).latent_dist.mode().float() - mean) / std

    task = vae_task(sides, size, encode_work(ours.config, *size))
    return task, lambda: ours.encode_normalized(video), run_theirs


def decode(sides: Sides, config: BenchConfig) -> tuple[Task, Run, Run]:
    """Latents to pixels."""
    ours, theirs = sides.ours("vae"), sides.theirs("vae")
    frames, height, width = video_size(sides, config)
    shape = sides.config.latent_shape(height, width, frames)
    latents, (mean, std) = drawn(config, 1, *shape), ours.latent_statistics(CPU)

    def run_theirs() -> Tensor:
        return theirs.decode((latents * std + mean).to(sides.dtype), return_dict=False)[0]

    task = vae_task(sides, (frames, height, width), decode_work(ours.config, *shape[1:]))
    return task, lambda: ours.decode_normalized(latents), run_theirs


def dit(sides: Sides, config: BenchConfig) -> tuple[Task, Run, Run]:
    """One velocity of a video whose prompt has been prepared, as sampling prepares it once."""
    frames, height, width = video_size(sides, config)
    latents = drawn(config, 1, *sides.config.latent_shape(height, width, frames))
    return velocity(sides, latents, sides.config.defaults.max_sequence_length, config, goal=1.5)


def block(sides: Sides, config: BenchConfig) -> tuple[Task, Run, Run]:
    """One block with embedders and head; `sides` holds nothing else."""
    return velocity(sides, drawn(config, 1, *BLOCK_LATENTS), TEXT_LENGTH, config, goal=1.1)


def velocity(
    sides: Sides, latents: Tensor, text_length: int, config: BenchConfig, goal: float
) -> tuple[Task, Run, Run]:
    ours, theirs = sides.ours("transformer"), sides.theirs("transformer")
    ours.set_attention(config.attention)
    context = drawn(config, 1, text_length, ours.config.text_dim)
    context[:, config.prompt_tokens :] = 0
    prepared = ours.prepare_context(context, min(config.prompt_tokens, text_length))
    timestep = torch.tensor([700.0])
    arguments = (latents.to(sides.dtype), timestep, context.to(sides.dtype))
    tokens = latents[0, 0].numel() // 4
    flops = network_work(ours.config, tokens, text_length).forward
    task = Task("", f"{ours.config.width} wide, {tokens} tokens", goal=goal, flops=flops)
    return (
        task,
        lambda: ours(latents, timestep, prepared),
        lambda: theirs(*arguments, return_dict=False)[0],
    )


def pipeline(sides: Sides, config: BenchConfig) -> tuple[Task, Run, Run]:
    """Prompt to pixels, a new prompt in every call: neither side may remember the last one."""
    ours = WanPipeline.from_pretrained(
        sides.folder,
        dtype=sides.dtype,
        attention=config.attention,
        transformer=sides.folder / "transformer",
    )
    frames, height, width = video_size(sides, config)
    settings = {
        "latents": drawn(config, 1, *sides.config.latent_shape(height, width, frames)),
        "height": height,
        "width": width,
        "num_frames": frames,
        "num_inference_steps": config.steps,
        "guidance_scale": 1.0,
        "max_sequence_length": sides.config.defaults.max_sequence_length,
        "output_type": "np",
    }
    prompt = prompt_of(ours.tokenizer, config.prompt_tokens)

    def video_maker(pipe: Any) -> Run:
        numbers = itertools.count(1)
        return lambda: torch.from_numpy(pipe(prompt=f"{prompt} {next(numbers)}", **settings).frames)

    task = Task("", f"{config.steps} steps, {frames}x{height}x{width}", goal=2)
    return task, video_maker(ours), video_maker(sides.their_pipeline())


CONTESTS = {
    "text": text,
    "encode": encode,
    "decode": decode,
    "dit": dit,
    "block": block,
    "pipeline": pipeline,
}


def block_sides(folder: Path, heads: int, seed: int) -> Sides:
    """One block of the 5B's shape, `heads` heads wide, with random weights."""
    config = DiTConfig(num_attention_heads=heads, ffn_dim=14336 * heads // 24, num_layers=1)
    return random_part(folder, config, seed)


# --- parity on the device of the stages -----------------------------------------------------------

# A kernel may be wrong on both sides (bfloat16 convolutions of cuDNN 9.8 to 9.10 were): beyond this
# relative rms nothing passes. Random weights leave about 1e-2.
MOST_OF_BFLOAT16 = 5e-2
SMALL_LATENTS = (3, 4, 4)


def parity_rows(
    size: StageSize, device: torch.device, config: BenchConfig, scratch: Path
) -> Iterator[Row]:
    """bfloat16 on `device`: one block of full width, four narrow ones, the decoder.

    Held against diffusers in bfloat16 on the same device, with diffusers in float32 on the CPU as
    the truth for both, as in `infer.parity`.
    """
    attention = exact_name(config)
    wide = replace(size.transformer, num_layers=1)
    narrow = replace(wide, num_attention_heads=2, ffn_dim=512, num_layers=4)
    for name, sizes in (("wide", wide), ("narrow", narrow)):
        sides = random_part(scratch / name, sizes, config.seed)
        what = f"{sizes.num_layers} of {sizes.width} channels, attention {attention}"
        yield held("blocks", what, *velocities(sides, attention, device, config))
    sides = random_part(scratch / "vae", size.vae, config.seed)
    yield held("decode", f"{SMALL_LATENTS} latents", *clips(sides, device, config))


def exact_name(config: BenchConfig) -> str:
    """The chosen attention if it is exact, else the exact one that replaces it where it must."""
    name = config.attention.name
    return name if name in {*ATTENTION, *BACKENDS} - {"sage"} else config.attention.exact


def held(rung: str, what: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> Row:
    row = compare_to_truth(rung, what, ours, theirs, truth)
    return replace(row, tolerance=min(row.tolerance, MOST_OF_BFLOAT16))


def references(
    sides: Sides,
    part: str,
    device: torch.device,
    run: Callable[[Any, torch.device, torch.dtype], Tensor],
) -> Iterator[Tensor]:
    """The reference's result in bfloat16 on `device`, then in float32 on the CPU, which is true."""
    for where, dtype in ((device, torch.bfloat16), (CPU, torch.float32)):
        yield run(sides.theirs(part, dtype).to(where), where, dtype).float().cpu()


def velocities(
    sides: Sides, attention: str, device: torch.device, config: BenchConfig
) -> tuple[Tensor, ...]:
    """Ours, the reference's and the true velocity: (B, C, T, h, w) on the CPU."""
    ours = replace(sides, dtype=torch.bfloat16).ours("transformer").to(device)
    ours.set_attention(attention)
    latents = rounded(drawn(config, 1, ours.config.in_channels, *BLOCK_LATENTS[1:]))
    context = rounded(drawn(config, 1, TEXT_LENGTH, ours.config.text_dim))
    num_tokens = min(config.prompt_tokens, TEXT_LENGTH)
    context[:, num_tokens:] = 0
    timestep = torch.tensor([700.0])

    def theirs(model: Any, where: torch.device, dtype: torch.dtype) -> Tensor:
        arguments = (latents.to(where, dtype), timestep.to(where), context.to(where, dtype))
        return model(*arguments, return_dict=False)[0]

    prepared = ours.prepare_context(context.to(device, torch.bfloat16), num_tokens)
    found = ours(latents.to(device), timestep.to(device), prepared).cpu()
    return found, *references(sides, "transformer", device, theirs)


def clips(sides: Sides, device: torch.device, config: BenchConfig) -> tuple[Tensor, ...]:
    """Our decoded clip, the reference's and the true one: (B, 3, F, H, W) on the CPU."""
    ours = replace(sides, dtype=torch.bfloat16).ours("vae").to(device)
    latents = rounded(drawn(config, 1, ours.config.z_dim, *SMALL_LATENTS))
    mean, std = ours.latent_statistics(CPU)

    def theirs(model: Any, where: torch.device, dtype: torch.dtype) -> Tensor:
        return model.decode((latents * std + mean).to(where, dtype), return_dict=False)[0]

    found = ours.decode_normalized(latents.to(device)).float().cpu()
    return found, *references(sides, "vae", device, theirs)

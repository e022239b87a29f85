"""Beside diffusers and transformers: what is timed, and what is checked before a GPU is timed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.benchmark import BenchConfig
from infer.bench.stages import StageSize
from infer.bench.timing import Contest, named
from infer.parity.models import Sides, randomise, write_config
from infer.parity.tolerance import Row, compare_to_truth
from infer.parity.with_weights import rounded
from wan.errors import WanError
from wan.models.attention import ATTENTION, BACKENDS
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import encode_text
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import part_folder
from wan.pipeline.pipeline import WanPipeline
from wan.runtime.costs import decode_work, encode_work, network_work, text_work
from wan.weights.keys import VAELevels
from wan.weights.save import save_component

CPU = torch.device("cpu")
BLOCK_LATENTS = (48, 5, 16, 16)  # 320 tokens
OURS, THEIRS = "ours", "reference"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATED = {
    "encode": ("float32", "bfloat16"),
    "decode": ("float32", "bfloat16"),
    "block": ("bfloat16",),
}


def contests(target: str, sides: Sides, config: BenchConfig) -> Iterator[Contest]:
    """A target's contests, each made when it is asked for: the one before may be forgotten."""
    for name in config.dtypes or STATED.get(target, ("float32",)):
        yield CONTESTS[target](sides, DTYPES[name], config)


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


def text(sides: Sides, dtype: torch.dtype, config: BenchConfig) -> Contest:
    """Prompt to context. The reference encodes all positions, then zeroes those after the end."""
    ours, theirs = at(sides, dtype).ours("text_encoder"), at(sides, dtype).theirs("text_encoder")
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

    return Contest(
        "text",
        named(f"{config.prompt_tokens} tokens of {length}", dtype),
        {OURS: lambda: encode_text(ours, tokenizer, [prompt], length), THEIRS: run_theirs},
        goal=10,
        flops=text_work(ours.config, config.prompt_tokens),
    )


def video_size(sides: Sides, config: BenchConfig) -> tuple[int, int, int]:
    """Height, width and frames: as asked for, or as the model's own folder has them."""
    own = sides.config.defaults
    return (
        config.height or own.height,
        config.width or own.width,
        config.num_frames or own.num_frames,
    )


def encode(sides: Sides, dtype: torch.dtype, config: BenchConfig) -> Contest:
    """Pixels to latents, all weights of both sides in `dtype`."""
    # Loading keeps our encoder in float32; here it is cast, as the reference is.
    ours, theirs = at(sides, dtype).ours("vae").to(dtype), at(sides, dtype).theirs("vae")
    height, width, frames = video_size(sides, config)
    video = drawn(config, 1, 3, frames, height, width).clamp(-1, 1)
    cast, (mean, std) = video.to(dtype), ours.latent_statistics(CPU)

    def run_theirs() -> Tensor:
        return (theirs.encode(cast).latent_dist.mode().float() - mean) / std

    return Contest(
        "encode",
        named(f"{frames}x{height}x{width}", dtype),
        {OURS: lambda: ours.encode(video), THEIRS: run_theirs},
        goal=3 if dtype == torch.float32 else 1.5,
        memory_goal=1,
        flops=encode_work(ours.config, frames, height, width),
    )


def decode(sides: Sides, dtype: torch.dtype, config: BenchConfig) -> Contest:
    """Latents to pixels."""
    ours, theirs = at(sides, dtype).ours("vae"), at(sides, dtype).theirs("vae")
    height, width, frames = video_size(sides, config)
    shape = sides.config.latent_shape(height, width, frames)
    latents, (mean, std) = drawn(config, 1, *shape), ours.latent_statistics(CPU)

    def run_theirs() -> Tensor:
        return theirs.decode((latents * std + mean).to(dtype), return_dict=False)[0]

    return Contest(
        "decode",
        named(f"{frames}x{height}x{width}", dtype),
        {OURS: lambda: ours.decode(latents), THEIRS: run_theirs},
        goal=3 if dtype == torch.float32 else 1.5,
        memory_goal=1,
        flops=decode_work(ours.config, *shape[1:]),
    )


def dit(sides: Sides, dtype: torch.dtype, config: BenchConfig) -> Contest:
    """One velocity of a video whose prompt has been prepared, as sampling prepares it once."""
    shape = sides.config.latent_shape(*video_size(sides, config))
    rows = sides.config.defaults.max_sequence_length
    latents = drawn(config, 1, *shape)
    return velocity_contest("dit", at(sides, dtype), latents, rows, config, goal=1.5)


def block(sides: Sides, dtype: torch.dtype, config: BenchConfig) -> Contest:
    """One block with embedders and head; `sides` holds nothing else."""
    latents = drawn(config, 1, *BLOCK_LATENTS)
    return velocity_contest("block", at(sides, dtype), latents, 512, config, goal=1.1)


def velocity_contest(
    target: str, sides: Sides, latents: Tensor, rows: int, config: BenchConfig, goal: float
) -> Contest:
    ours, theirs = sides.ours("transformer"), sides.theirs("transformer")
    ours.set_attention(config.attention)
    context = drawn(config, 1, rows, ours.config.text_dim)
    context[:, config.prompt_tokens :] = 0
    prepared = ours.prepare_context(context, min(config.prompt_tokens, rows))
    timestep = torch.tensor([700.0])
    arguments = (latents.to(sides.dtype), timestep, context.to(sides.dtype))
    tokens = latents[0, 0].numel() // 4
    return Contest(
        target,
        named(f"{ours.config.width} wide, {tokens} tokens", sides.dtype),
        {
            OURS: lambda: ours(latents, timestep, prepared),
            THEIRS: lambda: theirs(*arguments, return_dict=False)[0],
        },
        goal=goal,
        flops=network_work(ours.config, tokens, rows).forward,
    )


def pipeline(sides: Sides, dtype: torch.dtype, config: BenchConfig) -> Contest:
    """Prompt to pixels, a new prompt in every call: neither side may remember the last one."""
    ours = WanPipeline.from_pretrained(
        sides.folder,
        dtype=dtype,
        attention=config.attention,
        transformer=sides.folder / "transformer",
    )
    height, width, frames = video_size(sides, config)
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

    def video_maker(pipe: Any) -> Callable[[], Tensor]:
        calls = 0

        def run() -> Tensor:
            nonlocal calls
            calls += 1
            return torch.from_numpy(pipe(prompt=f"{prompt} {calls}", **settings).frames)

        return run

    return Contest(
        "pipeline",
        named(f"{config.steps} steps, {frames}x{height}x{width}", dtype),
        {OURS: video_maker(ours), THEIRS: video_maker(sides.their_pipeline(dtype=dtype))},
        goal=2,
    )


CONTESTS: dict[str, Callable[[Sides, torch.dtype, BenchConfig], Contest]] = {
    "text": text,
    "encode": encode,
    "decode": decode,
    "dit": dit,
    "block": block,
    "pipeline": pipeline,
}


def at(sides: Sides, dtype: torch.dtype) -> Sides:
    """The same release in another dtype."""
    return replace(sides, dtype=dtype)


def block_sides(folder: Path, heads: int, seed: int) -> Sides:
    """One block of the 5B's shape, `heads` heads wide, with random weights."""
    config = DiTConfig(num_attention_heads=heads, ffn_dim=14336 * heads // 24, num_layers=1)
    return dit_sides(folder, config, seed)


def dit_sides(folder: Path, config: DiTConfig, seed: int) -> Sides:
    module = randomise(WanDiT(config), torch.Generator().manual_seed(seed))
    save_component(module.state_dict(), folder / "transformer", "transformer")
    write_config(folder / "transformer", config.to_json())
    return Sides(f"{config.width} wide", folder, ("transformer",))


def vae_sides(folder: Path, config: VAEConfig, seed: int) -> Sides:
    module = randomise(WanVAE(config), torch.Generator().manual_seed(seed))
    levels = VAELevels(config.is_residual, config.num_res_blocks)
    save_component(module.state_dict(), folder / "vae", "vae", vae_levels=levels)
    write_config(folder / "vae", config.to_json())
    return Sides("decode", folder, ("vae",))


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
        sides = dit_sides(scratch / name, sizes, config.seed)
        what = f"{sizes.num_layers} of {sizes.width} channels, attention {attention}"
        yield held("blocks", what, *velocities(sides, attention, device, config))
    sides = vae_sides(scratch / "vae", size.vae, config.seed)
    yield held("decode", f"{SMALL_LATENTS} latents", *clips(sides, device, config))


def exact_name(config: BenchConfig) -> str:
    """The chosen attention, or where that is no exact one, what stands in for it elsewhere."""
    name = config.attention.name
    return name if name in {*ATTENTION, *BACKENDS} - {"sage"} else config.attention.exact


def held(rung: str, what: str, ours: Tensor, theirs: Tensor, truth: Tensor) -> Row:
    row = compare_to_truth(rung, what, ours, theirs, truth)
    return replace(row, tolerance=min(row.tolerance, MOST_OF_BFLOAT16))


def velocities(
    sides: Sides, attention: str, device: torch.device, config: BenchConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Of us, of diffusers, and the truth: (B, C, T, h, w) on the CPU."""
    ours = at(sides, torch.bfloat16).ours("transformer").to(device)
    ours.set_attention(attention)
    latents = rounded(drawn(config, 1, ours.config.in_channels, *BLOCK_LATENTS[1:]))
    context = rounded(drawn(config, 1, 512, ours.config.text_dim))
    num_tokens = min(config.prompt_tokens, context.shape[1])
    context[:, num_tokens:] = 0
    timestep = torch.tensor([700.0])

    def theirs(dtype: torch.dtype, where: torch.device) -> Tensor:
        model = sides.theirs("transformer", dtype).to(where)
        arguments = (latents.to(where, dtype), timestep.to(where), context.to(where, dtype))
        return model(*arguments, return_dict=False)[0].float().cpu()

    prepared = ours.prepare_context(context.to(device, torch.bfloat16), num_tokens)
    found = ours(latents.to(device), timestep.to(device), prepared).cpu()
    return found, theirs(torch.bfloat16, device), theirs(torch.float32, CPU)


def clips(sides: Sides, device: torch.device, config: BenchConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Of us, of diffusers, and the truth: (B, 3, F, H, W) on the CPU."""
    ours = at(sides, torch.bfloat16).ours("vae").to(device)
    latents = rounded(drawn(config, 1, ours.config.z_dim, *SMALL_LATENTS))
    mean, std = ours.latent_statistics(CPU)

    def theirs(dtype: torch.dtype, where: torch.device) -> Tensor:
        z = (latents * std + mean).to(where, dtype)
        model = sides.theirs("vae", dtype).to(where)
        return model.decode(z, return_dict=False)[0].float().cpu()

    found = ours.decode(latents.to(device)).float().cpu()
    return found, theirs(torch.bfloat16, device), theirs(torch.float32, CPU)

"""The stages of the 5B by themselves, with random weights: text, denoising, decoding.

Times depend on sizes and not on values, so nothing is downloaded. `size` tiny is the same code on
small networks.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from configs.benchmark import BenchConfig
from infer.bench_measure import Contest, named
from wan.costs import decode_work, network_work, text_work
from wan.dit import WanDiT
from wan.dit_config import DiTConfig
from wan.placement import resolve_device
from wan.schedule import FEW_STEP_TIMESTEPS
from wan.umt5 import UMT5Config, UMT5Encoder
from wan.vae import VAEConfig, WanVAE
from wan.weights import build_on_meta, target_dtype

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class StageSize:
    """The networks and the video of a size."""

    text: UMT5Config
    transformer: DiTConfig
    vae: VAEConfig
    height: int
    width: int
    num_frames: int
    rows: int = 512


SIZES = {
    "full": StageSize(UMT5Config(), DiTConfig(), VAEConfig(), 704, 1280, 121),
    "tiny": StageSize(
        UMT5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        DiTConfig(
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            ffn_dim=64,
            in_channels=8,
            out_channels=8,
            text_dim=32,
        ),
        VAEConfig(base_dim=8, decoder_base_dim=8, z_dim=8),
        32,
        32,
        5,
        rows=40,
    ),
}


def stage_size(config: BenchConfig) -> StageSize:
    assert config.stages is not None
    size = SIZES[config.stages]
    given = {name: getattr(config, name) for name in ("height", "width", "num_frames")}
    return replace(size, **{name: value for name, value in given.items() if value is not None})


def contests(target: str, config: BenchConfig) -> Iterator[Contest]:
    device = resolve_device(config.device)
    for name in config.dtypes or ("bfloat16",):
        yield STAGES[target](stage_size(config), getattr(torch, name), device, config)


def random_network(
    build: Callable[[], M], dtype: torch.dtype, device: torch.device, seed: int
) -> M:
    """A network made where it is used, in the dtypes that loading gives it."""
    module = build_on_meta(build)
    float32 = cast(Any, type(module)).FLOAT32_PARAMETERS
    generator = torch.Generator(device).manual_seed(seed)
    state = {}
    for name, parameter in module.state_dict().items():
        wanted = target_dtype(name, torch.float32, dtype, float32)
        value = torch.empty(parameter.shape, dtype=wanted, device=device)
        if name.endswith(("norm.weight", "gamma")):
            state[name] = value.fill_(1.0)
        else:
            spread = max(1, parameter[0].numel()) ** -0.5
            state[name] = value.normal_(std=spread, generator=generator)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def text(size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig) -> Contest:
    """One prompt of `prompt_tokens` tokens, which are all that is encoded."""
    encoder = random_network(lambda: UMT5Encoder(size.text), dtype, device, config.seed)
    ids = torch.randint(size.text.vocab_size, (1, config.prompt_tokens), device=device)

    def compile_network() -> None:
        for block in encoder.blocks:
            block.compile(dynamic=False)

    return staged(
        "text",
        named(f"{config.prompt_tokens} tokens", dtype),
        lambda: encoder(ids),
        compile_network,
        config,
        text_work(size.text, config.prompt_tokens),
        device,
    )


def denoise(
    size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig
) -> Contest:
    """`steps` velocities of a video, with the keys and values of the prompt made anew."""
    sizes = size.transformer
    network = random_network(lambda: WanDiT(sizes, config.attention), dtype, device, config.seed)
    network.attention.verify(sizes.attention_head_dim, device, dtype)
    stride, frames = size.vae.spatial_stride, size.vae.latent_frames(size.num_frames)
    shape = (1, sizes.in_channels, frames, size.height // stride, size.width // stride)
    latents = torch.randn(shape, device=device)
    context = torch.randn(1, size.rows, sizes.text_dim, device=device, dtype=dtype)
    num_tokens = min(config.prompt_tokens, size.rows)
    context[:, num_tokens:] = 0
    times = (FEW_STEP_TIMESTEPS * config.steps)[: config.steps]
    count = math.prod(network.token_grid(latents))

    def run() -> Tensor:
        prepared = network.prepare_context(context, num_tokens)
        for timestep in times:
            velocity = network(latents, torch.tensor([float(timestep)], device=device), prepared)
        return velocity

    def compile_network() -> None:
        for block in network.blocks:
            block.compile(dynamic=False)

    return staged(
        "denoise",
        named(f"{config.steps} steps, {count} tokens, {config.attention}", dtype),
        run,
        compile_network,
        config,
        config.steps * network_work(sizes, count, size.rows).forward,
        device,
    )


def decode(
    size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig
) -> Contest:
    """Latents to bytes on the CPU, chunk by chunk."""
    vae = random_network(lambda: WanVAE(size.vae), dtype, device, config.seed)
    stride, frames = size.vae.spatial_stride, size.vae.latent_frames(size.num_frames)
    height, width = size.height // stride, size.width // stride
    latents = torch.randn(1, size.vae.z_dim, frames, height, width, device=device)

    def run() -> Tensor:
        chunks = vae.decode_stream(latents)
        pixels = [((x.float() + 1) * 127.5).round().to(torch.uint8).cpu() for x in chunks]
        return torch.cat(pixels, dim=2)

    return staged(
        "decode",
        named(f"{size.num_frames}x{size.height}x{size.width}", dtype),
        run,
        lambda: vae.decoder.compile(dynamic=False),
        config,
        decode_work(size.vae, frames, height, width),
        device,
    )


STAGES = {"text": text, "denoise": denoise, "decode": decode}


def staged(
    target: str,
    what: str,
    run: Callable[[], Tensor],
    compile_network: Callable[[], None],
    config: BenchConfig,
    flops: float,
    device: torch.device,
) -> Contest:
    """A contest of the network as it is, and compiled.

    Compiling is switched by a stance, so that both sides run the same weights.
    """

    def eager() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            return run()

    sides = {"eager": eager}
    if config.compile:
        compile_network()
        sides = {"compiled": run, "eager": eager}
    return Contest(target, what, sides, flops=flops, device=device)

"""The stages of the 5B by themselves, with random weights: text, denoising, decoding.

Times depend on sizes and not on values, so nothing is downloaded. Denoising and decoding are the
pipeline's own, so that what is measured is what its users get. `size` tiny is the same code on
small networks.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from configs.benchmark import BenchConfig
from infer.bench.timing import Contest, Outcome, Timing, named
from wan.models.attention import Grid
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import FEW_STEP, PipelineConfig, SamplingDefaults
from wan.pipeline.pipeline import WanDMDPipeline
from wan.runtime.costs import decode_work, network_work, text_work
from wan.runtime.offload import resolve_device
from wan.sampling.schedule import FEW_STEP_TIMESTEPS
from wan.weights.load import build_on_meta, target_dtype

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

    @property
    def model(self) -> PipelineConfig:
        """A few-step student of these networks."""
        return PipelineConfig(
            FEW_STEP,
            self.transformer,
            self.vae,
            self.text,
            expand_timesteps=True,
            timesteps=FEW_STEP_TIMESTEPS,
            defaults=SamplingDefaults(max_sequence_length=self.rows),
        )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the video's latents."""
        return self.model.latent_shape(self.height, self.width, self.num_frames)


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
        VAEConfig(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=8,
            dim_mult=(1, 2, 2),
            num_res_blocks=1,
            temperal_downsample=(False, True),
        ),
        32,
        32,
        5,
        rows=40,
    ),
}


DTYPES = ("bfloat16",)


def stage_size(config: BenchConfig) -> StageSize:
    """The size asked for.

    Raises:
        WanError: the model cannot make such a video.
    """
    assert config.stages is not None
    size = SIZES[config.stages]
    given = {name: getattr(config, name) for name in ("height", "width", "num_frames")}
    size = replace(size, **{name: value for name, value in given.items() if value is not None})
    size.model.latent_shape(size.height, size.width, size.num_frames)  # before weights are drawn
    return size


def contests(config: BenchConfig) -> Iterator[Contest]:
    """Each is made when it is asked for: the networks of the one before may be forgotten."""
    device, size = resolve_device(config.device), stage_size(config)
    for name in config.dtypes or DTYPES:
        for target in config.chosen():
            yield STAGES[target](size, getattr(torch, name), device, config)


def end_to_end(
    outcomes: Sequence[Outcome], config: BenchConfig, parity_checked: bool
) -> list[Outcome]:
    """The stages added up, a row per dtype; none where a stage was left out."""
    of_stages = [[one for one in outcomes if one.target == stage] for stage in STAGES]
    rows = []
    for dtype, *stages in zip(config.dtypes or DTYPES, *of_stages, strict=False):
        sides = {name: added([stage.sides[name] for stage in stages]) for name in stages[0].sides}
        checked = parity_checked and dtype == "bfloat16"  # what parity= computes
        doubt = [] if checked else ["parity NOT CHECKED"]
        what = ", ".join([" + ".join(STAGES), dtype, *doubt])
        flops = sum(stage.flops or 0.0 for stage in stages)
        goal = config.goal_seconds
        rows.append(Outcome("end to end", what, sides, flops=flops, goal_seconds=goal))
    return rows


def added(timings: Sequence[Timing]) -> Timing:
    """Of stages that follow each other. Sorted, so that medians add up to the median."""
    walls, cpus = ([sorted(getattr(one, clock)) for one in timings] for clock in ("wall", "cpu"))
    return Timing(
        [sum(calls) for calls in zip(*walls, strict=True)],
        [sum(calls) for calls in zip(*cpus, strict=True)],
        peak_bytes=None,
        first=sum(one.first or 0.0 for one in timings),
    )


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


def pipeline_of(size: StageSize, device: torch.device, **network: nn.Module) -> WanDMDPipeline:
    """A student's pipeline that has one network only: a stage needs no other."""
    parts: dict[str, Any] = {name: nn.Module() for name in ("text_encoder", "transformer", "vae")}
    return WanDMDPipeline(size.model, tokenizer=cast(Any, None), device=device, **parts | network)


def text(size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig) -> Contest:
    """One prompt of `prompt_tokens` tokens, which are all that is encoded.

    Pipelines run it eager, whatever their `compile`.
    """
    encoder = random_network(lambda: UMT5Encoder(size.text), dtype, device, config.seed)
    ids = torch.randint(size.text.vocab_size, (1, config.prompt_tokens), device=device)
    return Contest(
        "text",
        named(f"{config.prompt_tokens} tokens", dtype),
        in_both_ways(lambda: encoder(ids), list(encoder.blocks), config),
        flops=text_work(size.text, config.prompt_tokens),
        device=device,
    )


def denoise(
    size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig
) -> Contest:
    """From noise to latents in `steps` steps, with the keys and values of the prompt made anew."""
    sizes = size.transformer
    network = random_network(lambda: WanDiT(sizes, config.attention), dtype, device, config.seed)
    network.attention.verify(sizes.attention_head_dim, device, dtype)
    pipe: Any = pipeline_of(size, device, transformer=network)
    latents = torch.randn(1, *size.latent_shape, device=device)
    grid = network.token_grid(latents)
    context = torch.randn(1, size.rows, sizes.text_dim, device=device, dtype=dtype)
    context[:, min(config.prompt_tokens, size.rows) :] = 0

    def run() -> Tensor:
        return pipe(
            prompt_embeds=context,
            latents=latents,
            num_inference_steps=config.steps,
            seed=config.seed,
            output_type="latent",
            allow_untrained=True,
        ).frames

    what = f"{config.steps} steps, {math.prod(grid)} tokens, {config.attention}"
    return Contest(
        "denoise",
        named(what, dtype),
        in_both_ways(run, list(network.blocks), config),
        flops=config.steps * velocity_work(network, grid, size.rows),
        device=device,
        note=f"attention {kernel_of(network, grid, device, dtype)}",
    )


def velocity_work(network: WanDiT, grid: Grid, rows: int) -> float:
    """FLOPs of one forward, less those that a sparse attention leaves out."""
    density = network.attention.density(grid)
    return network_work(network.config, math.prod(grid), rows, density=density).forward


def kernel_of(network: WanDiT, grid: Grid, device: torch.device, dtype: torch.dtype) -> str:
    """Self-attention by its name; where that lets PyTorch choose a kernel, with its choice."""
    config = network.attention.config
    if config.name != "sdpa":
        return str(config)
    shape = (1, network.config.num_attention_heads, math.prod(grid))
    q = torch.empty(*shape, network.config.attention_head_dim, device=device, dtype=dtype)
    return f"{config}, for which PyTorch takes {SDPBackend(torch._fused_sdp_choice(q, q, q)).name}"


def decode(
    size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig
) -> Contest:
    """Latents to float32 pixels on the CPU, chunk by chunk."""
    vae = random_network(lambda: WanVAE(size.vae), dtype, device, config.seed)
    pipe = pipeline_of(size, device, vae=vae)
    latents = torch.randn(1, *size.latent_shape, device=device)
    return Contest(
        "decode",
        named(f"{size.num_frames}x{size.height}x{size.width}", dtype),
        in_both_ways(lambda: pipe.decode_latents(latents), [vae.decoder], config),
        flops=decode_work(size.vae, *size.latent_shape[1:]),
        device=device,
    )


STAGES = {"text": text, "denoise": denoise, "decode": decode}


def in_both_ways(
    run: Callable[[], Tensor], modules: Sequence[nn.Module], config: BenchConfig
) -> dict[str, Callable[[], Tensor]]:
    """The sides of a stage: with its modules compiled, and as they are, on the same weights."""
    if not config.compile:
        return {"eager": run}
    torch.compiler.reset()  # else, after 8 variants of a block, PyTorch compiles no more
    for module in modules:
        module.compile(dynamic=False, backend=config.compile_backend)

    def eager() -> Tensor:
        with uncompiled(modules):
            return run()

    return {"compiled": run, "eager": eager}


@contextmanager
def uncompiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Modules as they were before `Module.compile`.

    What they call stays compiled. With the stance "force_eager" FlexAttention would not, and
    compute all scores: more than a GPU holds at 27280 tokens.
    """
    compiled = [module._compiled_call_impl for module in modules]
    try:
        for module in modules:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in zip(modules, compiled, strict=True):
            module._compiled_call_impl = call

"""The stages of the 5B one by one, with random weights: text, denoising, decoding.

Times depend on sizes and not on values, so nothing is downloaded. Denoising and decoding are the
pipeline's own, so that what is measured is what its users get. The size `tiny` runs the same code
on small networks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from configs.benchmark import BenchConfig
from infer.bench.timing import Contest, Outcome, Task, Timing, named
from infer.parity.models import randomise
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
    text_length: int = 512  # tokens, padding included

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
            defaults=SamplingDefaults(max_sequence_length=self.text_length),
        )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, T, h, w) of the video's latents."""
        return self.model.latent_shape(self.height, self.width, self.num_frames)


DTYPES = ("bfloat16",)
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
        text_length=40,
    ),
}


def stage_size(config: BenchConfig) -> StageSize:
    """The size that the settings choose.

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
    """The stages added up, an outcome per dtype; none where a stage was left out."""
    totals = []
    for dtype in config.dtypes or DTYPES:
        of_dtype = {
            one.task.target: one for one in outcomes if one.task.what.endswith(f", {dtype}")
        }
        if any(stage not in of_dtype for stage in STAGES):
            continue
        stages = [of_dtype[stage] for stage in STAGES]
        sides = {name: added([stage.sides[name] for stage in stages]) for name in stages[0].sides}
        checked = parity_checked and dtype == "bfloat16"  # the dtype that parity= checks
        what = f"{' + '.join(STAGES)}, {dtype}{'' if checked else ', parity NOT CHECKED'}"
        flops = sum(stage.task.flops or 0.0 for stage in stages)
        task = Task("end to end", what, goal_seconds=config.goal_seconds, flops=flops)
        totals.append(Outcome(task, sides))
    return totals


def added(timings: Sequence[Timing]) -> Timing:
    """The sum of stages that follow each other.

    The fastest calls are added to the fastest, and so on: then the medians add up to the median.
    """

    def total(clock: str) -> list[float]:
        calls = [sorted(getattr(timing, clock)) for timing in timings]
        return [sum(seconds) for seconds in zip(*calls, strict=True)]

    first = sum(timing.first or 0.0 for timing in timings)
    return Timing(total("wall"), total("cpu"), peak_bytes=None, first=first)


def random_network(
    build: Callable[[], M], dtype: torch.dtype, device: torch.device, seed: int
) -> M:
    """A network made where it is used, in the dtypes that loading gives it."""
    module = build_on_meta(build)
    float32 = cast(Any, type(module)).FLOAT32_PARAMETERS
    state = {}
    for name, parameter in module.state_dict().items():
        wanted = target_dtype(name, torch.float32, dtype, float32)
        state[name] = torch.empty(parameter.shape, dtype=wanted, device=device)
    module.load_state_dict(state, assign=True)
    randomise(module, torch.Generator(device).manual_seed(seed))
    return module.eval().requires_grad_(False)


def pipeline_of(size: StageSize, device: torch.device, **network: Any) -> WanDMDPipeline:
    """A student's pipeline that has one network only: a stage needs no other."""
    return WanDMDPipeline(config=size.model, device=device, **network)


def text(size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig) -> Contest:
    """Encode one prompt of `prompt_tokens` tokens; padding is not encoded.

    Pipelines run the encoder eager, whatever their `compile`.
    """
    encoder = random_network(lambda: UMT5Encoder(size.text), dtype, device, config.seed)
    ids = torch.randint(size.text.vocab_size, (1, config.prompt_tokens), device=device)
    flops = text_work(size.text, config.prompt_tokens)
    task = Task("text", named(f"{config.prompt_tokens} tokens", dtype), flops=flops)
    return Contest(task, in_both_ways(lambda: encoder(ids), encoder.blocks, config), device)


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
    context = torch.randn(1, size.text_length, sizes.text_dim, device=device, dtype=dtype)
    context[:, min(config.prompt_tokens, size.text_length) :] = 0

    def run() -> Tensor:
        return pipe(
            prompt_embeds=context,
            latents=latents,
            num_inference_steps=config.steps,
            seed=config.seed,
            output_type="latent",
            allow_untrained=True,
        ).frames

    task = Task(
        "denoise",
        named(f"{config.steps} steps, {math.prod(grid)} tokens, {config.attention}", dtype),
        flops=config.steps * velocity_work(network, grid, size.text_length),
        note=f"attention {kernel_of(network, grid, device, dtype)}",
    )
    return Contest(task, in_both_ways(run, network.blocks, config), device)


def decode(
    size: StageSize, dtype: torch.dtype, device: torch.device, config: BenchConfig
) -> Contest:
    """Latents to float32 pixels on the CPU, chunk by chunk."""
    vae = random_network(lambda: WanVAE(size.vae), dtype, device, config.seed)
    pipe = pipeline_of(size, device, vae=vae)
    latents = torch.randn(1, *size.latent_shape, device=device)
    what = named(f"{size.num_frames}x{size.height}x{size.width}", dtype)
    task = Task("decode", what, flops=decode_work(size.vae, *size.latent_shape[1:]))
    sides = in_both_ways(lambda: pipe.decode_latents(latents), [vae.decoder], config)
    return Contest(task, sides, device)


STAGES = {"text": text, "denoise": denoise, "decode": decode}


def velocity_work(network: WanDiT, grid: Grid, text_length: int) -> float:
    """FLOPs of one forward, without those that a sparse attention leaves out."""
    density = network.attention.density(grid)
    return network_work(network.config, math.prod(grid), text_length, density=density).forward


def kernel_of(network: WanDiT, grid: Grid, device: torch.device, dtype: torch.dtype) -> str:
    """The name of self-attention, with PyTorch's choice where it chooses the kernel."""
    config = network.attention.config
    if config.name != "sdpa":
        return str(config)
    shape = (1, network.config.num_attention_heads, math.prod(grid))
    q = torch.empty(*shape, network.config.attention_head_dim, device=device, dtype=dtype)
    return f"{config}, for which PyTorch takes {SDPBackend(torch._fused_sdp_choice(q, q, q)).name}"


def in_both_ways(
    run: Callable[[], Tensor], modules: Iterable[nn.Module], config: BenchConfig
) -> dict[str, Callable[[], Tensor]]:
    """The sides of a stage: with its modules compiled, and as they are, on the same weights."""
    if not config.compile:
        return {"eager": run}
    modules = list(modules)
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

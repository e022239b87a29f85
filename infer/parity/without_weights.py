"""Rungs that need no weights: names and shapes at full size, timesteps, schedules, samplers."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infer.parity.models import reference
from infer.parity.tolerance import Row, compare, count_differences
from wan.models.dit import WanDiT, timestep_sinusoid
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import WanVAE
from wan.models.vae_config import VAE_2_1
from wan.pipeline.known_models import VAE_2_2
from wan.pipeline.parts import vae_levels
from wan.sampling.samplers import sample_euler, sample_few_step, sample_unipc
from wan.sampling.schedule import euler_schedule, few_step_schedule, unipc_schedule
from wan.weights.keys import ALIASES, our_name

SAMPLER_TOLERANCE = 2e-6

# --- names and shapes, at full size, without weights ----------------------------------------------

FULL_SIZE: list[tuple[str, str, Any, Callable[[Any], torch.nn.Module]]] = [
    ("TI2V-5B transformer", "transformer", DiTConfig(), WanDiT),
    (
        "T2V-1.3B transformer",
        "transformer",
        DiTConfig(num_attention_heads=12, ffn_dim=8960, in_channels=16, out_channels=16),
        WanDiT,
    ),
    (
        "T2V-14B / A14B transformer",
        "transformer",
        DiTConfig(
            num_attention_heads=40, num_layers=40, ffn_dim=13824, in_channels=16, out_channels=16
        ),
        WanDiT,
    ),
    ("Wan2.2 autoencoder", "vae", VAE_2_2, WanVAE),
    ("Wan2.1 autoencoder", "vae", VAE_2_1, WanVAE),
    ("UMT5-XXL encoder", "text_encoder", UMT5Config(), UMT5Encoder),
]


def names_and_shapes() -> list[Row]:
    """Every tensor of every release, on the meta device, against the reference's classes."""
    rows = []
    for what, component, config, build in FULL_SIZE:
        with torch.device("meta"):
            ours = {name: tuple(t.shape) for name, t in build(config).state_dict().items()}
            theirs = reference_state(component, config.to_json())
        levels = vae_levels(config) if component == "vae" else None
        named = {
            our_name(component, "diffusers", name, levels) or name: tuple(tensor.shape)
            for name, tensor in theirs.items()
            if name not in ALIASES.get((component, "diffusers"), {})
        }
        different = {n for n in set(ours) | set(named) if ours.get(n) != named.get(n)}
        numbers = sum(math.prod(shape) for shape in ours.values())
        note = f"{len(ours)} tensors, {numbers:,} parameters"
        if different:
            note = f"first difference: {min(different)}; {len(different)} of {len(ours)}"
        rows.append(count_differences("names and shapes", what, len(different), note))
    return rows


def reference_state(component: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """Names and shapes of a reference network; to be called on the meta device."""
    if component == "text_encoder":
        library = reference("transformers")
        return library.UMT5EncoderModel(library.UMT5Config(**config)).state_dict()
    library = reference("diffusers")
    is_vae = component == "vae"
    model_class = library.AutoencoderKLWan if is_vae else library.WanTransformer3DModel
    return model_class.from_config(config).state_dict()


# --- schedules and samplers -----------------------------------------------------------------------

STEPS = (1, 2, 4, 20, 50)
SHIFTS = (3.0, 5.0, 12.0)
FEW_STEP_LISTS = ((1000, 757, 522), (1000, 750, 500, 250), (1000,))

# Stretches of the official UniPC timesteps (50 steps, shift 5), and in how many of the 50 it
# differs from diffusers. Source: Wan2.2 `wan/utils/fm_solvers_unipc.py`, run once.
OFFICIAL_STRETCH = [927, 920, 913, 906, 898]
OFFICIAL_END = [172, 92]
OFFICIAL_DIFFERENT = 27
# Noise levels of the few-step timesteps 757 and 522, by table shift. Source: FastVideo's scheduler.
FEW_STEP_SIGMAS = {
    8.0: (0.75675672, 0.52173913),
    5.0: (0.75709784, 0.52156174),
    3.0: (0.75668973, 0.52216429),
}


def their_unipc(steps: int, shift: float) -> Any:
    scheduler = reference("diffusers").UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    return scheduler


def their_euler(steps: int, shift: float) -> Any:
    scheduler = reference("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0, steps + 1)[:-1].tolist())
    return scheduler


def schedules() -> list[Row]:
    """Timesteps and noise levels against diffusers, and against numbers of the official code."""
    rows = []
    for name, ours_of, theirs_of in (
        ("UniPC", unipc_schedule, their_unipc),
        ("Euler", euler_schedule, their_euler),
    ):
        pairs = [(ours_of(n, k), theirs_of(n, k)) for n in STEPS for k in SHIFTS]
        ours, theirs = (torch.cat([p[i].timesteps.double() for p in pairs]) for i in (0, 1))
        tolerance = 0.0 if name == "UniPC" else 1e-6  # they shift Euler's in float32, we in float64
        what = f"{name}, {len(STEPS)} lengths x {len(SHIFTS)} shifts"
        rows.append(compare("schedule", f"{what}: timesteps", ours, theirs, tolerance))
        ours, theirs = (torch.cat([p[i].sigmas.double() for p in pairs]) for i in (0, 1))
        rows.append(compare("schedule", f"{what}: sigmas", ours, theirs, tolerance))
    official = unipc_schedule(50, 5.0, grid="official").timesteps
    listed = [int(t) for t in official]
    place = listed.index(OFFICIAL_STRETCH[0]) if OFFICIAL_STRETCH[0] in listed else 0
    wrong = int(listed[place : place + len(OFFICIAL_STRETCH)] != OFFICIAL_STRETCH)
    wrong += listed[-2:] != OFFICIAL_END
    different = int((official != unipc_schedule(50, 5.0).timesteps).sum())
    wrong += different != OFFICIAL_DIFFERENT
    note = f"differs from diffusers' in {different} of 50"
    rows.append(count_differences("schedule", "UniPC, official grid: known numbers", wrong, note))
    for shift, sigmas in FEW_STEP_SIGMAS.items():
        ours = few_step_schedule((1000, 757, 522), table_shift=shift).sigmas[1:3]
        what = f"few-step list, table shift {shift:g}: sigmas"
        rows.append(compare("schedule", what, ours, torch.tensor(sigmas), 1e-7))
    return rows


def time_embedding() -> list[Row]:
    """The sinusoid of the timestep: equal to diffusers', near the official float64 one."""
    timestep = torch.linspace(0, 1000, 4001)
    ours = timestep_sinusoid(timestep, 256)
    embedding = reference("diffusers").models.embeddings.Timesteps(
        256, flip_sin_to_cos=True, downscale_freq_shift=0
    )
    frequency = 10000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    angle = timestep.double().unsqueeze(1) * frequency
    exact = torch.cat((angle.cos(), angle.sin()), dim=1)
    rung = "time embedding"
    return [
        compare(rung, "sinusoid against diffusers", ours, embedding(timestep), 1e-7),
        compare(rung, "sinusoid against float64 (official)", ours, exact, 1e-5),
    ]


def samplers() -> list[Row]:
    """Whole runs of a velocity that bends the path, against diffusers' schedulers.

    For few steps that is its Euler scheduler with stochastic sampling, on the same noise.
    """

    def velocity(x: Tensor, timestep: float) -> Tensor:
        return torch.sin(3 * x) + x * (0.3 + timestep / 1000)

    x = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    rows = []
    for name, sample, schedule_of, theirs_of in (
        ("UniPC", sample_unipc, unipc_schedule, their_unipc),
        ("Euler", sample_euler, euler_schedule, their_euler),
    ):
        for steps in STEPS:
            ours = torch.cat([sample(velocity, x, schedule_of(steps, k)) for k in SHIFTS])
            theirs = torch.cat([their_run(theirs_of(steps, k), velocity, x) for k in SHIFTS])
            what = f"{name}, {steps} steps x {len(SHIFTS)} shifts"
            rows.append(compare("sampler", what, ours, theirs, SAMPLER_TOLERANCE))
    for timesteps in FEW_STEP_LISTS:
        schedule = few_step_schedule(timesteps)
        scheduler = reference("diffusers").FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
        scheduler.set_timesteps(
            sigmas=schedule.sigmas[:-1].tolist(), timesteps=schedule.timesteps.tolist()
        )
        with torch.random.fork_rng(devices=[]):  # their noise is of the global generator
            torch.manual_seed(0)
            theirs = their_run(scheduler, velocity, x)
            torch.manual_seed(0)
            ours = sample_few_step(velocity, x, schedule, lambda i: torch.randn_like(x))
        what = f"few steps, {', '.join(f'{t:g}' for t in timesteps)}"
        rows.append(compare("sampler", what, ours, theirs, SAMPLER_TOLERANCE))
    return rows


def their_run(scheduler: Any, velocity: Callable[[Tensor, float], Tensor], x: Tensor) -> Tensor:
    for timestep in scheduler.timesteps:
        v = velocity(x, float(timestep))
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
    return x

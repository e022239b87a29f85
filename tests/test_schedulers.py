"""Scheduler objects and scheduler_config.json, against diffusers and field by field."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from wan.errors import WanError
from wan.sampling import schedulers as ours
from wan.sampling.scheduler_config import (
    DPM,
    EULER,
    FIELDS,
    UNIPC,
    SchedulerSettings,
    read_scheduler,
)
from wan.sampling.schedulers import (
    SCHEDULERS,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
EXAMPLES = [
    (UNIPC, FLOW | {"flow_shift": 3.0}),
    (UNIPC, FLOW | {"flow_shift": 12.0, "solver_order": 1, "lower_order_final": False}),
    (UNIPC, FLOW | {"flow_shift": 5.0, "solver_order": 3}),
    (UNIPC, FLOW | {"flow_shift": 5.0, "solver_order": 3, "disable_corrector": [0, 2]}),
    (UNIPC, FLOW | {"use_karras_sigmas": True}),
    (UNIPC, FLOW | {"use_karras_sigmas": True, "beta_schedule": "scaled_linear"}),
    (UNIPC, FLOW | {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 50.0}),
    (EULER, {"shift": 1.0}),
    (EULER, {"shift": 7.0}),
    (EULER, {"shift": 3.0, "use_karras_sigmas": True}),
    (EULER, {"shift": 3.0, "use_exponential_sigmas": True}),
    (DPM, FLOW | {"flow_shift": 5.0}),
    (DPM, FLOW | {"flow_shift": 5.0, "solver_order": 1}),
    (DPM, FLOW | {"flow_shift": 5.0, "solver_order": 3}),
    (DPM, FLOW | {"flow_shift": 3.0, "solver_order": 3, "lower_order_final": False}),
    (DPM, FLOW | {"flow_shift": 3.0, "solver_type": "heun"}),
]


def velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.tanh(2 * x + timestep / 500) + 0.3 * torch.roll(x, 1, dims=-1)


def start() -> torch.Tensor:
    return torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def run(scheduler, x: torch.Tensor) -> torch.Tensor:
    """A loop as scripts for diffusers have it."""
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t)), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(("name", "config"), EXAMPLES)
def test_objects_equal_those_of_diffusers(name, config):
    diffusers = pytest.importorskip("diffusers")
    for steps in (1, 2, 3, 5, 20, 50):
        theirs, mine = getattr(diffusers, name)(**config), SCHEDULERS[name](**config)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(steps)
            scheduler.set_begin_index(0)
        assert torch.equal(mine.timesteps, theirs.timesteps)
        assert mine.timesteps.dtype == theirs.timesteps.dtype
        torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=0, atol=0)
        expected = run(theirs, start())
        assert ((run(mine, start()) - expected).norm() / expected.norm()).item() <= 1e-5


@pytest.mark.parametrize("name", FIELDS)
def test_fields_and_defaults_are_those_of_diffusers(name):
    diffusers = pytest.importorskip("diffusers")
    config = {} if name == EULER else FLOW
    theirs = dict(getattr(diffusers, name)(**config).config)
    theirs.pop("_use_default_values", None)
    mine = dict(SCHEDULERS[name](**config).config)
    assert mine.pop("_class_name") == name
    assert mine == theirs


@pytest.mark.parametrize(("name", "config"), EXAMPLES)
def test_objects_of_diffusers_and_their_files_are_read(name, config, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = getattr(diffusers, name)(**config)
    expected = SCHEDULERS[name](**config).settings
    assert read_scheduler(theirs) == expected
    theirs.save_pretrained(tmp_path)
    assert SCHEDULERS[name].from_pretrained(tmp_path).settings == expected
    again = SCHEDULERS[name].from_config(theirs.config)
    again.save_pretrained(tmp_path / "again" / "scheduler")
    assert (
        getattr(diffusers, name)
        .from_pretrained(tmp_path / "again", subfolder="scheduler")
        .config.items()
        >= {**config, "num_train_timesteps": 1000}.items()
    )


@pytest.mark.parametrize("sampler", ["unipc", "euler", "dpm++"])
def test_settings_are_written_and_read_back(sampler):
    plain = SchedulerSettings(sampler, shift=3.0)
    content = json.loads(json.dumps(plain.to_json()))
    again = read_scheduler(content)
    assert (again.sampler, again.shift, again.order) == (sampler, 3.0, 2)
    assert again.to_json() == content | {"_class_name": again.class_name}


def test_from_config_changes_a_field_and_crosses_classes():
    diffusers = pytest.importorskip("diffusers")
    unipc = UniPCMultistepScheduler(**FLOW, flow_shift=3.0, solver_order=3)
    assert UniPCMultistepScheduler.from_config(unipc.config, flow_shift=8.0).config.flow_shift == 8
    for source in (unipc, unipc.config, diffusers.UniPCMultistepScheduler(**unipc_fields(unipc))):
        dpm = DPMSolverMultistepScheduler.from_config(source)
        assert (dpm.settings.sampler, dpm.settings.shift, dpm.settings.order) == ("dpm++", 3.0, 3)
        assert dpm.settings.solver_type == "midpoint"
    back = UniPCMultistepScheduler.from_config(dpm.config)
    assert back.settings == unipc.settings
    with pytest.warns(UserWarning, match=r"flow_shift=3.*here it is shift, which stays 1"):
        euler = FlowMatchEulerDiscreteScheduler.from_config(unipc.config)
    assert (euler.config.shift, euler.config.flow_shift) == (1.0, 3.0)
    with pytest.raises(WanError, match=r"unknown flow_shift \(its shift is called shift\)"):
        FlowMatchEulerDiscreteScheduler.from_config(unipc.config, flow_shift=5.0)


def unipc_fields(scheduler: UniPCMultistepScheduler) -> dict:
    return {k: v for k, v in scheduler.config.items() if not k.startswith("_")}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (UNIPC, {}, r"prediction_type='epsilon'.*use_flow_sigmas=False"),
        (UNIPC, FLOW | {"num_train_timesteps": 500}, "num_train_timesteps=500"),
        (UNIPC, FLOW | {"thresholding": True}, "thresholding=True"),
        (UNIPC, FLOW | {"use_exponential_sigmas": True}, "use_exponential_sigmas.*above 1"),
        (UNIPC, FLOW | {"use_beta_sigmas": True}, "use_beta_sigmas"),
        (UNIPC, FLOW | {"solver_order": 4}, "solver_order=4"),
        (UNIPC, FLOW | {"lower_order_final": False}, "lower_order_final=False"),
        (UNIPC, FLOW | {"final_sigmas_type": "sigma_min"}, "leave noise"),
        (UNIPC, FLOW | {"flow_shift": "3"}, "flow_shift='3'"),
        (UNIPC, FLOW | {"flow_shift": -1}, "flow_shift=-1"),
        (UNIPC, FLOW | {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        (UNIPC, FLOW | {"use_karras_sigmas": True, "trained_betas": [0.1]}, "betas"),
        (UNIPC, FLOW | {"shift": 3.0}, r"unknown shift \(its shift is called flow_shift\)"),
        (EULER, {"flow_shift": 3.0}, r"unknown flow_shift \(its shift is called shift\)"),
        (EULER, {"invert_sigmas": True}, "clean latents to noise"),
        (EULER, {"stochastic_sampling": True}, "few_step"),
        (EULER, {"shift_terminal": 0.1}, "shift_terminal=0.1"),
        (EULER, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "more than one of"),
        (DPM, FLOW | {"algorithm_type": "sde-dpmsolver++"}, "sde-dpmsolver"),
        (DPM, FLOW | {"use_lu_lambdas": True}, "use_lu_lambdas"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(name, config, message):
    with pytest.raises(WanError, match=message):
        SCHEDULERS[name](**config)


def test_every_field_can_be_told_apart():
    """No field is accepted at any value and used: an allowed list, a rule of its own, or no effect.

    The last are those that diffusers itself does not use with flow noise levels.
    """
    ruled = {"flow_shift", "shift", "disable_corrector", "sigma_min", "sigma_max"}
    betas = {"beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"}
    no_effect = {
        *("dynamic_thresholding_ratio", "sample_max_value", "timestep_spacing", "steps_offset"),
        *("time_shift_type", "base_shift", "max_shift", "base_image_seq_len"),
        *("max_image_seq_len", "lambda_min_clipped", "variance_type"),
    }
    for fields in FIELDS.values():
        free = {name for name, rule in fields.items() if not rule.allowed}
        assert free <= ruled | betas | no_effect


def test_other_schedulers_are_refused_by_name():
    diffusers = pytest.importorskip("diffusers")
    for name in ("LCMScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
        with pytest.raises(WanError, match=f"{name} is not supported; choose one of UniPC"):
            read_scheduler(getattr(diffusers, name)())
    with pytest.raises(WanError, match="no _class_name"):
        read_scheduler({"flow_shift": 3.0})
    with pytest.raises(WanError, match="int: has no configuration"):
        read_scheduler(3)
    with pytest.warns(UserWarning, match="has no flow_shfit"):
        read_scheduler({"_class_name": EULER, "flow_shfit": 3.0})


def test_sigmas_and_timesteps_of_the_caller():
    diffusers = pytest.importorskip("diffusers")
    given = np.linspace(1, 0.2, 5)
    for name, config in ((UNIPC, FLOW | {"flow_shift": 5.0}), (EULER, {"shift": 5.0})):
        theirs, mine = getattr(diffusers, name)(**config), SCHEDULERS[name](**config)
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(sigmas=given)
        torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=0, atol=1.2e-7)
        torch.testing.assert_close(mine.timesteps, theirs.timesteps, rtol=0, atol=1.3e-4)
    for scheduler in (theirs, mine):
        scheduler.set_timesteps(sigmas=given, timesteps=[900, 700, 500, 300, 100])
    assert torch.equal(mine.timesteps, theirs.timesteps)
    torch.testing.assert_close(mine.sigmas, theirs.sigmas, rtol=0, atol=1.2e-7)
    with pytest.raises(WanError, match=r"3 and 5 sigmas"):
        mine.set_timesteps(3, sigmas=given)
    unipc = UniPCMultistepScheduler(**FLOW)
    with pytest.raises(WanError, match="give sigmas="):
        unipc.set_timesteps(timesteps=[900, 100])
    with pytest.raises(WanError, match="falling numbers above 0"):
        unipc.set_timesteps(sigmas=[0.2, 0.5])
    with pytest.raises(WanError, match="give num_inference_steps or sigmas"):
        unipc.set_timesteps()


@pytest.mark.parametrize("name", FIELDS)
def test_a_run_may_begin_in_the_middle_and_again(name):
    diffusers = pytest.importorskip("diffusers")
    config = {"shift": 3.0} if name == EULER else FLOW | {"flow_shift": 3.0}
    results = []
    for scheduler in (getattr(diffusers, name)(**config), SCHEDULERS[name](**config)):
        for _ in range(2):
            scheduler.set_timesteps(8)
            later = scheduler.timesteps[3:]
            x = scheduler_noise(scheduler, later[:1])
            for t in later:
                x = scheduler.step(velocity(x, float(t)), t, x).prev_sample
            results.append(x)
    assert torch.equal(results[2], results[3])
    assert ((results[3] - results[1]).norm() / results[1].norm()).item() <= 1e-5


def scheduler_noise(scheduler, timestep: torch.Tensor) -> torch.Tensor:
    x0, noise = torch.ones(2, 3, 2, 4, 4), start()
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(x0, timestep, noise)
    return scheduler.add_noise(x0, noise, timestep)


def test_misuse_is_refused():
    scheduler = UniPCMultistepScheduler(**FLOW)
    assert (len(scheduler), scheduler.order, scheduler.init_noise_sigma) == (1000, 1, 1)
    assert torch.equal(scheduler.scale_model_input(start(), 999), start())
    with pytest.raises(WanError, match="call set_timesteps first"):
        scheduler.step(start(), 999, start())
    scheduler.set_timesteps(1)
    with pytest.raises(WanError, match=r"timestep 5: not one of this schedule's 1"):
        scheduler.step(start(), 5, start())
    scheduler.step(start(), 999, start())
    with pytest.raises(WanError, match="all 1 steps are done"):
        scheduler.step(start(), 999, start())
    with pytest.raises(WanError, match="does not change"):
        scheduler.config["flow_shift"] = 3.0
    with pytest.raises(WanError, match="does not change"):
        scheduler.config.flow_shift = 3.0
    with pytest.raises(WanError, match="is missing"):
        UniPCMultistepScheduler.from_pretrained(Path("nowhere"), subfolder="scheduler")


def test_a_table_of_the_euler_scheduler_is_there_before_set_timesteps():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    mine = FlowMatchEulerDiscreteScheduler(shift=3.0)
    torch.testing.assert_close(mine.timesteps, theirs.timesteps)
    torch.testing.assert_close(mine.sigmas, theirs.sigmas)
    mine.set_shift(5.0)
    mine.set_timesteps(4)
    other = ours.FlowMatchEulerDiscreteScheduler(shift=5.0)
    other.set_timesteps(4)
    assert torch.equal(mine.sigmas, other.sigmas)

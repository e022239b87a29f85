"""What is asked of a sampler is done or refused; nothing given is ignored."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae_config import VAEConfig
from wan.pipeline.config import PipelineConfig
from wan.pipeline.plan import SamplingRequest, plan_sampling
from wan.sampling.samplers import SAMPLERS
from wan.sampling.schedule import (
    FEW_STEP_TABLE_SHIFT,
    GRIDS,
    euler_schedule,
    few_step_schedule,
    unipc_schedule,
)
from wan.sampling.schedulers import UniPCMultistepScheduler

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
TIMESTEPS = (1000.0, 757.0, 522.0)
BASE = PipelineConfig("WanPipeline", DiTConfig(), VAEConfig(), UMT5Config())
STUDENT = PipelineConfig(
    "WanDMDPipeline", DiTConfig(), VAEConfig(), UMT5Config(), timesteps=TIMESTEPS
)


@pytest.mark.parametrize("config", [BASE, STUDENT], ids=["base", "student"])
def test_a_schedule_takes_no_shift(config):
    request = SamplingRequest(schedule=euler_schedule(4, 5.0), shift=3.0, allow_untrained=True)
    with pytest.raises(WanError, match=r"shift=3 and schedule.*leave shift out"):
        plan_sampling(config, request)


def test_a_student_knows_one_shift():
    with pytest.raises(WanError, match=r"shift=12: this few-step model.*allow_untrained=True"):
        plan_sampling(STUDENT, SamplingRequest(shift=12.0))
    plan = plan_sampling(STUDENT, SamplingRequest(shift=12.0, allow_untrained=True))
    assert plan.untrained == ("shift=12",)
    assert plan.schedule.sigmas.equal(few_step_schedule(TIMESTEPS, 12.0).sigmas)
    own = plan_sampling(STUDENT, SamplingRequest(shift=FEW_STEP_TABLE_SHIFT))
    assert own.untrained == ()


def test_rows_of_text_are_part_of_the_model():
    """Those past a prompt's end are attended too."""
    with pytest.raises(WanError, match=r"max_sequence_length=226: this few-step.* 512 text"):
        plan_sampling(STUDENT, SamplingRequest(max_sequence_length=226))
    for config in (BASE, STUDENT):
        asked = SamplingRequest(max_sequence_length=226, allow_untrained=True)
        assert plan_sampling(config, asked).untrained == ("max_sequence_length=226",)
        assert plan_sampling(config, SamplingRequest(max_sequence_length=512)).untrained == ()
        with pytest.raises(WanError, match="need at least 1"):
            plan_sampling(config, SamplingRequest(max_sequence_length=-5))


@pytest.mark.parametrize("deterministic", [True, False])
def test_samplers_that_add_no_noise_are_not_told_which(deterministic):
    with pytest.raises(WanError, match="unipc adds no noise"):
        plan_sampling(BASE, SamplingRequest(deterministic=deterministic))
    plan_sampling(STUDENT, SamplingRequest(deterministic=deterministic))


def test_without_guidance_neither_expert_has_any():
    experts = replace(
        BASE,
        boundary_ratio=0.875,
        defaults=replace(BASE.defaults, guidance_scale=4.0, guidance_scale_2=3.0),
    )
    assert plan_sampling(experts, SamplingRequest()).guidance_scale_2 == 3
    assert not plan_sampling(experts, SamplingRequest(guidance_scale=1)).guided


def test_every_sampler_has_a_grid():
    assert GRIDS.keys() == SAMPLERS.keys()
    for sampler, grids in GRIDS.items():
        for grid in grids:
            plan = plan_sampling(BASE, SamplingRequest(3, sampler=sampler, grid=grid))
            assert (plan.sampler, plan.scheduler.grid, len(plan.schedule)) == (sampler, grid, 3)


def test_a_folders_scheduler_is_the_one_that_samples():
    euler = BASE.with_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    plan = plan_sampling(euler, SamplingRequest(4))
    assert (plan.sampler, plan.grid, plan.shift) == ("euler", "diffusers", 3.0)
    assert plan_sampling(euler, SamplingRequest(4, shift=7.0)).shift == 7
    chosen = plan_sampling(euler, SamplingRequest(4, sampler="unipc"))
    assert (chosen.sampler, chosen.grid, chosen.shift) == ("unipc", "diffusers", 3.0)
    third = BASE.with_scheduler(UniPCMultistepScheduler(**FLOW, flow_shift=5.0, solver_order=3))
    assert plan_sampling(third, SamplingRequest(4)).stepper().order == 3
    assert third.with_scheduler(BASE.scheduler.to_json()).own_scheduler is None


def test_another_scheduler_is_untrained_for_a_student():
    """Its folder's is not: few-step sampling does not use it."""
    own = STUDENT.with_scheduler(STUDENT.scheduler.to_json())
    assert plan_sampling(own, SamplingRequest()).untrained == ()
    other = STUDENT.with_scheduler(UniPCMultistepScheduler(**FLOW, flow_shift=8.0))
    with pytest.raises(WanError, match="scheduler=UniPCMultistepScheduler: this few-step model"):
        plan_sampling(other, SamplingRequest())
    plan = plan_sampling(other, SamplingRequest(allow_untrained=True))
    assert (plan.sampler, plan.shift, len(plan.schedule)) == ("unipc", 8.0, 3)
    assert plan.schedule.sigmas.equal(unipc_schedule(3, 8.0).sigmas)


def test_a_grid_belongs_to_a_number_of_steps():
    for other in ({"timesteps": [900, 500]}, {"schedule": euler_schedule(4, 5.0)}):
        with pytest.raises(WanError, match="a grid is for a number of steps"):
            plan_sampling(BASE, SamplingRequest(grid="official", **other))
    with pytest.raises(WanError, match="karras has no shift"):
        plan_sampling(BASE, SamplingRequest(grid="karras", shift=3.0))
    with pytest.raises(WanError, match="uniform, diffusers, karras"):
        plan_sampling(BASE, SamplingRequest(sampler="euler", grid="official"))
    with pytest.raises(WanError, match="grid=uniform: this few-step model"):
        plan_sampling(STUDENT, SamplingRequest(grid="uniform"))
    assert plan_sampling(BASE, SamplingRequest(timesteps=[900, 500])).grid is None


@pytest.mark.parametrize("scale", [0, 0.3, 1, np.float32(1), torch.tensor(0.5)])
def test_guidance_of_at_most_1_is_off(scale):
    for config in (BASE, STUDENT):
        plan = plan_sampling(config, SamplingRequest(guidance_scale=scale))
        assert not plan.guided
        assert plan.untrained == ()


def test_a_low_noise_scale_below_1_is_a_weight_as_in_diffusers():
    experts = replace(BASE, boundary_ratio=0.875)
    plan = plan_sampling(experts, SamplingRequest(guidance_scale=4, guidance_scale_2=0.5))
    assert (plan.guidance_scale, plan.guidance_scale_2) == (4, 0.5)
    assert not plan_sampling(experts, SamplingRequest(guidance_scale=1, guidance_scale_2=0)).guided


def test_a_negative_prompt_without_guidance_is_left_out_of_a_base_model():
    request = SamplingRequest(guidance_scale=1, negative_prompt=True)
    with pytest.warns(UserWarning, match="no effect without guidance"):
        assert not plan_sampling(BASE, request).guided
    with pytest.raises(WanError, match="no effect without guidance"):
        plan_sampling(STUDENT, replace(request, allow_untrained=True))


def test_few_steps_of_a_base_model_have_no_guidance_of_their_own():
    """Its weights are then a student's, merged from a LoRA, which has the guidance inside."""
    for request in (
        SamplingRequest(sampler="few_step", timesteps=TIMESTEPS),
        SamplingRequest(4, sampler="few_step"),
    ):
        assert not plan_sampling(BASE, request).guided
        assert plan_sampling(BASE, replace(request, guidance_scale=3)).guidance_scale == 3
    assert plan_sampling(BASE, SamplingRequest(timesteps=TIMESTEPS)).guidance_scale == 5


def test_numbers_of_numpy_and_torch_are_numbers():
    request = SamplingRequest(np.int64(4), shift=np.float32(3), guidance_scale=torch.tensor(2.0))
    plan = plan_sampling(BASE, request)
    assert (len(plan.schedule), plan.shift, plan.guidance_scale) == (4, 3.0, 2.0)
    listed = SamplingRequest(timesteps=np.array([1000, 757, 522]))
    assert plan_sampling(STUDENT, listed).untrained == ()
    assert (
        plan_sampling(STUDENT, SamplingRequest(timesteps=torch.tensor(TIMESTEPS))).spaced is False
    )


def test_a_refusal_is_spelled_for_python_and_for_commands():
    with pytest.raises(WanError) as error:
        plan_sampling(STUDENT, SamplingRequest(8, grid="uniform"))
    assert str(error.value).startswith("num_inference_steps=8, grid=uniform: ")
    assert "allow_untrained=True" in str(error.value)
    options = error.value.about("jobs.txt, line 3").on_command_line
    assert options.startswith("jobs.txt, line 3: steps=8, sampler.grid=uniform: ")
    assert "allow_untrained=true" in options

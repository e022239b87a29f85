"""Every preset composes into checked settings, and says what it is."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_args

import pytest

import configs
from configs import schema
from configs.ablation import AblateConfig
from configs.benchmark import BenchConfig
from configs.command_line import CommandLine, Shortcut, list_of, preset_names
from configs.compose import compose_runs
from configs.conversion import ConvertConfig
from configs.data import PreprocessConfig
from configs.distillation import DistillConfig
from configs.evaluation import EvaluateConfig, StudyConfig
from configs.measurement import MeasureConfig
from configs.parity import ParityConfig
from configs.rehearsal import RehearseConfig
from configs.schema import (
    MAX_SEED,
    LoadingConfig,
    SampleConfig,
    SamplerConfig,
    option,
    walk_options,
)
from configs.training import FinetuneConfig, TextEncoderTrainConfig, VAETrainConfig
from wan.errors import WanError
from wan.pipeline.pipeline import COMPILE
from wan.runtime.offload import OFFLOAD
from wan.sampling import noise
from wan.sampling.samplers import SAMPLERS
from wan.sampling.schedule import GRIDS
from wan.settings import NO_BOUND
from wan.weights.quantize import QUANTIZE

LINE = CommandLine(
    SampleConfig, "sample", shortcuts={"steps": Shortcut("sampler.steps", ("sampler.timesteps",))}
)


def settings(*tokens: str) -> SampleConfig:
    (run,) = compose_runs(LINE, tokens)
    return run.config


@pytest.mark.parametrize("model", preset_names("model"))
def test_model_presets_compose(model):
    config = settings(f"model={model}")
    assert isinstance(config.sampler, SamplerConfig)
    if not model.startswith("mini"):  # their own folders say all this
        stride = 32 if "5b" in model else 16
        assert (config.num_frames - 1) % 4 == 0
        assert config.height % stride == config.width % stride == 0


@pytest.mark.parametrize("sampler", preset_names("sampler"))
def test_sampler_presets_compose(sampler):
    config = settings(f"sampler={sampler}")
    assert config.sampler.name in (None, *SAMPLERS)
    assert config.sampler.grid in (None, *GRIDS.get(config.sampler.name, ()))


@pytest.mark.parametrize("group", ["model", "sampler", "method", "recipe", "experiment", "study"])
def test_presets_explain_themselves_in_a_sentence(group):
    for name in preset_names(group):
        lines = (Path(configs.__file__).parent / group / f"{name}.yaml").read_text().splitlines()
        comments = [line for line in lines[:2] if line.startswith("# ") and "@package" not in line]
        assert re.fullmatch(r"# [A-Z].{10,}\.", comments[0]), name


def test_yaml_names_no_python_code():
    for path in Path(configs.__file__).parent.rglob("*.yaml"):
        assert "_target_" not in path.read_text(), path


def test_the_released_recipes():
    """Numbers of the official code, and of the FastWan students' distillation."""
    fast = settings("model=fastwan_ti2v_5b")
    assert fast.sampler == SamplerConfig("few_step", None, [1000.0, 757.0, 522.0])
    assert (fast.guidance_scale, fast.negative_prompt) == (1.0, None)
    five = settings("model=wan22_ti2v_5b")
    assert five.sampler == SamplerConfig("unipc", 50, None, 5.0)
    assert (five.height, five.width, five.num_frames, five.fps) == (704, 1280, 121, 24)
    big = settings("model=wan22_t2v_a14b")
    assert big.sampler == SamplerConfig("unipc", 40, None, 12.0)
    # The folder's, 4 and 3: guidance_scale=1 would leave a preset's second one as it is
    assert (big.guidance_scale, big.guidance_scale_2) == (None, None)
    small = settings("model=wan21_t2v_1_3b")
    assert (small.sampler.shift, small.height, small.width, small.fps) == (3.0, 480, 832, 16)


def test_a_model_preset_keeps_its_shift_under_another_sampler():
    config = settings("model=wan22_t2v_a14b", "sampler=euler", "steps=50")
    assert config.sampler == SamplerConfig("euler", 50, None, 12.0)


def test_every_option_has_a_help_line():
    for name, _, item in walk_options(SampleConfig):
        assert item.metadata.get("help"), name


@pytest.mark.parametrize(
    "schema",
    [
        *(AblateConfig, BenchConfig, ConvertConfig, EvaluateConfig, MeasureConfig, ParityConfig),
        *(RehearseConfig, SampleConfig, StudyConfig),
        *(DistillConfig, FinetuneConfig, PreprocessConfig, TextEncoderTrainConfig, VAETrainConfig),
    ],
)
def test_every_number_says_between_what_it_lies(schema):
    """Or has a check of its own; the attention and the timesteps are checked as a whole."""
    free = {"sampler.timesteps", "lora_strength", "lora_strength_2", "data.seed"}
    free |= {"student.timesteps", "student.more_timesteps", "gan.blocks"}
    for name, kind, item in walk_options(schema):
        entry = list_of(kind) or kind
        if not {int, float} & {entry, *get_args(entry)} or name.startswith("attention."):
            continue
        limits = [item.metadata.get(end, NO_BOUND) for end in ("low", "high")]
        said = item.metadata.get("check") is not None or limits != [NO_BOUND, NO_BOUND]
        assert said != (name in free), name


def test_options_share_no_list_between_configs():
    field = option([1], "a list")
    assert field.default_factory() is not field.default_factory()


def test_sampler_takes_at_most_one_of_steps_and_timesteps():
    with pytest.raises(WanError, match="only one"):
        SamplerConfig("euler", steps=3, timesteps=[1000.0])
    assert SamplerConfig().steps is None


def test_seeds_and_choices_are_those_of_the_model():
    assert MAX_SEED == noise.MAX_SEED
    assert set(schema.SAMPLERS) == set(SAMPLERS)
    assert set(schema.GRIDS) == set().union(*GRIDS.values())
    choices = {item.name: item.metadata["choices"] for item in fields(LoadingConfig)}
    assert choices["offload"] == OFFLOAD
    assert choices["quantize"] == QUANTIZE
    assert choices["compile"] == COMPILE


@pytest.mark.parametrize(
    "schema", [VAETrainConfig, TextEncoderTrainConfig, FinetuneConfig, DistillConfig]
)
def test_updates_that_teach_nothing_are_refused(schema):
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(WanError, match="must be above 0; to clip nothing, set 1e9"):
            schema(grad_clip=value)
    for value in (-1.0, 1.0) if schema is not TextEncoderTrainConfig else ():
        with pytest.raises(WanError, match=r"ema_decay=.*: must lie in \[0, 1\)"):
            schema(ema_decay=value)


def test_settings_are_plain_data():
    json.dumps(asdict(settings("prompt=${x}")))

"""The settings of a model are checked for type and range by the dataclass that owns them."""

import dataclasses
from dataclasses import dataclass, fields

import pytest
from test_pipeline import DIT, TEXT, VAE

from wan.errors import WanError
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config
from wan.models.vae_config import VAEConfig
from wan.pipeline.config import PipelineConfig, SamplingDefaults
from wan.sampling.scheduler_config import CLASSES, FIELDS, read_scheduler
from wan.settings import bounded, check_settings


@dataclass(frozen=True)
class Sample:
    whole: int = bounded(3, at_least=1, at_most=9)
    real: float = bounded(0.5, above=0, below=1)
    maybe: int | None = bounded(None, at_least=0)
    switch: bool = True
    name: str = "x"
    three: tuple[int, int, int] = bounded((1, 2, 3), at_least=1)
    many: tuple[float, ...] = bounded((), at_least=-1, max_length=2)
    other: object = None

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"whole": "3"}, "whole='3': must be a whole number"),
        ({"whole": True}, "whole=True: must be a whole number"),
        ({"whole": 3.0}, "whole=3.0: must be a whole number"),
        ({"whole": 10}, "whole=10: must be between 1 and 9"),
        ({"real": True}, "real=True: must be a number"),
        ({"real": 0}, "real=0: must lie in (0, 1)"),
        ({"real": float("nan")}, "real=nan: must be a number"),
        ({"maybe": -1}, "maybe=-1: must be a number of at least 0"),
        ({"switch": 1}, "switch=1: must be true or false"),
        ({"name": None}, "name=None: must be a text"),
        ({"three": [1, 2]}, "three=[1, 2]: must be a list of 3"),
        ({"three": [1, 2, 0]}, "three=0: must be a number of at least 1"),
        ({"three": 3}, "three=3: must be a list"),
        ({"many": [1, 2, 3]}, "many has 3 entries: must have at most 2"),
        ({"many": [1, "2"]}, "many=[1, '2']: must be a list, each a number"),
        ({"name": ["x" * 500]}, "xxx...: must be a text"),
    ],
)
def test_types_and_bounds(values, words):
    with pytest.raises(WanError) as caught:
        Sample(**values)
    assert words in str(caught.value)


def test_what_fits_stays_as_it_is():
    sample = Sample(whole=9, real=0.25, maybe=0, three=[4, 5, 6], many=[1, -1.0], other="anything")
    assert sample.three == (4, 5, 6)
    assert sample.many == (1, -1.0)
    assert Sample() == Sample(maybe=None)


SETTINGS = {
    "transformer": DIT,
    "vae": VAE,
    "text_encoder": TEXT,
    "defaults": SamplingDefaults(),
    "pipeline": PipelineConfig("WanPipeline", DIT, VAE, TEXT),
}
CASES = [
    (name, item.name)
    for name, settings in SETTINGS.items()
    for item in fields(settings)
    if item.name not in ("transformer", "vae", "text_encoder", "scheduler", "own_scheduler")
    and item.name not in ("class_name", "defaults")
]


@pytest.mark.parametrize(("name", "field"), CASES)
@pytest.mark.parametrize("value", [{}, -(10**12), 10**12, float("inf"), [None]])
def test_no_field_takes_what_makes_no_sense(name, field, value):
    """Also the fields that nobody thought of: each has a type, and a number has two ends."""
    free = ("latents_mean",)  # any finite number
    if field in free and isinstance(value, int):
        value = [value]  # of the wrong length
    with pytest.raises(WanError, match=field):
        dataclasses.replace(SETTINGS[name], **{field: value})


@pytest.mark.parametrize("config", [DiTConfig, VAEConfig, UMT5Config])
def test_the_released_settings_and_the_defaults_are_within_the_bounds(config):
    assert config() == config.from_json(config().to_json())


@pytest.mark.parametrize("scheduler", CLASSES)
def test_no_field_of_a_scheduler_takes_another_type(scheduler):
    needed = {"_class_name": scheduler, "prediction_type": "flow_prediction"}
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        needed |= {"use_flow_sigmas": True}
    read_scheduler(needed)
    for key, rule in FIELDS[scheduler].items():
        if rule.default is None and not rule.allowed:
            continue  # without effect, or checked where it is used
        for value in ({"x": 1}, "\x1b[2J", float("nan")):
            if isinstance(rule.default, str) and isinstance(value, str) and not rule.allowed:
                continue
            with pytest.raises(WanError, match=key):
                read_scheduler(needed | {key: value})

"""The settings of the commands that measure: evaluate and study."""

import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from configs.schema import (
    PARTS,
    PICTURES,
    LoadingConfig,
    Options,
    PartsConfig,
    SamplerConfig,
    check_choice,
    check_ending,
    check_seed,
    count,
    option,
    seed_option,
    share,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

SOURCES = ("model", "renders", "vae")
SPLITS = ("heldout", "train", "any")
CAPTION_SETS = ("single", "pair", "seeds")  # of a study: options of `StudyConfig`


@dataclass
class CaptionSetConfig(Options):
    """Which captions of the miniature's world are made, and how often."""

    num_captions: int = count(512, "number of captions; the seed chooses which")
    seeds_per_caption: int = count(1, "clips of each; with several, their diversity is measured")
    split: str = option(
        "heldout", "heldout (combinations never trained on), train or any", choices=SPLITS
    )
    num_objects: int | None = option(
        1, "1 or 2; null: 60 % of the scenes have one object, 40 % two", at_least=1, at_most=2
    )
    omit: float = share(0.0, "chance that a caption leaves an attribute unsaid; training has 0.15")
    seed: int = seed_option(0, "chooses captions and noise; clip i gets noise seed + i")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed + num_captions * seeds_per_caption - 1", self.seed + self.num_clips - 1)
        if self.seeds_per_caption > 1 and self.num_objects != 1:
            raise WanError(
                f"seeds_per_caption={self.seeds_per_caption} with num_objects={self.num_objects}: "
                "diversity is measured on captions of one object; set num_objects=1"
            )

    @property
    def num_clips(self) -> int:
        return self.num_captions * self.seeds_per_caption


@dataclass
class RunConfig(Options):
    """How a model is run. None means as the preset or the model's own folder says."""

    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    guidance_scale: float | None = option(None, "weight of the prompt; 1 = no guidance", at_least=1)
    allow_untrained: bool = option(False, "let a few-step student do what it was not trained for")


@dataclass
class EvaluateConfig(LoadingConfig, PartsConfig, RunConfig, CaptionSetConfig):
    """`python -m infer.evaluate`: how often clips of the miniature's world match their captions.

    What is None here and in the preset is taken from the checkpoint's own folder.
    """

    source: str = option(
        "model",
        "model, or a ceiling: renders (the truth itself), vae (the truth through the autoencoder)",
        choices=SOURCES,
    )
    batch_size: int = count(16, "clips at a time; changes no clip")
    negative_prompt: str | None = option(None, "what videos should not show; needs guidance")
    max_sequence_length: int | None = count(None, "text tokens that are read, padding included")
    height: int = option(128, "pixels; the world is square", at_least=64)
    width: int = option(128, "pixels", at_least=64)
    num_frames: int = option(
        17, "4k + 1; at least 9, as in fewer frames a circle looks like a line", at_least=9
    )
    fps: float | None = option(
        None,
        "frames per second of the clips that are kept; none: 8. Everything is measured per frame",
        at_least=1,
        at_most=240,
    )
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    output: str | None = option(
        None, "also write every clip's numbers to this JSON file, and features beside"
    )
    sheet: str | None = option(None, "also write a PNG with frames of clips that do not match")
    keep_clips: int = option(
        64,
        "with output=: clips that are kept as mp4 and shown on the page",
        at_least=0,
        needs=("output",),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ending("output", self.output, (".json",))
        check_ending("sheet", self.sheet, PICTURES)
        if self.height != self.width:
            raise WanError(f"height={self.height}, width={self.width}: the world is square")

    def question(self) -> dict[str, Any]:
        """The settings that numbers depend on."""
        free = {"batch_size", "output", "sheet", "offload", "quantize", "compile", "keep_clips"}
        free |= {*PARTS, "variant"}  # the digests of the weights say more
        if self.source == "renders":
            free |= {"checkpoint", "revision"}
        loading: dict[str, Any] = loading_key(self) if self.source == "model" else {}
        loading["sampler"] = self.sampler.key()
        return {name: value for name, value in asdict(self).items() if name not in free} | loading


def loading_key(config: Any) -> dict[str, str]:
    """The loading options that a stored clip depends on; the default ones are left out.

    `offload` changes no number, on a CPU its rounding at most. `compile` changes rounding only; it
    is included because seconds are stored with a clip.
    """
    chosen = {name: getattr(config, name) for name in ("quantize", "compile")}
    return {name: value for name, value in chosen.items() if value != "none"}


def question_of(*groups: Any, **own: Any) -> EvaluateConfig:
    """The evaluation with those options that the groups have; later groups and `own` win."""
    names = {item.name for item in fields(EvaluateConfig)}
    values: dict[str, Any] = {}
    for group in groups:
        values |= {name: value for name, value in vars(group).items() if name in names}
    return EvaluateConfig(**values | own)


@dataclass
class SettingConfig(RunConfig):
    """One setting of a study: a model and how it is run."""

    source: str = option("model", "model, or a ceiling: renders, vae", choices=SOURCES)
    checkpoint: str | None = option(None, "a folder or a hub id; none: the study's own")
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    share: float = option(
        1.0, "part of every caption set that is made: the first so many", above=0, at_most=1
    )
    line: str | None = option(None, "settings of one line are joined in the picture")


@dataclass
class MatchConfig(Options):
    """Names of the settings that the match rule compares."""

    student: str = option(MISSING, "the few-step model")
    repeats: list[str] = option([], "the same trained again from other seeds: the mean is compared")
    teacher: str = option(MISSING, "the many-step model")
    baseline: str | None = option(None, "the teacher at as few steps as the student")
    floor: str = option("renders", "the truth against other draws of the truth")

    @property
    def students(self) -> list[str]:
        """All trainings of the student."""
        return [self.student, *self.repeats]

    @property
    def names(self) -> list[str]:
        """Everything that a verdict needs."""
        baseline = [] if self.baseline is None else [self.baseline]
        return [*self.students, self.teacher, self.floor, *baseline]


def check_folder_name(name: str) -> None:
    """Names of settings become folders."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise WanError(f"setting {name!r}: letters, digits and _ . - only")


@dataclass
class StudyConfig(LoadingConfig):
    """`python -m infer.study`: several settings on the same captions, and one report of them."""

    output_dir: str = option("runs/study", "results of settings, the table and the picture")
    report_only: bool = option(False, "make no clips, only the report of what is stored")
    only: list[str] | None = option(None, "names of settings to run; the others are left as stored")
    settings: dict[str, SettingConfig] = option({}, "name -> what to run, see SettingConfig")
    match: MatchConfig = field(default_factory=MatchConfig)
    single: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    pair: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    seeds: CaptionSetConfig = field(default_factory=CaptionSetConfig)
    batch_size: int = count(8, "clips at a time; changes no clip")
    keep_clips: int = option(
        16,
        "clips of each setting and set of captions that are kept for the page",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.settings:
            raise WanError("settings= is empty: a study needs at least one setting")
        for name in self.settings:
            check_folder_name(name)
            for captions in CAPTION_SETS:
                self.evaluation(name, captions)
        match = {f"match.{role}": named for role, named in vars(self.match).items()}
        for where, named in {"only": self.only, **match}.items():
            for name in named if isinstance(named, list) else [named]:
                if name is not None:
                    check_choice(where, name, tuple(self.settings))

    def evaluation(self, name: str, captions: str) -> EvaluateConfig:
        """The evaluation of one setting on one of `CAPTION_SETS`."""
        setting, chosen = self.settings[name], getattr(self, captions)
        own_model = setting.checkpoint is not None
        return question_of(
            *(self, chosen, setting),
            num_captions=max(2, round(setting.share * chosen.num_captions)),
            checkpoint=setting.checkpoint if own_model else self.checkpoint,
            revision=None if own_model else self.revision,
            variant=None if own_model else self.variant,
        )

"""The settings of `python -m infer.ablate`, which measures a grid of settings."""

import itertools
from dataclasses import dataclass, field, fields, replace

from omegaconf import MISSING

from configs.evaluation import SPLITS, EvaluateConfig, RunConfig, question_of
from configs.measurement import MEASURES, MeasuringConfig
from configs.schema import (
    MAX_STEPS,
    SAMPLERS,
    LoadingConfig,
    Options,
    SamplerConfig,
    check_prompt,
    check_seed,
    count,
    option,
    positive,
    seed_option,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig


@dataclass
class GridConfig(Options):
    """What is varied: every combination is one setting. An empty list varies nothing.

    In a list, null means what the preset or the model's own folder says.
    """

    attention: list[str] = option([], "names of attentions, or of variants; empty: sdpa")
    sampler: list[str | None] = option([], "names of samplers", choices=SAMPLERS)
    shift: list[float | None] = option([], "shifts of the noise levels", above=0)
    guidance_scale: list[float | None] = option([], "weights of the prompt", at_least=1)
    steps: list[int | None] = option(
        [], "numbers of network evaluations", at_least=1, at_most=MAX_STEPS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, values in vars(self).items():
            if len(set(values)) < len(values):
                raise WanError(f"grid.{name}={values}: name each value once")


@dataclass
class ModelConfig(Options):
    """One of several models that are compared."""

    checkpoint: str = option(MISSING, "a folder or a hub id")
    allow_untrained: bool = option(False, "let a few-step student do what it was not trained for")
    grid: GridConfig = field(default_factory=GridConfig)  # its lists replace those of all models


@dataclass
class ReferenceConfig(Options):
    """What clips are compared with: the same noise, exact attention, many steps.

    The reference is loaded as the clips' models are but never quantised, so that the error of
    quantisation is measured too. None means the preset's value where the reference is the same
    model, and otherwise the value of its folder.
    """

    checkpoint: str | None = option(None, "a folder or a hub id; none: each model its own")
    sampler: str | None = option(None, "name of a sampler", choices=SAMPLERS)
    steps: int | None = option(
        50,
        "network evaluations; null: as many as the model is made for",
        at_least=1,
        at_most=MAX_STEPS,
    )
    shift: float | None = positive(None, "shift of the noise levels")
    guidance_scale: float | None = option(None, "weight of the prompt", at_least=1)


@dataclass(frozen=True)
class Setting:
    """One point of the grid: a model and how it is run."""

    model: str
    checkpoint: str
    allow_untrained: bool
    attention_name: str
    attention: AttentionConfig
    sampler: SamplerConfig
    guidance_scale: float | None

    def axes(self) -> dict[str, str]:
        """What tells settings apart, in words."""
        sampler, guidance = self.sampler, self.guidance_scale
        steps = len(sampler.timesteps) if sampler.timesteps else sampler.steps
        return {
            "model": self.model,
            "attention": self.attention_name,
            "sampler": sampler.name or "own sampler",
            "shift": "own shift" if sampler.shift is None else f"shift {sampler.shift:g}",
            "guidance_scale": "own guidance" if guidance is None else f"guidance {guidance:g}",
            "steps": "own steps" if steps is None else f"{steps} step{'s' * (steps > 1)}",
        }


def changed(
    base: SamplerConfig, name: str | None, shift: float | None, steps: int | None
) -> SamplerConfig:
    """A sampler with those values that are given; a number of steps replaces listed timesteps."""
    return SamplerConfig(
        name or base.name,
        base.steps if steps is None else steps,
        base.timesteps if steps is None else None,
        base.shift if shift is None else shift,
        base.grid if name in (None, base.name) else None,
    )


@dataclass
class AblateConfig(LoadingConfig, MeasuringConfig, RunConfig):
    """`python -m infer.ablate`: every combination of some settings, each measured.

    Without a prompt, captions of the miniature's world are made and read by its detectors. With
    prompts, clips of any model are compared with its exact many-step result on the same noise.
    """

    output_dir: str = option("runs/ablation", "results, tables, picture and contact-sheet video")
    report_only: bool = option(False, "make no clips, only the report of what is stored")

    prompt: str | None = option(
        None, "what the videos show; any text, exactly as typed", check=check_prompt
    )
    prompt_file: str | None = option(None, "a file of several prompts, one a line")
    prompts: list[str] = option(
        [], "from an experiment, used if neither of the two is given", check=check_prompt
    )
    seed: int = seed_option(
        0,
        "the first seed, of noise and, without prompts, of captions",
        several="num_seeds=2 takes seed and seed + 1 into one report; add -m for a report of each",
    )
    num_seeds: int = count(
        1, "number of seeds: seed, seed + 1, ..; each prompt gets a clip of each"
    )
    num_captions: int = count(64, "without prompts: captions per seed")
    num_objects: int = option(
        1, "without prompts: objects per caption, 1 or 2", at_least=1, at_most=2
    )
    split: str = option("heldout", "without prompts: heldout, train or any", choices=SPLITS)
    batch_size: int = count(8, "without prompts: clips at a time; changes no clip")
    keep_clips: int = option(
        64, "without prompts: clips of each cell that are kept and shown on the page", at_least=0
    )

    measures: list[str] = option(
        [], f"of each prompt's clips too: which of {', '.join(MEASURES)}", choices=MEASURES
    )
    made_for: list[str] = option([], "model presets that an experiment fits; empty: any")
    models: dict[str, ModelConfig] = option(
        {}, "several models: name -> checkpoint, see ModelConfig"
    )
    grid: GridConfig = field(default_factory=GridConfig)
    variants: dict[str, AttentionConfig] = option({}, "name -> an attention with options")
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)

    guidance_scale_2: float | None = option(
        None, "the same for the second expert of models with two", at_least=0
    )
    negative_prompt: str | None = option(None, "what videos should not show, where guided")
    max_sequence_length: int | None = count(None, "prompt tokens that are read")
    height: int | None = count(None, "pixels")
    width: int | None = count(None, "pixels")
    num_frames: int | None = count(None, "4k + 1")
    fps: float | None = option(
        None, "frames per second of the written videos; none: 8", at_least=1, at_most=240
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt_file is not None:
            raise WanError("prompt= and prompt_file=: give only one of them")
        if len(set(self.prompts)) < len(self.prompts):
            raise WanError("prompts=: one is there twice; num_seeds= makes more of it")
        check_seed("seed + num_seeds - 1", self.seeds[-1])
        self.settings()

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    @property
    def in_world(self) -> bool:
        """Whether captions of the miniature's world are made, for lack of prompts."""
        return self.prompt is None and self.prompt_file is None and not self.prompts

    def unquantized(self) -> "AblateConfig":
        """The settings by which references are loaded."""
        return replace(self, quantize="none")

    def check_world(self) -> None:
        """Refuse what captions of the world can't be made with.

        Not when the settings are read: a typed prompt is put into them only after that.
        """
        if not self.in_world:
            return
        if self.height != self.width or self.guidance_scale_2 is not None:
            raise WanError(
                "no prompt: without one, captions of the miniature's square world are made; "
                "for other models give prompt= or prompt_file="
            )
        if self.measures:
            raise WanError(
                "measures=: for clips of prompts; captions of the miniature's world are read by "
                "its own detectors, which know more. Give prompt= or leave measures= out"
            )
        self.evaluation(self.settings()[0], self.seeds[-1])

    def settings(self) -> list[Setting]:
        """Every combination, model by model; the number of steps changes fastest.

        Raises:
            WanError: a value that no sampler or no attention can have.
        """
        axes = [item.name for item in fields(GridConfig)]
        base = ModelConfig(self.checkpoint, self.allow_untrained)
        settings = []
        for model, one in (self.models or {"model": base}).items():
            lists = [getattr(one.grid, n) or getattr(self.grid, n) or [None] for n in axes]
            for attention, sampler, shift, guidance, steps in itertools.product(*lists):
                name = attention or "sdpa"
                settings.append(
                    Setting(
                        model,
                        one.checkpoint,
                        one.allow_untrained,
                        name,
                        self.variants.get(name) or AttentionConfig(name),
                        changed(self.sampler, sampler, shift, steps),
                        self.guidance_scale if guidance is None else guidance,
                    )
                )
        names = [tuple(one.axes().values()) for one in settings]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise WanError(f"the grid has {', '.join(twice)} twice: name each value once")
        return settings

    def reference_of(self, setting: Setting) -> Setting:
        """What the clips of a setting are compared with."""
        chosen = self.reference
        other = chosen.checkpoint is not None
        base = SamplerConfig() if other else self.sampler
        return Setting(
            model="reference" if other else setting.model,
            checkpoint=chosen.checkpoint or setting.checkpoint,
            allow_untrained=False,
            attention_name="sdpa",
            attention=AttentionConfig(),
            sampler=changed(base, chosen.sampler, chosen.shift, chosen.steps),
            guidance_scale=chosen.guidance_scale or (None if other else self.guidance_scale),
        )

    def evaluation(self, setting: Setting, seed: int = 0) -> EvaluateConfig:
        """The evaluation of one setting and seed.

        Outside the world, this only says how the model is loaded and run.
        """
        size = {name: getattr(self, name) for name in ("height", "width", "num_frames")}
        default = {name: getattr(EvaluateConfig, name) for name in size}
        if self.in_world:
            default |= {name: value for name, value in size.items() if value is not None}
        negative = self.negative_prompt if self.in_world else None
        return question_of(self, setting, **default, seed=seed, negative_prompt=negative, fps=None)

"""The settings of `python -m infer.bench`."""

from dataclasses import dataclass, field, fields, replace

from configs.schema import (
    DTYPES,
    Options,
    check_choice,
    check_device,
    check_every_step,
    count,
    option,
    positive,
    seed_option,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

COMPARED = ("text", "encode", "decode", "dit", "block", "pipeline", "load")
STAGES = ("text", "denoise", "decode")
# Options that only one of the two modes reads.
OF_COMPARED: tuple[str, ...] = ("checkpoint", "block_heads", "load_gb")
OF_STAGES = ("parity", "compile", "compile_backend", "goal_seconds", "peak_tflops")


def check_timed_device(name: str, value: str) -> None:
    check_device(name, value)
    if value == "mps":
        raise WanError(f"{name}={value}: nothing else than cpu or cuda can be timed here")


@dataclass
class BenchConfig(Options):
    """`python -m infer.bench`: what is timed, and how."""

    targets: list[str] = option(
        [], "[text,encode,decode,dit,block,pipeline,load], for stages [text,denoise,decode]; [] all"
    )
    checkpoint: str = option("mini", "mini, mini-teacher, random, a release's folder, a hub id")
    dtypes: list[str] = option(
        [], "dtypes of the networks; [] those that each target has its aim for", choices=DTYPES
    )
    repeats: int = option(
        5,
        "timed calls of each side, taking turns",
        at_least=2,  # one call has no spread
    )
    most_seconds: float = positive(60.0, "a target is left out if one call of a side takes longer")
    warmup: int = count(1, "untimed calls before them")
    clock: str = option(
        "wall",
        "time in the table: wall, or cpu (of all threads; for a busy machine)",
        choices=("wall", "cpu"),
    )
    threads: int | None = count(None, "threads of PyTorch on the CPU")
    seed: int = seed_option(0, "seed of inputs and random weights")
    prompt_tokens: int = option(
        30, "tokens of the prompt, the final </s> included", at_least=1, at_most=512
    )
    height: int | None = count(None, "pixels of the video; none: the model's own, 704 for stages")
    width: int | None = count(None, "pixels; 1280 for stages")
    num_frames: int | None = count(None, "4k + 1; 121 for stages")
    steps: int = count(3, "network evaluations of pipeline and denoise, without guidance")
    block_heads: int = count(24, "width of the block in heads of 128 channels; the 5B has 24")
    load_gb: float = positive(0.2, "size of the folder that is loaded, in 10^9 bytes")
    stages: str | None = option(
        None,
        "full or tiny: our 5B alone, random weights; full is what device=cuda does",
        choices=("full", "tiny"),
    )
    device: str = option(
        "auto", "auto (cuda if there is one, else cpu), cpu, cuda", check=check_timed_device
    )
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parity: bool = option(True, "before stages: hold bfloat16 on the device against diffusers")
    compile: bool = option(True, "time stages compiled too")
    compile_backend: str = option(
        "inductor",
        "inductor; eager and aot_eager only trace (for tests)",
        choices=("inductor", "aot_eager", "eager"),
    )
    goal_seconds: float = positive(6.0, "aim for all stages together; 6 is for TI2V-5B on one H100")
    peak_tflops: float = positive(790.0, "rate of the device; 790 is dense bfloat16 on an H100")
    profile: bool = option(False, "write where each side's time goes; for loading, print it")
    output_dir: str = option("outputs/bench", "for bench.json, which is replaced, and profiles")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is None and self.device.startswith("cuda"):
            self.stages = "full"
        for target in self.targets:
            check_choice("targets", target, self.all_targets)
        check_every_step(self.attention)

    def on(self, device: str) -> "BenchConfig":
        """The settings for the device that `auto` is here: a GPU has stages, a CPU is compared.

        Raises:
            WanError: a target that only CPUs have, or an option that nothing would read.
        """
        others = [target for target in self.targets if target not in STAGES]
        if self.device == "auto" and self.stages is None and device != "cpu" and others:
            raise WanError(
                f"targets={','.join(others)}: timed beside diffusers, on the CPU only, and "
                f"device=auto is {device} here; add device=cpu, or choose {', '.join(STAGES)}"
            )
        config = replace(self, device=device)
        config.check_read()
        return config

    def check_read(self) -> None:
        """Refuse options of the other mode: of stages where sides are compared, and the reverse."""
        idle, mode = OF_COMPARED, "compare with diffusers, by device=cpu and no stages="
        if self.stages is None:
            idle, mode = OF_STAGES, "add stages=full"
        for item in fields(self):
            if item.name in idle and getattr(self, item.name) != item.default:
                raise WanError(
                    f"{item.name}={getattr(self, item.name)}: nothing reads it here; leave it out, "
                    f"or {mode}"
                )

    @property
    def all_targets(self) -> tuple[str, ...]:
        return COMPARED if self.stages is None else STAGES

    def chosen(self) -> tuple[str, ...]:
        return tuple(self.targets) or self.all_targets

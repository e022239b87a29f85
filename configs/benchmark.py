"""The settings of `python -m infer.bench`."""

from dataclasses import dataclass, field

from configs.schema import (
    DTYPES,
    Options,
    check_choice,
    check_device,
    check_every_step,
    check_seed,
    option,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

COMPARED = ("text", "encode", "decode", "dit", "block", "pipeline", "load")
STAGES = ("text", "denoise", "decode")


def check_timed_device(name: str, value: str) -> None:
    check_device(name, value)
    if not value.startswith(("cpu", "cuda")):
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
    warmup: int = option(1, "untimed calls before them", at_least=1)
    clock: str = option(
        "wall",
        "time in the table: wall, or cpu (of all threads; for a busy machine)",
        choices=("wall", "cpu"),
    )
    threads: int | None = option(None, "threads of PyTorch on the CPU", at_least=1)
    seed: int = option(0, "seed of inputs and random weights", check=check_seed)
    prompt_tokens: int = option(30, "tokens of the prompt, the final </s> included", at_least=1)
    height: int | None = option(
        None, "pixels of the video; none: the model's own, 704 for stages", at_least=1
    )
    width: int | None = option(None, "pixels; 1280 for stages", at_least=1)
    num_frames: int | None = option(None, "4k + 1; 121 for stages", at_least=1)
    steps: int = option(
        3, "network evaluations of pipeline and denoise, without guidance", at_least=1
    )
    block_heads: int = option(
        24, "width of the block in heads of 128 channels; the 5B has 24", at_least=1
    )
    load_gb: float = option(0.2, "size of the folder that is loaded, in 10^9 bytes", above=0)
    stages: str | None = option(
        None,
        "full or tiny: our 5B alone, random weights; full is what device=cuda does",
        choices=("full", "tiny"),
    )
    device: str = option("cpu", "cpu or cuda", check=check_timed_device)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parity: bool = option(True, "before stages: hold bfloat16 on the device against diffusers")
    compile: bool = option(True, "time stages compiled too")
    compile_backend: str = option(
        "inductor",
        "inductor; eager and aot_eager only trace (for tests)",
        choices=("inductor", "aot_eager", "eager"),
    )
    goal_seconds: float = option(
        6.0, "aim for all stages together; 6 is for TI2V-5B on one H100", above=0
    )
    peak_tflops: float = option(
        790.0, "rate of the device; 790 is dense bfloat16 on an H100", above=0
    )
    profile: bool = option(False, "write where each side's time goes; for loading, print it")
    output_dir: str = option("outputs/bench", "for bench.json, which is replaced, and profiles")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages is None and self.device != "cpu":
            self.stages = "full"
        for target in self.targets:
            check_choice("targets", target, self.all_targets)
        check_every_step(self.attention)

    @property
    def all_targets(self) -> tuple[str, ...]:
        return COMPARED if self.stages is None else STAGES

    def chosen(self) -> tuple[str, ...]:
        return tuple(self.targets) or self.all_targets

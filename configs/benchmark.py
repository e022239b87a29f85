"""Settings of `python -m infer.bench`."""

from dataclasses import dataclass, field

from configs.schema import (
    DTYPES,
    check_at_least,
    check_choice,
    check_device,
    check_every_step,
    check_positive,
    check_seed,
    option,
)
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

COMPARED = ("text", "encode", "decode", "dit", "block", "pipeline", "load")
STAGES = ("text", "denoise", "decode")
SIZES = ("full", "tiny")
COMPILERS = ("inductor", "aot_eager", "eager")


@dataclass
class BenchConfig:
    """What is timed, and how."""

    targets: list[str] = option(
        [], "[text,encode,decode,dit,block,pipeline,load], of stages [text,denoise,decode]; [] all"
    )
    checkpoint: str = option("mini", "mini, mini-teacher, random, a release's folder, a hub id")
    dtypes: list[str] = option([], "of the compared networks; [] as the targets are stated")
    repeats: int = option(5, "timed calls of each side, taking turns")
    warmup: int = option(1, "calls before them")
    clock: str = option("wall", "what the table shows: wall, or cpu (of all threads; busy machine)")
    threads: int | None = option(None, "of PyTorch on the CPU")
    seed: int = option(0, "of inputs and random weights")
    prompt_tokens: int = option(30, "tokens of the prompt, the final </s> included")
    height: int | None = option(None, "pixels of the video; none is the model's own, 704 of stages")
    width: int | None = option(None, "pixels; 1280 of stages")
    num_frames: int | None = option(None, "4k + 1; 121 of stages")
    steps: int = option(3, "network evaluations of pipeline and denoise, without guidance")
    block_heads: int = option(24, "width of the block in heads of 128 channels; 24 is the 5B's")
    load_gb: float = option(0.2, "size of the folder that is loaded, in 10^9 bytes")
    stages: str | None = option(
        None, "full or tiny: our 5B alone, random weights; full is what device=cuda does"
    )
    device: str = option("cpu", "cpu or cuda")
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    parity: bool = option(True, "of stages: first hold bfloat16 on the device against diffusers")
    compile: bool = option(True, "time stages compiled too")
    compile_backend: str = option("inductor", "inductor; eager and aot_eager only trace (tests)")
    goal_seconds: float = option(6.0, "of all stages together; 6 is for TI2V-5B on one H100")
    peak_tflops: float = option(790.0, "rate of the floor; 790 is dense bfloat16 on an H100")
    profile: bool = option(False, "write where each side's time goes; of loading, print it")
    output_dir: str = option("outputs/bench", "for bench.json, which is replaced, and profiles")

    def __post_init__(self) -> None:
        check_device("device", self.device)
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise WanError(f"device={self.device}: nothing else than cpu or cuda can be timed here")
        if self.stages is None and self.device.startswith("cuda"):
            self.stages = "full"
        if self.stages is not None:
            check_choice("stages", self.stages, SIZES)
        elif self.device != "cpu":
            raise WanError(f"device={self.device}: the comparison runs on the cpu; see stages=")
        allowed = COMPARED if self.stages is None else STAGES
        for target in self.targets:
            check_choice("targets", target, allowed)
        for dtype in self.dtypes:
            check_choice("dtypes", dtype, DTYPES)
        check_choice("clock", self.clock, ("wall", "cpu"))
        check_choice("compile_backend", self.compile_backend, COMPILERS)
        check_every_step(self.attention)
        check_at_least("repeats", self.repeats, 2)  # one has no spread
        for name in ("warmup", "prompt_tokens", "steps", "block_heads"):
            check_at_least(name, getattr(self, name), 1)
        if self.threads is not None:
            check_at_least("threads", self.threads, 1)
        for name in ("height", "width", "num_frames"):
            if getattr(self, name) is not None:
                check_at_least(name, getattr(self, name), 1)
        for name in ("load_gb", "peak_tflops", "goal_seconds"):
            check_positive(name, getattr(self, name))
        check_seed("seed", self.seed)

    def chosen(self) -> tuple[str, ...]:
        return tuple(self.targets) or (COMPARED if self.stages is None else STAGES)

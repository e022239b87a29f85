"""The settings of `python -m infer.convert`, which writes other layouts and LoRA files."""

from dataclasses import dataclass

from configs.schema import DTYPES, PARTS, PartsConfig, count, option, positive
from wan.errors import WanError


@dataclass
class ConvertConfig(PartsConfig):
    """`python -m infer.convert`."""

    source: str = option(
        "",
        "a component (file, index, folder), a whole release folder, ComfyUI's models, mini or "
        "mini-teacher",
    )
    output: str = option("", "a folder to make, not there or empty; for a LoRA a .safetensors file")
    layout: str = option("", "diffusers, official or prefixed")
    base: str | None = option(None, "write a LoRA: the transformer that source was trained from")
    rank: int | None = count(None, "rank of the LoRA's pairs")
    diffs: bool = option(False, "the LoRA also keeps changed biases, norms and tables, whole")
    device: str = option(
        "cpu",
        "where a LoRA is computed: cpu, or cuda for large models",
        choices=("cpu", "cuda"),  # other devices know no float64
    )
    # float16 is no choice: weights beyond its range would become infinite.
    dtype: str | None = option(
        None, "float32 or bfloat16; none keeps every bit, for a LoRA float32", choices=DTYPES
    )
    round_all: bool = option(False, "dtype= also for what models keep in float32: smaller files")
    config: str | None = option(None, "config.json of a component that has none beside it")
    shard_gb: float = positive(
        5.0, "largest weight file, in 10^9 bytes; layout=prefixed is always one"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.round_all and self.dtype is None:
            raise WanError("round_all=true without dtype=: say what to round to")

    def check_task(self) -> None:
        """Refuse missing options, and those of the other task.

        This is not in `__post_init__`, because literal paths are filled in after it.
        """
        needed = ("layout",) if self.base is None else ("rank",)
        whole = {"transformer", "vae", "text_encoder"} <= self.parts.keys()
        source = () if self.base is None and whole else ("source",)
        for name in (*source, "output", *needed):
            if getattr(self, name) in (None, ""):
                raise WanError(f"{name}= is missing; --help shows how to call this command")
        lora = ("rank", "diffs", "device")
        other = ("layout", "config", "round_all", "shard_gb", *PARTS)
        idle = lora if self.base is None else other
        for name in idle:
            if getattr(self, name) != getattr(ConvertConfig, name):
                task = "only with base=, for a LoRA" if self.base is None else "not for a LoRA"
                raise WanError(f"{name}={getattr(self, name)}: {task}")

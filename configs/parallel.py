"""How the processes of a training run share its work."""

from dataclasses import dataclass

from configs.schema import check_at_least, check_choice, option

CHECKPOINT_BLOCKS = ("none", "full", "selective")  # of wan.models.recompute
REDUCE_DTYPES = ("float32", "bfloat16")


@dataclass
class ParallelConfig:
    """shard x replicate x sequence is the number of processes that torchrun starts.

    Batch sizes count the clips of all processes together, so that a run means the same on any
    number of them.
    """

    shard: int | None = option(None, "processes that hold one copy of the weights; null: the rest")
    replicate: int = option(1, "such copies (HSDP), e.g. one per machine")
    sequence: int = option(1, "processes that share the tokens of each clip; divides the heads")
    reduce_dtype: str = option("float32", "gradients are summed in it: float32 or bfloat16")

    def __post_init__(self) -> None:
        for name in ("shard", "replicate", "sequence"):
            if getattr(self, name) is not None:
                check_at_least(f"parallel.{name}", getattr(self, name), 1)
        check_choice("parallel.reduce_dtype", self.reduce_dtype, REDUCE_DTYPES)

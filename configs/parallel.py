"""How the processes of a training run share its work."""

from dataclasses import dataclass
from typing import ClassVar

from configs.schema import DTYPES, Options, count, option


@dataclass
class ParallelConfig(Options):
    """shard x replicate x sequence is the number of processes that torchrun starts.

    Batch sizes count the clips of all processes together, so that a run means the same on any
    number of them.
    """

    GROUP: ClassVar[str] = "parallel."

    shard: int | None = count(
        None, "processes that share one copy of the weights; null: all, over replicate"
    )
    replicate: int = count(1, "copies of the weights (HSDP), e.g. one per machine")
    sequence: int = count(1, "processes that share the tokens of each clip; divides the heads")
    reduce_dtype: str = option("float32", "gradients are summed in it", choices=DTYPES)

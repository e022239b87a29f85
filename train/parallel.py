"""Many processes as one run: the only file that knows how many there are.

    with start(config.parallel, config.device) as ranks:
        dit = ...                        # on ranks.loading_device, the same in all processes
        ranks.prepare(dit, bfloat16)     # before optimisers and averages are made
        own = ranks.share(batch_size)    # this process's samples of the whole batch
        run_training(..., ranks=ranks)   # steps, stops and saves together
        ranks.reshard(dit)               # after sampling, before its weights are touched or saved

Started plainly, a command is alone: `Ranks` then does nothing at all and modules stay as they are.
Under torchrun `ShardedRanks` shards every weight with FSDP2 over `shard` x `sequence` processes,
keeps `replicate` copies of that, and splits the tokens of each clip over `sequence` neighbours.

Every process draws the randomness of the whole batch and keeps its own samples, so that the number
of processes changes none of them. Gradients are means over all processes: the loss of a process
must be a mean over its samples, and equal on those that share a clip.
"""

import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from configs.parallel import ParallelConfig
from configs.progress import Steps, progress_shown
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.runtime.offload import resolve_device
from wan.runtime.parallel import SequenceSplit

T = TypeVar("T")
Rows = tuple[int, int]  # first row and number of rows
PATIENCE = timedelta(days=1)  # of processes while another one encodes clips or writes a model

# Logged numbers, by how their names begin, that are no averages over the processes that have them.
COUNTS = ("exits_",)  # of clips: added up over the groups that see different ones
GREATEST = ("student_max", "memory_gb")


def joined(parts: Sequence[dict[str, float]], copies: int = 1) -> dict[str, float]:
    """The numbers of several parts of a batch as those of the whole: means, `COUNTS`, `GREATEST`.

    Args:
        copies: how many of the parts see the same clips.
    """

    def join(name: str, found: list[float]) -> float:
        if name.startswith(COUNTS):
            return sum(found) / copies  # those that share a clip all count it
        return max(found) if name.startswith(GREATEST) else sum(found) / len(found)

    names = dict.fromkeys(name for part in parts for name in part)
    return {name: join(name, [part[name] for part in parts if name in part]) for name in names}


def even_slices(count: int, parts: int) -> list[slice]:
    """So many samples in equal parts, one after another."""
    size = count // parts
    return [slice(start, start + size) for start in range(0, count, size)]


def check_batch_size(batch_size: int, groups: int, parts: int, units: str) -> None:
    """Refuse a batch that groups of processes or GPUs cannot share out in equal parts.

    Raises:
        WanError: names the nearest sizes that can be.
    """
    unit = groups * parts
    if batch_size % unit:
        low = batch_size // unit * unit
        nearest = f"{low} and {low + unit}" if low else str(unit)
        raise WanError(
            f"batch_size={batch_size}: counts the clips of all {units} and must be a multiple of "
            f"the {groups} groups that see different ones, times gradient_accumulation={parts}; "
            f"nearest: {nearest}"
        )


class Ranks:
    """One process, alone: nothing to share and nothing to agree on.

    Attributes:
        rank, size: this process among all.
        data_rank, data_size: its group among the groups that see different clips.
        device: where its tensors live.
    """

    rank, size = 0, 1
    data_rank, data_size = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tallies: dict[str, int] = {}

    @property
    def loading_device(self) -> torch.device:
        """Where to load weights for `prepare`: shards go to `device`, whole modules may not fit."""
        return self.device if self.size == 1 else torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prints, logs and writes."""
        return self.rank == 0

    def prepare(self, module: nn.Module, bfloat16: bool = False) -> None:
        """Shard a module in place; its weights become DTensors on `device`.

        Call it after `compile` and before optimisers, averages and checkpoints see the weights,
        which must be the same in all processes. Frozen modules too.

        Args:
            bfloat16: gather the weights in bfloat16 for computing, but for those that
                `FLOAT32_PARAMETERS` names; the shards, gradients and optimisers stay as they are.
        Raises:
            WanError: the heads are not divisible by `parallel.sequence`.
        """

    def reshard(self, *modules: nn.Module) -> None:
        """Call it after forwards without a backward pass, before anything touches the weights.

        Such a forward leaves some weights gathered, a copy that the module goes on with whatever
        an optimiser, an average or a checkpoint then makes of the shards.
        """

    def share(self, batch_size: int, parts: int = 1) -> slice:
        """This process's samples of a batch.

        Args:
            parts: in how many `even_slices` the process computes them.
        Raises:
            WanError: the batch cannot be shared out evenly.
        """
        check_batch_size(batch_size, self.data_size, parts, "processes")
        share = batch_size // self.data_size
        return slice(self.data_rank * share, (self.data_rank + 1) * share)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank."""
        return [value]

    def tally(self, name: str, amount: int) -> int:
        """Add to a number that all processes share, and return it; none waits for another."""
        self.tallies[name] = self.tallies.get(name, 0) + amount
        return self.tallies[name]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(flag))

    def first(self, value: T) -> T:
        """The main process's value."""
        return self.gather(value)[0]

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """Each number averaged over the processes that have it; but see `COUNTS`, `GREATEST`."""
        return joined(self.gather(values), self.size // self.data_size)

    @property
    def leads_group(self) -> bool:
        """Whether this process writes what its group, the processes that share clips, has made."""
        return self.rank % (self.size // self.data_size) == 0

    def spread(
        self,
        make: Callable[[list[int]], Sequence[T]],
        numbers: Sequence[int],
        chunk: int,
        what: str = "clips",
    ) -> list[T]:
        """Apply `make` to numbers, one result each; every group does a share of them.

        All processes call it equally often, as sharded networks need: where a share would be
        shorter than the others, the last number is made again.

        Args:
            make: up to `chunk` numbers -> as many results, which are sent to all processes: let
                them be small, and no views of large tensors.
            what: names the results in the plural, while they are made.
        Returns:
            all results in order, in every process.
        """
        count = len(numbers)
        share = -(-count // self.data_size)
        own = [numbers[min(self.data_rank * share + i, count - 1)] for i in range(share)]
        made: list[T] = []
        with Steps(what, share, quiet=not self.is_main) as steps:
            for i in range(0, share, chunk):
                made += make(own[i : i + chunk])
                steps.add(len(own[i : i + chunk]))
        by_group = self.gather(made)[:: self.size // self.data_size]
        return [one for part in by_group for one in part][:count]

    def spread_tensors(
        self,
        make: Callable[[list[int]], Tensor],
        numbers: Sequence[int],
        chunk: int,
        what: str = "clips",
    ) -> Tensor:
        """`spread` for a function that returns a tensor with one entry for each number.

        Returns:
            all entries in order, in every process, on the CPU.
        """

        def entries(part: list[int]) -> list[Tensor]:
            return [entry.clone() for entry in make(part).cpu()]

        return torch.stack(self.spread(entries, numbers, chunk, what))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make an error in one process an error in all, so that none is left waiting.

        Raises:
            OSError, WanError: the process's own; or a WanError with the text of another's.
        """
        error: OSError | WanError | None = None
        try:
            yield
        except (OSError, WanError) as raised:
            error = raised
        failed = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(failed):
            if message is not None:
                raise WanError(f"process {rank}: {message}")

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go first: it fills the caches that the others read."""
        if not self.is_main:
            self.gather(None)
        yield
        if self.is_main:
            self.gather(None)

    def stored_rows(self, tensor: Tensor) -> tuple[Tensor, Rows] | None:
        """The rows of a tensor that this process saves, and their place; None if it saves none."""
        return tensor, (0, len(tensor) if tensor.ndim else 1)

    def restore(self, shape: tuple[int, ...], read: Callable[[Rows], Tensor]) -> Tensor:
        """A tensor of that shape as this process keeps it, from a function that reads rows."""
        return read((0, shape[0] if shape else 1))


class ShardedRanks(Ranks):
    """Several processes under torchrun. Made by `start`."""

    def __init__(self, config: ParallelConfig, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        shard = share_out(config, self.size)
        self.data_rank, self.data_size = self.rank // config.sequence, self.size // config.sequence
        self.reduce_dtype = getattr(torch, config.reduce_dtype)
        # Ranks count sequence fastest, then shard, then replicate: what talks most is nearest.
        shape = (config.replicate, shard * config.sequence)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
        self.mesh: DeviceMesh = mesh["shard"] if config.replicate == 1 else mesh
        self.placements = [Replicate()] * (config.replicate > 1) + [Shard(0)]
        self.shard_rank, self.num_shards = mesh.get_local_rank("shard"), shape[1]
        self.is_first_copy = mesh.get_local_rank("replicate") == 0
        self.split: SequenceSplit | None = None
        if config.sequence > 1:
            shape = (self.data_size, config.sequence)
            groups = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
            self.split = SequenceSplit(groups.get_group("sequence"))
        self.agreement = dist.new_group(backend="gloo", timeout=PATIENCE)  # CPU, few bytes
        self.store = dist.distributed_c10d._get_default_store()  # by which the processes met

    def prepare(self, module: nn.Module, bfloat16: bool = False) -> None:
        exact = MixedPrecisionPolicy(reduce_dtype=self.reduce_dtype, cast_forward_inputs=False)
        half = MixedPrecisionPolicy(torch.bfloat16, self.reduce_dtype, cast_forward_inputs=False)
        if isinstance(module, WanDiT):
            if self.split is not None:
                module.split_tokens(self.split)
            for block in module.blocks:
                if bfloat16:
                    self._shard_children(block, half)
                fully_shard(block, mesh=self.mesh, mp_policy=exact)
            if bfloat16:
                self._shard_children(module, half)
        fully_shard(module, mesh=self.mesh, mp_policy=exact)

    def _shard_children(self, module: nn.Module, policy: MixedPrecisionPolicy) -> None:
        """Shard each child whose weights may all be gathered in bfloat16."""
        for name, child in module.named_children():
            weights = [f"{name}.{n}" for n, _ in child.named_parameters()]
            kept = any(part in w for w in weights for part in WanDiT.FLOAT32_PARAMETERS)
            if weights and not kept and not isinstance(child, nn.ModuleList):
                fully_shard(child, mesh=self.mesh, mp_policy=policy)

    def reshard(self, *modules: nn.Module) -> None:
        for module in modules:
            for part in module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.agreement)
        return values

    def tally(self, name: str, amount: int) -> int:
        return self.store.add(name, amount)

    def stored_rows(self, tensor: Tensor) -> tuple[Tensor, Rows] | None:
        if not isinstance(tensor, DTensor):
            return super().stored_rows(tensor) if self.is_main else None
        rows = self._own_rows(len(tensor))
        local = tensor.to_local()
        assert len(local) == rows[1], "FSDP shards in another way than this file believes"
        return (local, rows) if self.is_first_copy and rows[1] else None

    def restore(self, shape: tuple[int, ...], read: Callable[[Rows], Tensor]) -> Tensor:
        if not shape:
            return super().restore(shape, read)
        local = read(self._own_rows(shape[0])).to(self.device)
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(shape),
            stride=stride,
        )

    def _own_rows(self, total: int) -> Rows:
        """Shard(0) cuts like torch.chunk: all parts equal, the last ones shorter or empty."""
        chunk = -(-total // self.num_shards)
        first = min(self.shard_rank * chunk, total)
        return first, min(chunk, total - first)


def share_out(
    config: ParallelConfig,
    size: int,
    units: str = "processes",
    hint: str = "; torchrun --nproc-per-node says how many there are",
) -> int:
    """How many processes shard the weights, `parallel.sequence` not counted.

    Raises:
        WanError: the three numbers do not multiply to `size`; it calls them `units`.
    """
    others = config.replicate * config.sequence
    shard = config.shard if config.shard is not None else max(1, size // others)
    if shard * others != size:
        raise WanError(
            f"parallel.shard={config.shard}, replicate={config.replicate}, sequence="
            f"{config.sequence}: their product must be the number of {units}, {size}{hint}"
        )
    return shard


@contextmanager
def start(config: ParallelConfig, device: str = "cpu") -> Iterator[Ranks]:
    """Join the other processes of this run, if torchrun started several; leave them at the end.

    Raises:
        WanError: no such device, or another number of processes than the settings ask for.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    share_out(config, size)
    if size == 1:
        yield Ranks(resolve_device(device, mps=False))  # not tried there: only if it is named
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif device != "cpu":
        raise WanError(f"device={device}: several processes choose their own; cpu, cuda or auto")
    place = resolve_device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl")
    try:
        ranks = ShardedRanks(config, place)
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:
            # Linear layers return views; nothing here changes them in place.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
            out = sys.stdout if ranks.is_main else nowhere
            with redirect_stdout(out), progress_shown(ranks.is_main):
                yield ranks
    finally:
        dist.destroy_process_group()


def gathered(tensor: Tensor) -> Tensor:
    """A whole tensor; of a sharded one, from all processes, which must all call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, cut up as another one is."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


ALONE = Ranks(torch.device("cpu"))

"""One video by many processes: tokens, guidance's two forwards, and rows of frames shared out.

    group = ParallelGroup(torch.device("cuda", local_rank))   # after dist.init_process_group
    with group.at_work(networks, guided=True) as halves:      # each holds a part of the tokens
        ...                                                   # `halves` goes to the denoiser
    vae.decode_stream(latents, rows=group.rows(height))       # each decodes a part of the rows

A pipeline does this after `enable_parallelism`. Every process makes the same calls and gets the
same result. What enters a computation is the main process's; after each step all agree on going
on, so that an error, an interruption or a NaN in one of them is one in all.

Letters: P processes that share the work, B batch, N heads, L tokens, l = ceil(L / P), K channels of
a head; H rows and W columns of frames inside the VAE, h rows of one process.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from wan.errors import WanError, check_names

T = TypeVar("T")
WEIGHTS = ("whole", "sharded")
PATIENCE = timedelta(days=1)  # of processes while another one encodes texts or writes files
# Errors that keep their kind when they reach other processes; all others become a WanError.
KINDS: dict[str, type[BaseException]] = {
    kind.__name__: kind for kind in (KeyboardInterrupt, FloatingPointError)
}


class ParallelGroup:
    """All processes of `torch.distributed`, which make one video together.

    Attributes:
        rank, size: this process among them.
        device: where this process computes.
        sharded: whether each holds a part of the transformers' weights only.
    """

    def __init__(
        self,
        device: torch.device,
        networks: Iterable[Any] = (),
        weights: str = "whole",
        *,
        guidance: bool = True,
    ) -> None:
        """Make the groups; every process calls this with the same arguments.

        Args:
            networks: the transformers, whose weights are sharded if `weights` says so.
            weights: "whole" on every device, or "sharded": each device keeps 1 / P of every
                block and gets the rest while the block computes (FSDP2).
            guidance: with an even P, one half of the processes computes the conditional forward
                and the other the unconditional one.

        Raises:
            WanError: there is no process group, or it has no backend for the device.
        """
        check_names("weights", [weights], WEIGHTS)
        if not dist.is_initialized():
            raise WanError(
                "no process group: start the script with torchrun, and call "
                "torch.distributed.init_process_group first"
            )
        backends = dist.get_backend_config()
        if f"{device.type}:" not in backends:
            raise WanError(
                f"the process group ({backends}) has no backend for {device.type}: call "
                'init_process_group("cpu:gloo,cuda:nccl") for GPUs, init_process_group("gloo") '
                "for CPUs"
            )
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.sharded = weights == "sharded"
        self.agreement = dist.new_group(backend="gloo", timeout=PATIENCE)  # CPU, few bytes
        whole = dist.group.WORLD
        assert whole is not None
        self._group, self._tokens = whole, SequenceSplit(whole)
        self._halves: GuidanceHalves | None = None
        if guidance and self.size % 2 == 0:
            shape = (2, self.size // 2)
            mesh = init_device_mesh(device.type, shape, mesh_dim_names=("guidance", "tokens"))
            half = SequenceSplit(mesh.get_group("tokens"))
            self._halves = GuidanceHalves(mesh.get_group("guidance"), half)
        self._out_of_step = self._all_know = False
        if self.sharded:
            mesh = init_device_mesh(device.type, (self.size,))
            for network in networks:
                shard_weights(network, mesh)

    @property
    def is_main(self) -> bool:
        """Whether this is the process whose inputs count, and that writes."""
        return self.rank == 0

    # --- agreement --------------------------------------------------------------------------------

    def agree(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns in each process, by rank; an error in one is an error in all.

        Args:
            work: returns a small value on the CPU; it must not wait for other processes.

        Raises:
            BaseException: the process's own error; or, if others failed, `KINDS` of theirs or a
                WanError with their text.
        """
        error: BaseException | None = None
        value: Any = None
        try:
            value = work()
        except BaseException as raised:
            error = raised
        failed = None if error is None else (type(error).__name__, str(error))
        told: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(told, (failed, value), group=self.agreement)
        self._all_know = any(failure is not None for failure, _ in told)
        if error is not None:
            raise error
        for rank, (failure, _) in enumerate(told):
            if failure is not None:
                name, text = failure
                raise KINDS[name](text) if name in KINDS else WanError(f"process {rank}: {text}")
        return [value for _, value in told]

    def first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the main process, which alone calls it: values on the CPU.

        Raises:
            BaseException: as `agree`.
        """
        made: list[Any] = [None]

        def in_main() -> None:
            if self.is_main:
                made[0] = make()

        self.agree(in_main)
        with self.together():
            dist.broadcast_object_list(made, src=0, group=self.agreement)
        return made[0]

    def tensors(self, *own: Tensor | None) -> list[Any]:
        """The main process's tensors in all processes; those of others come to `device`."""
        sent = self.first(lambda: [None if one is None else one.cpu() for one in own])
        if self.is_main:
            return list(own)
        return [None if one is None else one.to(self.device) for one in sent]

    def check_alike(self, what: str, value: Any) -> None:
        """Refuse calls that differ between processes, which would wait for each other for ever.

        Raises:
            WanError: in all processes.
        """
        self.check_equal(what, self.agree(lambda: value))

    def check_equal(self, what: str, values: Sequence[Any]) -> None:
        """Refuse values, by rank, that are not all the same; `agree` has given them to everyone.

        Raises:
            WanError: in all processes.
        """
        for rank, other in enumerate(values):
            if other != values[0]:
                self._all_know = True
                raise WanError(
                    f"{what}: process 0 has {values[0]}, process {rank} has {other}; all processes "
                    "must do the same"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around work in which processes wait for each other.

        An error in it that the others do not know of leaves them out of step: this group is of no
        use from then on, and says so. Processes that wait for one that has ended get an error from
        the backend: at once with gloo, after the group's timeout with NCCL. torchrun ends all
        processes as soon as one has ended with an error.

        Raises:
            WanError: an error has left the processes out of step.
        """
        if self._out_of_step:
            raise WanError(
                "an error or an interruption has left the processes out of step; start them again"
            )
        self._all_know = False
        try:
            yield
        except BaseException as error:
            if not self._all_know:
                self._out_of_step = True
                if is_lost(error):
                    raise WanError(
                        f"process {self.rank}: another process has ended, or does not answer; what "
                        "it printed says why"
                    ) from error
            raise

    # --- work that is shared out ------------------------------------------------------------------

    def check_heads(self, num_heads: int, guided: bool) -> None:
        """Refuse a number of heads that cannot be shared out.

        Raises:
            WanError: names the numbers of processes that can.
        """
        check_heads(num_heads, self.size, guided and self._halves is not None)

    @contextmanager
    def at_work(self, networks: Iterable[Any], guided: bool) -> Iterator["GuidanceHalves | None"]:
        """Let each process hold a part of the tokens of these transformers.

        Yields:
            the halves that share guidance's two forwards; None where each process computes both.
        """
        halves = self._halves if guided else None
        networks = list(networks)
        for network in networks:
            self.check_heads(network.config.num_attention_heads, guided)
        try:
            for network in networks:
                network.split_tokens(self._tokens if halves is None else halves.tokens)
            with self.together():
                yield halves
        finally:
            for network in networks:
                network.split_tokens(None)

    def rows(self, height: int) -> "RowSplit | None":
        """The rows of frames of that many latents; None if there are fewer rows than processes."""
        return RowSplit(self._group, height) if height >= self.size else None


def check_options(
    weights: str, *, offload: str, compile: str, quantized: bool, tile: int | None = None
) -> None:
    """Refuse options of a pipeline that do not go with many processes.

    Args:
        weights: see `ParallelGroup`.
        offload, compile, tile: as the attributes of a pipeline.
        quantized: whether its weights have 8 bits.

    Raises:
        WanError: names the options.
    """
    check_names("weights", [weights], WEIGHTS)
    if compile != "none":
        raise WanError(f"compile={compile} with many processes is not tested: leave it out")
    if tile is not None:
        raise WanError(
            f"tile={tile} with many processes: these share out the rows of each frame, which takes "
            "less memory too; leave it out"
        )
    if weights == "sharded" and offload != "none":
        raise WanError(f"offload={offload} with sharded weights: both save the same memory")
    if weights == "sharded" and quantized:
        raise WanError("8-bit weights cannot be sharded: load with quantize=none, or keep whole")


def check_heads(num_heads: int, size: int, halved: bool) -> None:
    """Refuse a number of heads that so many processes cannot share out.

    Args:
        halved: two halves of the processes compute guidance's two forwards.

    Raises:
        WanError: names the numbers of processes that can.
    """
    if num_heads % (size // 2 if halved else size):
        fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0]
        if halved:
            fitting = sorted({*fitting, *(2 * n for n in fitting)})
        raise WanError(
            f"{num_heads} heads cannot be shared out over {size} processes"
            f"{', two halves with guidance' if halved else ''}: start "
            f"{', '.join(map(str, fitting))}"
        )


def is_lost(error: BaseException) -> bool:
    """Whether an error is the backend's, about a process that has ended or does not answer."""
    text = str(error).lower()
    backends = ("gloo", "nccl", "connection reset", "connection closed")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(name in text for name in backends)
    )


class GuidanceHalves:
    """Two halves of the processes: one computes conditional velocities, one unconditional ones.

    Attributes:
        negative: whether this process computes the unconditional velocity.
        tokens: the split of the tokens over its half.
    """

    def __init__(self, pair: dist.ProcessGroup, tokens: "SequenceSplit") -> None:
        self.pair, self.negative, self.tokens = pair, pair.rank() == 1, tokens

    def exchange(self, velocity: Tensor) -> tuple[Tensor, Tensor]:
        """This half's velocity (1, C, T, H, W) -> the conditional one, the unconditional one."""
        both = velocity.new_empty(2, *velocity.shape[1:])
        dist.all_gather(list(both.split(1)), velocity.contiguous(), group=self.pair)
        return both[:1], both[1:]


class SequenceSplit:
    """Tokens shared out over P processes, and heads within self-attention.

    Each process holds l consecutive tokens through every block. Self-attention trades them for all
    tokens of N / P heads and back; nothing else needs a neighbour. L is padded to P l; padded
    tokens are never attended and cut off at the end.

    Source: DeepSpeed Ulysses, arXiv:2309.14509.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()

    def share(self, x: Tensor, dim: int) -> Tensor:
        """This process's l of L entries along `dim`, zeros beyond the end."""
        share = -(-x.shape[dim] // self.size)
        first = min(self.rank * share, x.shape[dim])
        own = x.narrow(dim, first, min(share, x.shape[dim] - first))
        beyond = [0, 0] * (x.ndim - 1 - dim) + [0, share - own.shape[dim]]
        return F.pad(own, beyond)

    def collect(self, x: Tensor, length: int) -> Tensor:
        """Everyone's tokens (B, l, ...) -> (B, L, ...); gradients come back summed."""
        everyone = self.exchange(x.expand(self.size, *x.shape))  # (P, B, l, ...)
        return everyone.movedim(0, 1).flatten(1, 2)[:, :length]

    def around(self, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """That self-attention for queries, keys and values of which each process holds l tokens."""
        return partial(self.attend, attention)

    def attend(
        self,
        attention: Callable[..., Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: tuple[int, int, int],
        exact: bool = False,
    ) -> Tensor:
        """(B, N, l, K) three times and the grid of all L tokens -> (B, N, l, K)."""
        share, length = q.shape[2], math.prod(grid)
        q, k, v = self.tokens_to_heads(torch.stack((q, k, v)))[..., :length, :]
        out = attention(q, k, v, grid, exact)  # (B, N / P, L, K)
        return self.heads_to_tokens(F.pad(out, (0, 0, 0, share * self.size - length)))

    def tokens_to_heads(self, x: Tensor) -> Tensor:
        """All heads of l tokens (..., N, l, K) -> N / P heads of all (..., N / P, P l, K)."""
        x = self.exchange(x.unflatten(-3, (self.size, -1)).movedim(-4, 0))  # (P, ..., N / P, l, K)
        return x.movedim(0, -3).flatten(-3, -2)

    def heads_to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `tokens_to_heads`."""
        x = self.exchange(x.unflatten(-2, (self.size, -1)).movedim(-3, 0))  # (P, ..., N / P, l, K)
        return x.movedim(0, -4).flatten(-4, -3)

    def exchange(self, x: Tensor) -> Tensor:
        """Entry i of x (P, ...) goes to process i; entry j of the result comes from process j."""
        return all_to_all_single_autograd(x.contiguous(), None, None, self.group)


class RowSplit:
    """Rows of frames (..., H, W) shared out over P processes, as evenly as they can be.

    The height that shares are made of is that of the latents; layers may have multiplied it.

    Attributes:
        shares: latent rows of each process, each at least 1.
    """

    def __init__(self, group: dist.ProcessGroup, height: int) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.starts = [height * rank // self.size for rank in range(self.size + 1)]
        self.shares = [
            end - start for start, end in zip(self.starts, self.starts[1:], strict=False)
        ]

    def own(self, x: Tensor) -> Tensor:
        """This process's rows of latents: (..., H, W) -> (..., h, W)."""
        return x.narrow(-2, self.starts[self.rank], self.shares[self.rank])

    def with_neighbours(self, x: Tensor) -> Tensor:
        """A row of each neighbour around the own ones, zeros beyond the frame.

        (..., h, W) -> (..., h + 2, W), in the same memory format.
        """
        edges = {self.rank - 1: x[..., :1, :], self.rank + 1: x[..., -1:, :]}
        edges = {rank: edge for rank, edge in edges.items() if 0 <= rank < self.size}
        sent = torch.cat([edge.flatten() for edge in edges.values()])
        received = torch.empty_like(sent)
        counts = [edges[rank].numel() if rank in edges else 0 for rank in range(self.size)]
        dist.all_to_all_single(received, sent, counts, counts, group=self.group)
        y = F.pad(x, (0, 0, 1, 1))
        parts = received.split([count for count in counts if count])
        for (rank, edge), part in zip(edges.items(), parts, strict=True):
            row = 0 if rank < self.rank else -1
            y[..., row, :] = part.view(edge.shape)[..., 0, :]
        return y

    def collect(self, x: Tensor) -> Tensor:
        """All rows, from those of each process: (..., h, W) -> (..., H, W)."""
        scale = x.shape[-2] // self.shares[self.rank]
        most = scale * max(self.shares)
        padded = F.pad(x, (0, 0, 0, most - x.shape[-2])).contiguous()
        everyone = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(everyone, padded, group=self.group)
        parts = zip(everyone, self.shares, strict=True)
        return torch.cat([part.narrow(-2, 0, scale * share) for part, share in parts], dim=-2)


# --- sharded weights ------------------------------------------------------------------------------


def shard_weights(network: Any, mesh: DeviceMesh) -> None:
    """Leave each process of a mesh its part of a transformer's weights, by FSDP2.

    Weights come to the mesh's device block by block, so a network may be loaded on the CPU that no
    device could hold. The blocks' weights are gathered while the block works.
    """
    network.requires_grad_(False)
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(network, "prepare_context")
    network.block_at_work = gathered_block
    network.mapped_files = None  # shards are copies


@contextmanager
def gathered_block(block: nn.Module) -> Iterator[None]:
    """The weights of a sharded block are whole while the context lasts."""
    sharded: Any = block
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()

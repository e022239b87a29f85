"""Loading a sharded release, each time in a new process.

A load reads the transformer of a folder in bfloat16 and touches every page of it. The side `ours`
looks at every value, and refuses NaN and infinity; `unchecked` does not, as the reference does not.
"""

import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.benchmark import BenchConfig
from configs.progress import Steps
from infer.bench.timing import Outcome, Task, Timing, reset_resident_peak, resident, take_turns
from infer.parity.models import Sides, reference, write_part
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import build_on_meta, check_fit, match_names, target_dtype
from wan.weights.safetensors_file import MappedFile, read_bytes
from wan.weights.tensor_reader import is_zero

BF16 = torch.bfloat16
PAGE = 4096
WIDE_FROM = 2.0  # GB from which the layers are as wide as the 5B's
SHARDS = 4
AIM_FROM = 10.0  # GB from which the aim for memory holds: buffers of fixed size weigh more in less
LOADERS: dict[str, Callable[[Sides], nn.Module]] = {
    "ours": lambda sides: sides.ours("transformer"),
    "unchecked": lambda sides: sides.ours("transformer", check_finite=False),
    "reference": lambda sides: sides.theirs("transformer"),
}


def write_sharded(folder: Path, gigabytes: float, seed: int, stored: torch.dtype = BF16) -> int:
    """Write a folder with a sharded transformer of about that size; its exact bytes.

    Its layers share their values, so that writing needs the memory of one of them.
    """
    heads = 24 if gigabytes >= WIDE_FROM else 6
    config = DiTConfig(num_attention_heads=heads, ffn_dim=14336 * heads // 24, num_layers=1)
    one, two = (num_bytes(build_network(replace(config, num_layers=n)), stored) for n in (1, 2))
    num_layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    config = replace(config, num_layers=num_layers)
    generator = torch.Generator().manual_seed(seed)
    values: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    for name, parameter in build_network(config).state_dict().items():
        key = (parameter.shape, stored_dtype(name, stored))
        if key not in values:
            values[key] = torch.randn(parameter.shape, generator=generator).to(key[1])
        state[name] = values[key]
    total = sum(tensor.nbytes for tensor in state.values())
    write_part(
        state,
        config,
        folder / "transformer",
        "transformer",
        max_shard_bytes=max(1, total // SHARDS),
    )
    return total


def build_network(config: DiTConfig) -> WanDiT:
    return build_on_meta(lambda: WanDiT(config))


def stored_dtype(name: str, most: torch.dtype) -> torch.dtype:
    return target_dtype(name, torch.float32, most, WanDiT.FLOAT32_PARAMETERS)


def num_bytes(module: nn.Module, stored: torch.dtype) -> int:
    sizes = ((p.numel(), stored_dtype(name, stored)) for name, p in module.named_parameters())
    return sum(count * dtype.itemsize for count, dtype in sizes)


def contests(config: BenchConfig, scratch: Path) -> Iterator[Outcome]:
    """A release in bfloat16, which can be mapped, and one in float32, which must be converted."""
    for stored in (BF16, torch.float32):
        folder = scratch / str(stored).removeprefix("torch.")
        yield contest(config, folder, stored)
        shutil.rmtree(folder)


def contest(config: BenchConfig, scratch: Path, stored: torch.dtype) -> Outcome:
    """Seconds and peak resident memory of all sides; the files are in the page cache."""
    size = write_sharded(scratch, config.load_gb, config.seed, stored)

    calls = config.warmup + config.repeats
    with Steps(f"calls of load, {stored}", calls * len(LOADERS)) as steps:

        def measure(side: str) -> dict[str, Any]:
            loaded = load_apart(scratch, side, config.threads)
            steps.add()
            return loaded

        loads = take_turns(list(LOADERS), calls, measure)
    timings = {}
    for side, every in loads.items():
        every = every[config.warmup :]
        wall, cpu, peaks = ([one[n] for one in every] for n in ("wall", "cpu", "peak_bytes"))
        timings[side] = Timing(wall, cpu, None if peaks[0] is None else max(peaks))
    phases = {}
    if config.profile:
        phases["ours"] = load_apart(scratch, "ours", config.threads, with_phases=True)["phases"]
    task = Task(
        "load",
        f"{size / 1e9:.2f} GB of {str(stored).removeprefix('torch.')} to bfloat16",
        goal=2.0,
        memory_goal=1.1 if config.load_gb >= AIM_FROM else None,
    )
    return Outcome(task, timings, weights_bytes=loads["ours"][0]["weights_bytes"], phases=phases)


def load_apart(
    folder: Path, side: str, threads: int | None, with_phases: bool = False
) -> dict[str, Any]:
    """`load_once` in a new process.

    Raises:
        WanError: it failed.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        try:
            return process.submit(load_once, folder, side, threads, with_phases).result()
        except (BrokenProcessPool, OSError, RuntimeError, ValueError) as error:
            raise WanError(f"loading ({side}) failed: {error}") from error


def load_once(
    folder: Path, side: str, threads: int | None = None, with_phases: bool = False
) -> dict[str, Any]:
    """Load and touch, without the time of imports.

    Returns:
        "wall" and "cpu" seconds; "peak_bytes" of resident memory (None if not Linux) and
        "weights_bytes"; "phases", seconds by phase, empty unless asked for: they cost some time.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if side == "reference":
        assert reference("diffusers").WanTransformer3DModel  # imports it
    sides = Sides("load", folder, ("transformer",), BF16)
    before = reset_resident_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    watched: AbstractContextManager[dict[str, float]] = nullcontext({})
    if with_phases:
        watched = timed_phases()
    with watched as phases:
        module = LOADERS[side](sides)
        touch(module)
    return {
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "peak_bytes": None if before is None else resident("VmHWM") - before,
        "weights_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "phases": dict(phases),
    }


def touch(module: nn.Module) -> None:
    """Read a value of every page, so that what is mapped is really there."""
    for parameter in module.parameters():
        parameter.view(-1)[:: PAGE // parameter.element_size()].sum()


# What our loading consists of: Python functions by their code, those of PyTorch by their names.
PHASES = {
    open_checkpoint.__code__: "open headers",
    match_names.__code__: "match names",
    build_on_meta.__code__: "build on meta",
    check_fit.__code__: "match names",
    MappedFile.__init__.__code__: "map",
    read_bytes.__code__: "read",
    is_zero.__code__: "check values",
    touch.__code__: "touch every page",
}
TORCH_PHASES = {"empty": "allocate", "copy_": "convert and place"}


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Seconds per phase, added up over this thread and all that start meanwhile.

    A phase within another counts as part of the outer one.
    """
    seconds: dict[str, float] = defaultdict(float)
    lock, here = threading.Lock(), threading.local()

    def watch(frame: Any, event: str, function: Any) -> None:
        """Called by Python at every call and return; builtins come as c_call and c_return."""
        if event.startswith("c_"):
            phase = TORCH_PHASES.get(function.__name__)
        else:
            phase = PHASES.get(frame.f_code)
        if phase is None:
            return
        starts = here.__dict__.setdefault("starts", [])
        if event.endswith("call"):
            starts.append(time.perf_counter())
            return
        start = starts.pop()
        if not starts:  # the outermost phase is over
            with lock:
                seconds[phase] += time.perf_counter() - start

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield seconds
    finally:
        sys.setprofile(None)
        threading.setprofile(None)

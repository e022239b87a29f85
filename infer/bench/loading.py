"""Loading a sharded release, each time in a process of its own: python -m infer.bench_load

    python -m infer.bench_load FOLDER ours|unchecked|reference THREADS [phases]

reads the transformer of a folder in bfloat16, touches every page of it, and prints seconds and
bytes as JSON. `infer.bench` writes the folder and takes turns. Ours looks at every value, and
refuses NaN and infinity; `unchecked` does not, as the reference does not. With `phases` it also
prints where the time of our code goes, which takes a little longer.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.benchmark import BenchConfig
from infer.bench.timing import Outcome, Timing, reset_resident_peak, resident_peak
from infer.parity.models import Sides, reference, write_config
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import build_on_meta, check_fit, match_names, target_dtype
from wan.weights.safetensors_file import map_tensors, read_bytes
from wan.weights.save import save_component
from wan.weights.tensor_reader import is_zero

BF16 = torch.bfloat16
PAGE = 4096
WIDE_FROM = 2.0  # GB from which the layers are as wide as the 5B's
SHARDS = 4
AIM_FROM = 10.0  # GB from which the aim for memory holds: buffers of fixed size weigh more in less
SIDES = ("ours", "unchecked", "reference")


def write_release(folder: Path, gigabytes: float, seed: int, stored: torch.dtype = BF16) -> int:
    """A sharded transformer of about that size in the released layout; its exact bytes.

    Its layers share their values, so that writing needs the memory of one of them.
    """
    heads = 24 if gigabytes >= WIDE_FROM else 6
    config = DiTConfig(num_attention_heads=heads, ffn_dim=14336 * heads // 24, num_layers=1)
    one, two = (num_bytes(build_network(replace(config, num_layers=n)), stored) for n in (1, 2))
    layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    config = replace(config, num_layers=layers)
    generator = torch.Generator().manual_seed(seed)
    values: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    module = build_network(config)
    for name, parameter in module.state_dict().items():
        key = (parameter.shape, stored_dtype(name, stored))
        if key not in values:
            values[key] = torch.randn(parameter.shape, generator=generator).to(key[1])
        state[name] = values[key]
    total = sum(tensor.nbytes for tensor in state.values())
    save_component(state, folder, "transformer", max_shard_bytes=max(1, total // SHARDS))
    write_config(folder, config.to_json())
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
    size = write_release(scratch / "transformer", config.load_gb, config.seed, stored)
    taken: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    order = list(taken)
    for round_ in range(config.warmup + config.repeats):
        for side in order:
            found = measured_apart(scratch, side, config.threads)
            if round_ >= config.warmup:
                taken[side].append(found)
        order.reverse()
    timings = {
        side: Timing(
            [one["wall"] for one in all_found],
            [one["cpu"] for one in all_found],
            None if (peaks := [one["peak_bytes"] for one in all_found])[0] is None else max(peaks),
        )
        for side, all_found in taken.items()
    }
    phases = {}
    if config.profile:
        phases["ours"] = measured_apart(scratch, "ours", config.threads, "phases")["phases"]
    return Outcome(
        "load",
        f"{size / 1e9:.2f} GB of {str(stored).removeprefix('torch.')} to bfloat16",
        timings,
        goal=2.0,
        memory_goal=1.1 if config.load_gb >= AIM_FROM else None,
        weights_bytes=taken["ours"][0]["weights_bytes"],
        phases=phases,
    )


def measured_apart(folder: Path, side: str, threads: int | None, *options: str) -> dict[str, Any]:
    """One load in a new process.

    Raises:
        WanError: it failed.
    """
    command = [sys.executable, "-m", __name__, str(folder), side, str(threads or 0), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WanError(f"loading ({side}) failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_once(folder: Path, side: str, with_phases: bool = False) -> dict[str, Any]:
    """Load and touch, without the time of imports."""
    sides = Sides("load", folder, ("transformer",), BF16)
    loaders: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: sides.ours("transformer"),
        "unchecked": lambda: sides.ours("transformer", check_finite=False),
        "reference": lambda: sides.theirs("transformer"),
    }
    if side == "reference":
        assert reference("diffusers").WanTransformer3DModel  # imports it
    watched: AbstractContextManager[dict[str, float]] = nullcontext({})
    if with_phases:
        watched = timed_phases()
    before = reset_resident_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    with watched as phases:
        module = loaders[side]()
        touch(module)
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = resident_peak()
    return {
        **seconds,
        "peak_bytes": None if before is None or peak is None else peak - before,
        "weights_bytes": sum(parameter.nbytes for parameter in module.parameters()),
        "phases": dict(phases),
    }


def touch(module: nn.Module) -> None:
    """Read a value of every page, so that what is mapped is really there."""
    for parameter in module.parameters():
        parameter.view(-1)[:: PAGE // parameter.element_size()].sum()


# What our loading consists of: functions by their code, those of PyTorch by their names.
PHASES = {
    open_checkpoint.__code__: "open headers",
    match_names.__code__: "match names",
    build_on_meta.__code__: "build on meta",
    check_fit.__code__: "match names",
    map_tensors.__code__: "map",
    read_bytes.__code__: "read",
    is_zero.__code__: "check values",
    touch.__code__: "touch every page",
}
TORCH_PHASES = {"empty": "allocate", "copy_": "convert and place"}


@contextmanager
def timed_phases() -> Iterator[dict[str, float]]:
    """Seconds per phase, added up over this thread and all that start meanwhile.

    A phase within another counts as part of it.
    """
    seconds: dict[str, float] = defaultdict(float)
    lock, here = threading.Lock(), threading.local()

    def watch(frame: Any, event: str, function: Any) -> None:
        if event in ("call", "return"):
            phase = PHASES.get(frame.f_code)
        else:
            phase = TORCH_PHASES.get(function.__name__)
        if phase is None:
            return
        depth = getattr(here, "depth", 0)
        if event in ("call", "c_call"):
            here.depth = depth + 1
            if depth == 0:
                here.start = time.perf_counter()
            return
        here.depth = depth - 1
        if depth == 1:
            with lock:
                seconds[phase] += time.perf_counter() - here.start

    threading.setprofile(watch)
    sys.setprofile(watch)
    try:
        yield seconds
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


if __name__ == "__main__":
    if int(sys.argv[3]):
        torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(load_once(Path(sys.argv[1]), sys.argv[2], "phases" in sys.argv[4:])))

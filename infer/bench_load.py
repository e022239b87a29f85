"""Loading a sharded release, each time in a process of its own: python -m infer.bench_load

    python -m infer.bench_load FOLDER ours|unchecked|reference THREADS

reads the transformer of a folder in bfloat16, touches every page of it, and prints seconds and
bytes as JSON. `infer.bench` writes the folder and takes turns. Ours looks at every value, and
refuses NaN and infinity; `unchecked` does not, as the reference does not.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.benchmark import BenchConfig
from infer.bench_measure import Outcome, Timing, reset_resident_peak, resident_peak
from infer.parity_sides import Sides, reference, write_config
from wan.dit import WanDiT
from wan.dit_config import DiTConfig
from wan.errors import WanError
from wan.weights import build_on_meta, save_component, target_dtype

BF16 = torch.bfloat16
PAGE = 4096
WIDE_FROM = 2.0  # GB from which the layers are as wide as the 5B's
SHARDS = 4
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
    what = f"{size / 1e9:.2f} GB of {str(stored).removeprefix('torch.')} to bfloat16"
    return Outcome("load", what, timings, goal=2.0)


def measured_apart(folder: Path, side: str, threads: int | None) -> dict[str, Any]:
    """One load in a new process.

    Raises:
        WanError: it failed.
    """
    command = [sys.executable, "-m", __name__, str(folder), side, str(threads or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WanError(f"loading ({side}) failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load_once(folder: Path, side: str) -> dict[str, Any]:
    """Load and touch, without the time of imports."""
    sides = Sides("load", folder, ("transformer",), BF16)
    loaders: dict[str, Callable[[], nn.Module]] = {
        "ours": lambda: sides.ours("transformer"),
        "unchecked": lambda: sides.ours("transformer", check_finite=False),
        "reference": lambda: sides.theirs("transformer"),
    }
    if side == "reference":
        assert reference("diffusers").WanTransformer3DModel  # imports it
    before = reset_resident_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    module = loaders[side]()
    for parameter in module.parameters():
        parameter.view(-1)[:: PAGE // parameter.element_size()].sum()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    peak = resident_peak()
    return seconds | {"peak_bytes": None if before is None or peak is None else peak - before}


if __name__ == "__main__":
    if int(sys.argv[3]):
        torch.set_num_threads(int(sys.argv[3]))
    print(json.dumps(load_once(Path(sys.argv[1]), sys.argv[2])))

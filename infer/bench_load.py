"""Loading a sharded release, each time in a process of its own: python -m infer.bench_load

    python -m infer.bench_load FOLDER ours|reference

reads the transformer of a folder in bfloat16, touches every page of it, and prints seconds and
bytes as JSON. `infer.bench` writes the folder and takes turns.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
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


def write_release(folder: Path, gigabytes: float, seed: int) -> int:
    """A sharded transformer of about that size in the released layout; its exact bytes.

    Its layers share their values, so that writing needs the memory of one of them.
    """
    heads = 24 if gigabytes >= WIDE_FROM else 6
    config = DiTConfig(num_attention_heads=heads, ffn_dim=14336 * heads // 24, num_layers=1)
    one, two = (num_bytes(build_network(replace(config, num_layers=n))) for n in (1, 2))
    layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    config = replace(config, num_layers=layers)
    generator = torch.Generator().manual_seed(seed)
    values: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    module = build_network(config)
    for name, parameter in module.state_dict().items():
        key = (parameter.shape, stored_dtype(name))
        if key not in values:
            values[key] = torch.randn(parameter.shape, generator=generator).to(key[1])
        state[name] = values[key]
    total = sum(tensor.nbytes for tensor in state.values())
    save_component(state, folder, "transformer", max_shard_bytes=max(1, total // SHARDS))
    write_config(folder, config.to_json())
    return total


def build_network(config: DiTConfig) -> WanDiT:
    return build_on_meta(lambda: WanDiT(config))


def stored_dtype(name: str) -> torch.dtype:
    return target_dtype(name, torch.float32, BF16, WanDiT.FLOAT32_PARAMETERS)


def num_bytes(module: nn.Module) -> int:
    return sum(p.numel() * stored_dtype(name).itemsize for name, p in module.named_parameters())


def contest(config: BenchConfig, scratch: Path) -> Outcome:
    """Seconds and peak resident memory of both sides; the files are in the page cache."""
    size = write_release(scratch / "transformer", config.load_gb, config.seed)
    taken: dict[str, list[dict[str, Any]]] = {"ours": [], "reference": []}
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
    return Outcome("load", f"{size / 1e9:.2f} GB in bfloat16", timings, goal=2.0)


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

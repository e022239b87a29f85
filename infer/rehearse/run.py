"""Write the release, run infer.sample on it, then the references, and report what it took."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from configs.progress import STATUS, doing
from configs.rehearsal import RehearseConfig
from infer.machine import environment
from infer.parity.models import reference
from infer.parity.tolerance import Row, aligned
from infer.parity.tolerance import table as parity_table
from infer.rehearse.reference import make_reference
from infer.rehearse.release import write_release
from infer.rehearse.watch import StageUse, Watch
from infer.sample.record import BAD_RESULT
from wan.errors import WanError
from wan.files import expanded, read_json, read_sealed, write_json
from wan.pipeline.memory import size
from wan.runtime.memory_meter import free_bytes
from wan.runtime.offload import resolve_device


def rehearse(config: RehearseConfig) -> int:
    """Run the whole rehearsal; returns the exit code.

    Raises:
        WanError: the disk has no room, the references are not installed, or files cannot be cold.
    """
    if config.compare:
        with doing("loading diffusers"):
            reference("diffusers")  # its absence is reported before all work
    if config.cold and not hasattr(os, "posix_fadvise"):
        raise WanError("cold=true: this system can't be asked to forget a file; leave it out")
    folder = expanded(config.folder)
    model, videos = folder / config.release, folder / "videos"
    with doing(f"writing {config.release} with random weights"):
        is_new = write_release(config.release, model, config.seed)
    try:
        return report(config, model, videos)
    finally:
        if is_new and not config.keep:
            shutil.rmtree(model, ignore_errors=True)


def report(config: RehearseConfig, model: Path, videos: Path) -> int:
    """Run and compare; print the tables, and keep them beside the video."""
    free = free_bytes(torch.device("cpu"))
    if config.cold:
        forget(model)
    code, record_path, watch = run_sample(config, model, videos)
    if record_path is None:
        return code
    record = read_sealed(record_path)
    use = watch.stages(record["begun"], record["seconds"])
    weights_bytes = sum(file.stat().st_size for file in model.rglob("*.safetensors"))
    print(
        f"\n{config.release}, {weights_bytes / 1e9:.1f} GB with random weights, {config.width}x"
        f"{config.height}, {config.num_frames} frames, {describe(config)}; "
        f"{size(free)} were free"
    )
    print(use_table("this project", use, record.get("predicted_memory_bytes")))
    rows: list[Row] = []
    theirs: dict[str, StageUse] = {}
    if config.compare:
        if config.cold:
            forget(model)
        rows, theirs = run_reference(config, model, record_path)
        print("\n" + use_table("diffusers and transformers, loading within each stage", theirs))
        print("\n" + parity_table(rows))
    values = {
        "config": asdict(config) | {"folder": None},
        "environment": environment(resolve_device(config.device)),
        "weights_bytes": weights_bytes,
        "free_bytes": free,
        "predicted_memory_bytes": record.get("predicted_memory_bytes"),
        "stages": {name: asdict(one) for name, one in use.items()},
        "reference_stages": {name: asdict(one) for name, one in theirs.items()},
        "rows": [asdict(row) for row in rows],
    }
    write_json(record_path.with_suffix(".rehearsal.json"), values)
    print(f"\n{record_path.with_suffix('.rehearsal.json')}")
    return 0 if all(row.passed for row in rows) else BAD_RESULT


def kind_of_weights(config: RehearseConfig) -> str:
    """The 8-bit format of the weights, or their dtype."""
    return config.dtype if config.quantize == "none" else config.quantize


def describe(config: RehearseConfig) -> str:
    """How the weights are kept, in words."""
    words = [kind_of_weights(config)]
    words += [f"offload={config.offload}"] if config.offload != "none" else []
    return ", ".join(words)


def sample_options(config: RehearseConfig, model: Path, videos: Path) -> list[str]:
    """The command line of infer.sample."""
    preset = [] if config.release == "tiny" else [f"model={config.release}"]
    names = ("height", "width", "num_frames", "seed", "device", "dtype", "quantize", "offload")
    values = [f"{name}={getattr(config, name)}" for name in names]
    steps = [] if config.steps is None else [f"steps={config.steps}", "allow_untrained=true"]
    return [
        *preset,
        f"checkpoint={model}",
        f"prompt={config.prompt}",
        *values,
        *steps,
        "preflight=always",
        f"progress={str(STATUS.wanted).lower()}",
        f"output_dir={videos}",
    ]


def run_sample(config: RehearseConfig, model: Path, videos: Path) -> tuple[int, Path | None, Watch]:
    """infer.sample in a process of its own, and what looked at it.

    Returns:
        its exit code, its record if it made a video, and the watch.
    """
    options = sample_options(config, model, videos)
    command = [sys.executable, "-m", "infer.sample", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    with process, Watch(process.pid) as watch:
        assert process.stdout is not None
        try:
            lines = process.stdout.read().split("\n")
            code = process.wait()
        except BaseException:  # Ctrl-C, SIGTERM: no process is left behind
            process.terminate()
            raise
    print("\n".join(lines).strip())
    made = [Path(line) for line in lines if line.endswith(".mp4")]
    record = made[0].with_suffix(".json") if code == 0 and made else None
    return code, record, watch


def run_reference(
    config: RehearseConfig, model: Path, record: Path
) -> tuple[list[Row], dict[str, StageUse]]:
    """The references in a process of their own: the comparison, and what they took.

    Raises:
        WanError: they failed; their traceback was printed.
    """
    out = record.with_suffix(".reference.json")
    kind = kind_of_weights(config)
    process = get_context("spawn").Process(target=make_reference, args=(model, record, kind, out))
    process.start()
    assert process.pid is not None
    with doing("the same video by diffusers and transformers"), Watch(process.pid) as watch:
        try:
            process.join()
        except BaseException:
            process.terminate()
            raise
    if process.exitcode != 0:
        raise WanError(f"the references failed with exit code {process.exitcode}")
    about = read_json(out)
    out.unlink()
    rows = [Row(**row) for row in about["rows"]]
    return rows, watch.stages(about["begun"], about["seconds"])


HEADER = ("", "seconds", "held MB", "predicted", "mapped MB", "from disk MB")


def use_table(
    title: str, stages: Mapping[str, StageUse], predicted: Mapping[str, int] | None = None
) -> str:
    """A row for each stage."""

    def megabytes(value: int | None) -> str:
        return "" if value is None else f"{value / 1e6:.0f}"

    lines: list[tuple[str, ...]] = [(title, *HEADER[1:])]
    for name, one in stages.items():
        foreseen = (predicted or {}).get(name)
        lines.append(
            (
                name,
                f"{one.seconds:.1f}",
                *map(megabytes, (one.held, foreseen, one.mapped, one.read)),
            )
        )
    return aligned(lines, left=(0,))


def forget(model: Path) -> None:
    """Ask the system to drop the pages of a model's files."""
    for file in model.rglob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

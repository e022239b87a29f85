"""The same command again: after kill -9 at any moment, and after the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import test_distill
import torch
from test_train_checkpoint import assert_same

import train.distill.run as module
from train.checkpoint import best_checkpoint, list_checkpoints, load_checkpoint
from train.metrics import read_metrics

teacher = test_distill.teacher

CLOCK = ("seconds_per_step", "clips_per_second", "memory_gb")  # what no two runs share

# A disk on which a save takes a while; Python imports a module of this name when it starts.
SLOW_DISK = """
import os, time
fsync = os.fsync
os.fsync = lambda file: (time.sleep(0.3), fsync(file))
"""


def command(output: Path, teacher: Path, bfloat16: bool) -> list[str]:
    return [
        *(sys.executable, "-m", "train.distill", f"output_dir={output}", f"checkpoint={teacher}"),
        *(f"bfloat16={bfloat16}", "compile=false", "threads=1", "batch_size=3", "max_drift=1000"),
        *("lr=1e-3", "critic_lr=1e-3", "warmup=1", "ema_decay=0.5"),
        *("scores.critic_ratio=2", "scores.critic_warmup=0", "scores.guidance_scale=2"),
        *("regression.num_pairs=4", "regression.steps=4"),
        *("validation_captions=1", "validation_steps=2"),
        *("loop.steps=8", "loop.log_every=1", "loop.save_every=3"),
    ]


def start(line: list[str], first_on_path: Path | None = None) -> subprocess.Popen:
    root = Path(__file__).parent.parent
    path = os.pathsep.join(str(p) for p in (first_on_path, root) if p is not None)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.Popen(
        line, cwd=root, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def lines_written(count: int) -> Callable[[Path], bool]:
    """The log has reached so many lines, more than the run before has left there."""

    def reached(run: Path) -> bool:
        path = run / "metrics.jsonl"
        return path.exists() and path.read_bytes().count(b"\n") >= count

    return reached


def saving(run: Path) -> bool:
    """A checkpoint is half written."""
    return any((run / "checkpoints").glob(".writing-*/state.safetensors"))


def kill_when(moment: Callable[[Path], bool], process: subprocess.Popen, run: Path) -> None:
    while not moment(run):
        assert process.poll() is None, f"ended before it was killed: {process.stderr.read()}"
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


# Checkpoints come after 3, 6 and 8 steps, each after a line of its own: the fourth, eighth, ...
MOMENTS = {
    False: [lines_written(1), saving, lines_written(5), saving],
    True: [lines_written(3), lines_written(6)],
}


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_run_killed_again_and_again_ends_as_one_that_was_not(tmp_path, teacher, bfloat16):
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow/sitecustomize.py").write_text(SLOW_DISK)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    unbroken = start(command(straight, teacher, bfloat16))
    try:
        for moment in MOMENTS[bfloat16]:
            slow = tmp_path / "slow" if moment is saving else None
            process = start(command(killed, teacher, bfloat16), slow)
            kill_when(moment, process, killed)
            if moment is saving:
                assert saving(killed)  # it is still half written
        last = start(command(killed, teacher, bfloat16))
        for process in (unbroken, last):
            _, told = process.communicate()
            assert process.returncode == 0, told
    finally:
        unbroken.kill()
    assert "continuing from step 3 of 8" in told.decode()
    assert_same_run(straight, killed)


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def assert_same_run(straight: Path, killed: Path) -> None:
    """Networks, averages, optimisers, numbers, pictures and what was exported."""
    names = [[p.name for p in list_checkpoints(run / "checkpoints")] for run in (straight, killed)]
    assert names[0] == names[1]
    trees = [load_checkpoint(run / "checkpoints/step-0000008") for run in (straight, killed)]
    assert trees[0]["modules"].keys() == {"student", "critic"}
    for tree in trees:
        tree["settings"].pop("output_dir")
    assert_same(*trees)
    logs = [
        [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(log)]
        for log in (straight / "metrics.jsonl", killed / "metrics.jsonl")
    ]
    assert [row["step"] for row in logs[0]] == [0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 7]
    assert logs[0] == logs[1]
    for part in ("samples", "model"):
        files = [f.relative_to(straight) for f in (straight / part).rglob("*") if f.is_file()]
        assert files
        for file in files:
            one, other = (run / file for run in (straight, killed))
            # The encoder of clips does not give equal bytes for equal frames.
            assert other.exists() if file.suffix == ".mp4" else same_bytes(one, other), file


@pytest.mark.filterwarnings("ignore:.*matrices of zeros")
def test_the_best_student_of_a_finished_run_is_exported_when_asked_for(
    tmp_path, teacher, monkeypatch, capsys
):
    healths = iter([0.9, 0.2])
    monkeypatch.setattr(module, "panel_numbers", lambda *_: {"health": next(healths)})
    config = test_distill.settings(tmp_path, teacher)
    assert module.distill(config) == 0
    last = test_distill.student_weights(config)
    assert module.distill(replace(config, export="best")) == 0
    assert "the healthiest checkpoint is step-0000002" in capsys.readouterr().out
    best = test_distill.student_weights(config)
    folder = best_checkpoint(tmp_path / "run/checkpoints")
    average = load_checkpoint(folder)["averages"]["student"]
    assert any(not torch.equal(best[name], last[name]) for name in best)
    assert all(torch.equal(best[name], average["weights"][name]) for name in best)

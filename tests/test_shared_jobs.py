"""Processes that share the jobs of a command make what one process makes, and nothing twice."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_ablate import grid, model  # noqa: F401
from test_parallel import free_ports
from test_study import ceilings

import infer.ablate.__main__ as ablate
import infer.ablate.run
import infer.evaluate.__main__ as evaluate
import infer.evaluate.run
import infer.study.__main__ as study
from configs.ablation import GridConfig
from configs.cli import Run
from configs.evaluation import EvaluateConfig
from configs.schema import SamplerConfig
from configs.start import interrupt_from_now_on
from infer.evaluate import parts
from infer.evaluate.report import Report
from infer.evaluate.sources import SOURCES
from infer.processes import Processes
from wan.errors import WanError
from wan.models.attention_config import AttentionConfig

ROOT = Path(__file__).parent.parent
SMALL = {"height": 64, "width": 64, "num_frames": 9}


def run(command, config) -> int:
    return command.main(Run(config, {}, {}, "")) or 0


def commands(folder: Path, model: Path) -> dict:  # noqa: F811
    """Each command with what it makes in a folder: an entry of the grid of prompts fails."""
    bad = AttentionConfig("sliding_tile", window=[2, 1, 1])
    compared = grid(
        folder / "compared",
        model,
        prompt=None,
        prompts=["a red circle", "a star"],
        grid=GridConfig(attention=["bad", "sdpa", "frame_causal"], steps=[1]),
        variants={"bad": bad},
    )
    world = grid(folder / "world", model, prompt=None, num_captions=3, **SMALL)
    evaluated = EvaluateConfig(
        checkpoint=str(model),
        device="cpu",
        sampler=SamplerConfig(steps=1),
        num_captions=5,
        output=str(folder / "clips.json"),
        sheet=str(folder / "clips.png"),
        **SMALL,
    )
    return {
        "compared": (ablate, compared),
        "world": (ablate, replace(world, grid=GridConfig(["sdpa", "spatial"], steps=[1]))),
        "study": (study, ceilings(folder / "study", only=["renders"])),
        "evaluate": (evaluate, evaluated),
    }


def killed(folder: Path) -> EvaluateConfig:
    return EvaluateConfig(
        source="renders",
        num_captions=8,
        batch_size=2,
        device="cpu",
        output=str(folder / "killed.json"),
        **SMALL,
    )


def note_what_is_made(made: list[str]) -> None:
    """Clips by what they depend on, from now on, of this process."""
    make_clips, make_video = parts.evaluate, infer.ablate.run.make_video

    def noting_clips(examples, source, batch_size):
        for result, video in make_clips(examples, source, batch_size):
            made.append(f"{source.__qualname__} {result.example}")
            yield result, video

    def noting_videos(runner, setting, seed, prompt):
        made.append(f"{setting.attention_name} {setting.sampler.steps} {seed} {prompt}")
        return make_video(runner, setting, seed, prompt)

    parts.evaluate, infer.ablate.run.make_video = noting_clips, noting_videos


def run_process(rank: int, folder: Path, model: Path, port: int) -> None:  # noqa: F811
    """One of two: every command, then one that fails in the second process, then it is killed."""
    torch.set_num_threads(1)
    interrupt_from_now_on()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    made: list[str] = []
    note_what_is_made(made)
    with (
        (folder / f"err {rank}").open("w") as err,
        (folder / f"out {rank}").open("w") as out,
        redirect_stderr(err),
        redirect_stdout(out),
    ):
        codes = {name: run(*what) for name, what in commands(folder, model).items()}
        (folder / f"made {rank}").write_text(json.dumps([codes, made]))
        sys.stderr.flush()
        make = SOURCES["renders"]

        def failing(config):
            if rank:
                raise WanError("no GPU left")
            return make(config)

        SOURCES["renders"] = failing
        with pytest.raises(WanError, match="no GPU left" if rank else "process 1: no GPU left"):
            run(evaluate, replace(killed(folder), output=None))
        parts_made = []

        def killed_or_stopped(config):
            source = make(config)

            def in_the_second_part(batch):
                parts_made.append(batch)
                if len(parts_made) < 2:
                    return source(batch)
                if rank:
                    while not (folder / "waits").exists():
                        time.sleep(0.01)
                    os.kill(os.getpid(), signal.SIGKILL)
                (folder / "waits").touch()
                signal.pause()  # until SIGTERM comes, as torchrun sends it to those that are left
                return source(batch)

            return in_the_second_part

        SOURCES["renders"] = killed_or_stopped
        run(evaluate, killed(folder))


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """Pictures are drawn in the tests of the commands, and take longer than all else here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "draw", lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def two(tmp_path_factory, model) -> Path:  # noqa: F811
    """What two processes have made."""
    folder = tmp_path_factory.mktemp("two")
    arguments = (folder, model, *free_ports(1))
    # Forked, as a process that starts anew loads PyTorch for seconds.
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.start_processes(run_process, arguments, nprocs=2, start_method="fork")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory, model) -> tuple[Path, list[str]]:  # noqa: F811
    """What one process makes, and its clips."""
    folder, made = tmp_path_factory.mktemp("one"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "evaluate", parts.evaluate)  # as they are now, afterwards
        patch.setattr(infer.ablate.run, "make_video", infer.ablate.run.make_video)
        note_what_is_made(made)
        assert [run(*what) for what in commands(folder, model).values()] == [1, 0, 0, 0]
    return folder, made


def but_times(value):
    """Numbers to nine places: least squares differ in the last bits from call to call."""
    times = ("seconds", "stages", "processes", "digest", "output", "sheet", "notes")
    if isinstance(value, dict):
        kept = {n: v for n, v in value.items() if not any(time in n for time in times)}
        return {name: but_times(part) for name, part in kept.items()}
    if isinstance(value, list):
        return [but_times(part) for part in value]
    return round(value, 9) if isinstance(value, float) else value


def files_in(folder: Path) -> dict[str, Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path for path in found}


def test_two_processes_make_what_one_makes(one, two):
    theirs, ours = files_in(one[0]), files_in(two)
    ours = {n: p for n, p in ours.items() if p.suffix and not n.startswith("killed")}
    assert theirs.keys() == ours.keys()
    for name, file in theirs.items():
        if file.suffix == ".json":
            records = [json.loads(path.read_text()) for path in (file, ours[name])]
            assert but_times(records[0]) == but_times(records[1]), name
        elif file.suffix == ".safetensors":
            tensors = load_file(file), load_file(ours[name])
            assert all(torch.equal(t, tensors[1][n]) for n, t in tensors[0].items()), name
        elif file.name in ("clips.mp4", "clips.png"):
            assert file.read_bytes() == ours[name].read_bytes(), name


def test_nothing_is_made_twice_and_both_take_part(one, two):
    (codes, own), (other_codes, others) = (
        json.loads((two / f"made {rank}").read_text()) for rank in range(2)
    )
    assert sorted(own + others) == sorted(one[1])
    assert own
    assert others
    assert list(codes.values()) == [1, 0, 0, 0]  # a cell fails
    assert set(other_codes.values()) == {0}  # what another process ends with would end the first


def test_each_line_says_whose_it_is_and_what_belongs_to_all_is_said_once(two):
    said = [(two / f"err {rank}").read_text().splitlines() for rank in range(2)]
    assert all(line.startswith(f"[{rank}] ") for rank, lines in enumerate(said) for line in lines)
    headers = [line for line in said[0] if "share" in line]
    assert headers == [
        *("[0] 2 processes share 2 references", "[0] 2 processes share 6 cells"),
        *("[0] 2 processes share 4 parts of cells", "[0] 2 processes share 6 parts of the clips"),
        *("[0] 2 processes share 5 clips", "[0] 2 processes share 8 clips"),
        "[0] 2 processes share 8 clips",
    ]
    assert not [line for line in said[1] if "share" in line]
    failures = [line for lines in said for line in lines if "failed (WanError)" in line]
    assert len(failures) == 1  # of two prompts, in whichever process, for the same reason
    assert "[0] 2 cells failed, all for the same reason: model, bad" in "\n".join(said[0])
    assert (two / "out 1").read_text() == ""
    told = (two / "out 0").read_text()
    assert told.count("all that was stated") == 1
    assert "1 threads, 2 processes at once. Processes at once on one machine" in told


def test_what_a_killed_process_had_not_made_is_made_by_the_next_run(two, monkeypatch):
    made = []
    make = parts.evaluate
    monkeypatch.setattr(parts, "evaluate", lambda *a: made.append(len(a[0])) or make(*a))
    assert sorted(path.name for path in two.glob("killed*")) == ["killed.clips", "killed.parts"]
    assert run(evaluate, killed(two)) == 0
    assert made == [2, 2]
    record = json.loads((two / "killed.json").read_text())
    assert record["summary"]["joint"]["total"] == 8
    assert sorted(clip.get("processes", 1) for clip in record["clips"]) == [1] * 4 + [2] * 4
    assert [clip["seed"] for clip in record["clips"]] == list(range(8))
    assert not (two / "killed.parts").exists()


def test_torchrun_starts_them(tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    words = ["source=renders", "num_captions=2", "height=64", "width=64", "num_frames=9"]
    done = subprocess.run(
        [sys.executable, "-m", *torchrun, "infer.evaluate", *words, "device=cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all that was stated") == 1
    assert "[0] 2 processes share 2 clips" in done.stderr


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    second = Processes(1, 2, 1)
    assert second.device("cpu") == "cpu"
    assert Processes().device("cuda") == "cuda"  # alone
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert second.device("auto") == second.device("cuda") == "cuda:1"
    with pytest.raises(WanError, match="each takes a GPU"):
        second.device("cuda:0")
    with pytest.raises(WanError, match="--nproc-per-node 2"):
        Processes(2, 3, 2).device("auto")

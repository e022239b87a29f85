"""The rehearsal at full size: what is written, what is looked at, and one whole run, small."""

import json
import os
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch

from configs.progress import progress_shown
from configs.rehearsal import RELEASES, RehearseConfig
from infer.rehearse import release as releases
from infer.rehearse.reference import TOLERANCES
from infer.rehearse.release import MARK, cut, random_state, release_named, write_release
from infer.rehearse.run import sample_options, use_table
from infer.rehearse.watch import Look, StageUse, Watch
from wan.errors import WanError
from wan.pipeline.folder import ModelFolder
from wan.weights.checkpoint import open_checkpoint

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("fastwan_ti2v_5b", 24.3), ("wan22_ti2v_5b", 34.2), ("wan22_t2v_a14b", 126.2)],
)
def test_a_release_takes_as_much_as_on_the_hub(name, gigabytes):
    assert release_named(name).num_bytes / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_every_release_that_can_be_asked_for_is_known_and_none_is_another():
    sizes = [release_named(name).num_bytes for name in RELEASES]
    assert len(set(sizes)) == len(RELEASES)


def test_a_written_release_is_found_again_and_nothing_else_is_taken_for_it(tmp_path):
    folder = tmp_path / "tiny"
    assert write_release("tiny", folder, seed=0)
    assert not write_release("tiny", folder, seed=0)  # it is there
    model = ModelFolder.read(folder)
    state = random_state(release_named("tiny"), "transformer", 0)
    stored = open_checkpoint(model.part("transformer")).map()
    assert len(stored) == len(state)
    assert stored["proj_out.weight"].equal(state["head.proj.weight"])
    with pytest.raises(WanError, match="something else than tiny of seed 1"):
        write_release("tiny", folder, seed=1)
    (folder / MARK).unlink()
    with pytest.raises(WanError, match="something else"):
        write_release("tiny", folder, seed=0)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(releases.shutil, "disk_usage", lambda _: usage(23_000_000_000))
    with pytest.raises(WanError, match=r"take 24\.3 GB, and 23\.0 GB are free; .*smaller release="):
        write_release("fastwan_ti2v_5b", tmp_path / "model", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_views_of_the_pool_whatever_their_shape_and_differ_from_each_other():
    pool = torch.arange(1000.0)
    for shape in ((7,), (3, 4), (5, 2, 3), (300, 40), (4, 1, 1, 1)):
        views = [cut(pool, torch.Size(shape), number) for number in (0, 12345)]
        assert all(view.shape == shape for view in views)
        assert all(view.untyped_storage().data_ptr() == pool.data_ptr() for view in views)
        assert not views[0].equal(views[1])
    large = cut(pool, torch.Size((300, 40)), 5)
    assert len({row[0].item() for row in large}) == 300  # no row twice


@needs_linux
def test_what_a_process_holds_is_told_apart_stage_by_stage():
    code = (
        "import json, time, sys\n"
        "begun, seconds = {}, {}\n"
        "time.sleep(0.3)\n"  # so that it is looked at once all imports are done
        "for name, size in (('small', 1), ('large', 64), ('after', 0)):\n"
        "    begun[name] = time.time()\n"
        "    held = bytearray(b'x') * (size << 20)\n"
        "    time.sleep(0.3)\n"
        "    seconds[name] = time.time() - begun[name]\n"
        "    held = None\n"
        "print(json.dumps([begun, seconds]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with process, Watch(process.pid) as watch:
        begun, seconds = json.loads(process.stdout.read())
    use = watch.stages(begun, seconds)
    assert use["large"].held == pytest.approx(64 << 20, rel=0.1)
    assert use["small"].held < 8 << 20
    assert use["after"].seconds == pytest.approx(0.3, abs=0.2)


def test_what_the_disk_delivers_within_a_stage_is_counted_from_its_begin():
    watch = Watch(os.getpid())
    watch.looks = [Look(float(i), 10 * i, 0, 100 * i) for i in range(10)]
    use = watch.stages({"a": 2.5, "b": 5.5}, {"a": 3.0, "b": 2.0})
    assert use["a"] == StageUse(3.0, held=50 - 20, mapped=0, read=500 - 200)
    assert use["b"].read == 700 - 500
    assert watch.stages({"late": 50.0}, {"late": 1.0})["late"] == StageUse(1.0)


def test_the_table_has_the_prediction_beside_what_was_held():
    table = use_table("ours", {"decode": StageUse(1.25, 7_000_000)}, {"decode": 9_000_000})
    assert table.splitlines()[1].split() == ["decode", "1.2", "7", "9"]


def test_a_small_rehearsal_runs_from_writing_to_the_comparison(tmp_path):
    pytest.importorskip("diffusers")
    options = ["release=tiny", "height=32", "width=32", "compare=true", "keep=true"]
    command = [sys.executable, "-m", "infer.rehearse", *options, f"folder={tmp_path}"]
    started = time.time()
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (report,) = (tmp_path / "videos").glob("*.rehearsal.json")
    values = json.loads(report.read_text())
    assert [row["what"] for row in values["rows"]] == ["latents", "pixels"]
    assert all(0 < row["relative_rms"] < TOLERANCES["bfloat16"] for row in values["rows"])
    assert {"load", "encode_text", "denoise", "decode"} <= values["stages"].keys()
    total = sum(stage["seconds"] for stage in values["stages"].values())
    assert 0 < total < time.time() - started
    assert (tmp_path / "tiny" / MARK).is_file()
    assert "held MB" in run.stdout


def test_what_it_starts_is_as_quiet_as_it_is_itself(tmp_path):
    for wanted in (True, False):
        with progress_shown(wanted):
            options = sample_options(RehearseConfig(release="tiny"), tmp_path, tmp_path)
        assert f"progress={str(wanted).lower()}" in options

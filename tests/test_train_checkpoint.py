"""Training checkpoints: what is saved comes back, and damage is noticed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from train.checkpoint import (
    best_checkpoint,
    join_tensors,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    mark_best,
    save_checkpoint,
    split_tensors,
)
from wan.errors import WanError


def example_state() -> dict:
    layer = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return {"step": 3, "modules": {"a": layer.state_dict()}, "optimizers": optimizer.state_dict()}


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_nested_states_survive_the_way_through_files(tmp_path):
    state = example_state()
    assert_same(state, load_checkpoint(save_checkpoint(tmp_path, 3, state)))


def test_splitting_keeps_integer_keys_and_none():
    tensors = {}
    tree = split_tensors({0: {"x": torch.ones(2)}, "n": None}, tensors)
    assert_same(join_tensors(tree, tensors), {0: {"x": torch.ones(2)}, "n": None})


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000020", "step-0000030"]


def test_what_a_killed_save_left_behind_is_removed(tmp_path):
    save_checkpoint(tmp_path, 1, {"step": 1})
    (tmp_path / ".writing-step-0000002-123").mkdir()
    load_latest(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]


def test_pruning_keeps_what_was_just_written_and_drops_later_damaged_ones(tmp_path):
    for step in (1, 2, 9):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=3)
    save_checkpoint(tmp_path, 3, {"step": 3}, keep_last=2)  # 9 was damaged, 2 was resumed
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]


def test_a_flipped_byte_is_noticed_and_the_one_before_is_used(tmp_path, capsys):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((64,), float(step))})
    file = tmp_path / "step-0000002" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    tree = load_latest(tmp_path)
    assert tree is not None
    assert tree["step"] == 1
    assert "sha256" in capsys.readouterr().err


def test_no_checkpoint_is_not_an_error_but_only_damaged_ones_are(tmp_path):
    assert load_latest(tmp_path) is None
    folder = save_checkpoint(tmp_path, 1, {"step": 1})
    (folder / "manifest.json").unlink()
    with pytest.raises(WanError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)


def test_a_failed_save_leaves_earlier_checkpoints_and_no_litter(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1})

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("train.checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 2, {"step": 2, "x": torch.ones(1)})
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]


KILLED = """
import sys, torch
from pathlib import Path
from train.checkpoint import save_checkpoint
print("ready", flush=True)
for step in range(1, 10_000):
    save_checkpoint(Path(sys.argv[1]), step, {"step": step, "x": torch.full((200_000,), step)})
"""


def test_a_process_killed_while_saving_leaves_a_checkpoint_that_loads(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    while not list_checkpoints(tmp_path):
        time.sleep(0.01)
    time.sleep(0.25)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    tree = load_latest(tmp_path)
    assert tree is not None
    assert torch.equal(tree["x"], torch.full((200_000,), tree["step"]))


def test_the_best_checkpoint_outlives_the_last_ones(tmp_path):
    for step, health in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, 0.8)):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=2)
        mark_best(tmp_path, step, health)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-000000{n}" for n in (2, 4, 5)]
    assert load_checkpoint(best_checkpoint(tmp_path)) == {"step": 2}
    save_checkpoint(tmp_path, 1, {"step": 1})  # set back: what came later is gone, the best too
    assert best_checkpoint(tmp_path) is None
    mark_best(tmp_path, 1, 0.1)
    assert best_checkpoint(tmp_path).name == "step-0000001"

"""Training checkpoints: what is saved comes back, and damage is noticed."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from train.checkpoint import (
    best_checkpoint,
    join_tensors,
    list_checkpoints,
    load_checkpoint,
    load_latest,
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


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
        ("state.safetensors", lambda content: content[: len(content) // 2]),
        ("state.json", lambda content: content[:-1]),
        ("manifest.json", lambda content: content[: len(content) // 2]),
        ("manifest.json", lambda content: b"{\xa2" + content[2:]),  # a high bit: no UTF-8
    ],
)
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path, capsys, name, damage):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"step": step, "x": torch.full((64,), float(step))})
    file = tmp_path / "step-0000002" / name
    file.write_bytes(damage(file.read_bytes()))
    tree = load_latest(tmp_path)
    assert tree is not None
    assert tree["step"] == 1
    message = capsys.readouterr().err
    assert "step-0000002" in message
    assert ("damaged" if name == "manifest.json" else "sha256") in message
    save_checkpoint(tmp_path, 3, {"step": 3})  # which asks how healthy the damaged one was
    assert best_checkpoint(tmp_path) is None


def test_no_checkpoint_is_not_an_error_but_only_damaged_ones_are(tmp_path):
    assert load_latest(tmp_path) is None
    folder = save_checkpoint(tmp_path, 1, {"step": 1})
    (folder / "manifest.json").unlink()
    with pytest.raises(WanError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: writing fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "state",
    [{"x": torch.ones(50_000)}, {"x": ["many words"] * 20_000}],
    ids=["tensors", "numbers and names"],
)
def test_what_does_not_fit_on_the_disk_is_an_os_error_that_names_the_file(tmp_path, state):
    save_checkpoint(tmp_path, 1, {"step": 1})
    with files_of_at_most(100_000), pytest.raises(OSError, match="step-0000002") as caught:
        save_checkpoint(tmp_path, 2, state)
    assert "large" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000001"]


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


KILLED_AT = """
import os, shutil, signal, sys
from pathlib import Path
import torch
import train.checkpoint as module

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

for folder in map(Path, sys.argv[1:]):
    if os.fork() == 0:
        home, name = (shutil, "rmtree") if folder.name == "rmtree" else (module, folder.name)
        setattr(home, name, die)
        module.save_checkpoint(folder, 4, {"step": 4, "x": torch.ones(9)}, 1, health=0.95)
        os._exit(0)
    assert os.WIFSIGNALED(os.wait()[1]), folder
"""


def test_wherever_a_save_is_killed_the_newest_and_the_best_are_there(tmp_path):
    before = ("split_tensors", "save_file", "flush_to_disk", "sha256_file", "commit")
    after = ("prune", "rmtree")  # the new checkpoint has its name
    folders = [tmp_path / moment for moment in before + after]
    for folder in folders:
        for step, health in ((1, 0.5), (2, 0.9), (3, 0.7)):
            save_checkpoint(folder, step, {"step": step}, 1, health=health)
    subprocess.run([sys.executable, "-c", KILLED_AT, *map(str, folders)], check=True)
    for folder in folders:
        committed = folder.name in after
        assert load_latest(folder)["step"] == (4 if committed else 3)
        assert best_checkpoint(folder).name == f"step-000000{4 if committed else 2}"
        save_checkpoint(folder, 5, {"step": 5}, 1, health=0.1)
        best = "step-0000004" if committed else "step-0000002"
        assert sorted(p.name for p in folder.iterdir()) == [best, "step-0000005"]


def test_the_best_checkpoint_outlives_the_last_ones(tmp_path):
    for step, health in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.6), (5, 0.8)):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=2, health=health)
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"step-000000{n}" for n in (2, 4, 5)]
    assert load_checkpoint(best_checkpoint(tmp_path)) == {"step": 2}
    save_checkpoint(tmp_path, 1, {"step": 1})  # set back: what came later is gone, the best too
    assert best_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, 2, {"step": 2}, health=0.1)
    assert best_checkpoint(tmp_path).name == "step-0000002"


def test_a_run_set_back_keeps_the_best_of_what_it_goes_on_from(tmp_path):
    for step, health in ((1, 0.6), (2, 0.5), (3, 0.9)):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=3, health=health)
    save_checkpoint(tmp_path, 2, {"step": 2}, keep_last=1, health=0.5)  # 3 was damaged
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000001", "step-0000002"]


def test_only_what_was_measured_can_be_the_best_and_of_equals_the_newest_is(tmp_path):
    for step, health in ((1, float("nan")), (2, 0.4), (3, 0.4), (4, None)):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=9, health=health)
    assert best_checkpoint(tmp_path).name == "step-0000003"


# --- folders that are not what their names say ----------------------------------------------------


def steps(root, *numbers, **options):
    for step in numbers:
        save_checkpoint(root, step, {"step": step, "x": torch.ones(3)}, **options)


def copy(root, name, new):
    return shutil.copytree(root / name, root / new, symlinks=True)


COPIES = ("step-best", "step-0000009", "step-0000100 (copy)", "step-000002", "step-+000003", "best")


def test_a_copy_is_neither_the_newest_nor_ever_removed(tmp_path, capsys):
    steps(tmp_path, 1, 2, 3, keep_last=9)
    for name in COPIES:
        copy(tmp_path, "step-0000001", name)
    assert load_latest(tmp_path)["step"] == 3
    said = capsys.readouterr().err
    for name in COPIES:
        assert f"{name} holds step 1 under another name and is not used" in said
    steps(tmp_path, 4, 5, keep_last=1)
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == sorted([*COPIES, "step-0000005"])
    assert best_checkpoint(tmp_path) is None


def test_only_copies_are_no_reason_to_begin_anew_silently(tmp_path):
    steps(tmp_path, 1)
    (tmp_path / "step-0000001").rename(tmp_path / "step-best")
    with pytest.raises(WanError, match=r"step-best holds step 1 .* rename it to step-0000001"):
        load_latest(tmp_path)
    (tmp_path / "step-best").rename(tmp_path / "step-0000001")
    assert load_latest(tmp_path)["step"] == 1


@pytest.mark.parametrize("kind", ["renamed", "file", "link", "dangling link", "folder"])
def test_what_has_the_name_of_a_new_checkpoint_is_moved_aside(tmp_path, capsys, kind):
    root, place = tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-0000002"
    steps(root, 1)
    steps(tmp_path / "elsewhere", 2)
    if kind == "renamed":
        copy(root, "step-0000001", "step-0000002")
    elif kind == "file":
        place.write_text("notes")
    elif kind == "folder":  # of nobody knows what
        copy(root, "step-0000001", "step-0000002")
        (place / "manifest.json").write_text('{"step": 7, "sha256": {}}')
    else:
        target = "../elsewhere/step-0000002" if kind == "link" else "nowhere"
        place.symlink_to(target, target_is_directory=True)
    steps(root, 2)
    assert load_latest(root)["step"] == 2
    aside = root / "step-0000002-aside-1"
    assert os.path.lexists(aside)
    assert aside.is_symlink() == ("link" in kind)
    assert "it is called step-0000002-aside-1 now" in capsys.readouterr().err
    assert (tmp_path / "elsewhere/step-0000002/state.safetensors").is_file()


def test_a_link_is_read_and_never_removed(tmp_path):
    root = tmp_path / "checkpoints"
    steps(root, 1, 2)
    moved = (root / "step-0000002").rename(tmp_path / "large disk")
    (root / "step-0000002").symlink_to(moved, target_is_directory=True)
    assert load_latest(root)["step"] == 2
    steps(root, 3, 4, keep_last=1)
    assert [p.name for p in list_checkpoints(root)] == ["step-0000002", "step-0000004"]
    assert (moved / "manifest.json").is_file()


def test_steps_are_numbers_and_not_texts(tmp_path):
    steps(tmp_path, 9_999_999, 10_000_000, keep_last=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-10000000"]
    assert load_latest(tmp_path)["step"] == 10_000_000


def test_a_damaged_manifest_counts_for_nothing_and_its_health_is_not_believed(tmp_path):
    for step, health in ((1, 0.2), (2, 0.4), (3, 0.3)):
        save_checkpoint(tmp_path, step, {"step": step}, keep_last=3, health=health)
    manifest = tmp_path / "step-0000003/manifest.json"
    manifest.write_text(manifest.read_text().replace("0.3", "0.9"))
    assert best_checkpoint(tmp_path).name == "step-0000002"
    steps(tmp_path, 4, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-0000002", "step-0000004"]


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        '{"step": "1", "sha256": {}}',
        '{"step": 1, "sha256": ["state.json"]}',
        '{"step": 1, "sha256": {"../secret": "0"}}',
        '{"step": 1, "sha256": {}, "health": "high"}',
    ],
)
def test_a_manifest_of_a_wrong_kind_is_damage(tmp_path, capsys, content):
    steps(tmp_path, 1)
    (tmp_path / "step-0000001/manifest.json").write_text(content)
    assert best_checkpoint(tmp_path) is None
    with pytest.raises(WanError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)
    assert "damaged checkpoint" in capsys.readouterr().err


def test_checkpoints_of_an_older_release_have_no_digest_of_the_manifest(tmp_path):
    steps(tmp_path, 1)
    manifest = tmp_path / "step-0000001/manifest.json"
    plain = {k: v for k, v in json.loads(manifest.read_text()).items() if k != "digest"}
    manifest.write_text(json.dumps(plain))
    assert load_latest(tmp_path)["step"] == 1

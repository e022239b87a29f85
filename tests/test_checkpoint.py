"""Folders, indices and shards that contradict each other are refused; sound ones open."""

import json
import os
from pathlib import Path

import pytest
import torch

from wan.errors import WanError
from wan.weights.checkpoint import open_checkpoint
from wan.weights.safetensors_file import write_tensors

STEM = "diffusion_pytorch_model"
SHARDS = {
    f"{STEM}-00001-of-00002.safetensors": ["a.weight", "b.weight"],
    f"{STEM}-00002-of-00002.safetensors": ["c.weight"],
}
FIRST, SECOND = SHARDS
INDEX = f"{STEM}.safetensors.index.json"


def write_index(folder: Path, weight_map: object, total_size: object = 24) -> None:
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))


@pytest.fixture
def folder(tmp_path):
    """A sound sharded checkpoint."""
    folder = tmp_path / "transformer"
    folder.mkdir()
    for name, tensors in SHARDS.items():
        write_tensors(folder / name, {t: torch.ones(2) for t in tensors}, {"format": "pt"})
    write_index(folder, {t: name for name, tensors in SHARDS.items() for t in tensors})
    (folder / "config.json").write_text("{}")
    return folder


def refused(path: Path, *words: str) -> None:
    with pytest.raises(WanError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_its_index_a_complete_set_and_one_file_open(folder):
    everything = ["a.weight", "b.weight", "c.weight"]
    assert sorted(open_checkpoint(folder).tensors) == everything
    assert sorted(open_checkpoint(str(folder / INDEX)).tensors) == everything
    assert open_checkpoint(folder).metadata == {"format": "pt"}
    (folder / INDEX).unlink()
    assert sorted(open_checkpoint(folder).tensors) == everything
    assert sorted(open_checkpoint(folder / FIRST).tensors) == everything[:2]
    (folder / FIRST).unlink()
    refused(folder, f"missing {FIRST}", "1 of 2 shards")
    (folder / SECOND).rename(folder / f"{STEM}.safetensors")
    assert list(open_checkpoint(folder).tensors) == ["c.weight"]
    assert torch.equal(open_checkpoint(folder).map()["c.weight"], torch.ones(2))


def test_nothing_to_open(tmp_path):
    refused(tmp_path / "missing", "no such file or folder")
    refused(tmp_path, "no .safetensors file here (found: nothing)")
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, "a whole pipeline", str(tmp_path / "transformer"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(tmp_path, "pytorch_model.bin", "weights_only=True")


def test_several_checkpoints_in_one_folder(folder):
    write_tensors(folder / f"{STEM}.fp16.safetensors", {"a.weight": torch.ones(2)})
    refused(folder, "several checkpoints", f"{STEM}.fp16*.safetensors", "give the file or index")
    assert len(open_checkpoint(folder / INDEX).tensors) == 3


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "its JSON is not an object"),
        ("{}", "needs a weight_map"),
        ('{"weight_map": []}', "needs a weight_map"),
        ('{"weight_map": {}}', "needs a weight_map"),
        ('{"weight_map": {"a": 1}}', "needs a weight_map"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "'a' occurs twice"),
        ("\xff\xfe", "not valid JSON"),
    ],
)
def test_damaged_indices(folder, content, words):
    (folder / INDEX).write_bytes(content.encode("latin-1"))
    refused(folder, INDEX, words)


def test_missing_and_unlisted_shards(folder):
    (folder / SECOND).rename(folder / f"{STEM}-00003-of-00003.safetensors")
    refused(folder, f"lists {SECOND}", "1 of 2 shards missing", "fetch them again")
    write_tensors(folder / SECOND, {"c.weight": torch.ones(2)})
    refused(folder, f"does not list {STEM}-00003-of-00003.safetensors", "move away")


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_one_tensor_in_two_shards_equal_or_not(folder, value):
    write_tensors(folder / SECOND, {"c.weight": torch.ones(2), "a.weight": torch.full((2,), value)})
    refused(folder, f"a.weight is in {FIRST} and in {SECOND}")


def test_a_tensor_in_another_shard_than_listed_missing_or_not_listed(folder):
    listed = {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}
    write_index(folder, {**listed, "b.weight": SECOND})
    refused(folder, f"b.weight is in {FIRST}, not in {SECOND}", "one revision")
    write_index(folder, {**listed, "d.weight": SECOND})
    refused(folder, f"d.weight is not in {SECOND}")
    del listed["b.weight"]
    write_index(folder, listed)
    refused(folder, f"b.weight in {FIRST} is not listed")


def test_a_wrong_total_size_warns(folder):
    listed = {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}
    write_index(folder, listed, 12)
    with pytest.warns(UserWarning, match="total_size 12, shards hold 24"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    [
        "/etc/x.safetensors",
        "../x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "\\\\srv\\x.safetensors",
        "x\0.safetensors",
        "sub/x.safetensors",
        "x" * 300 + ".safetensors",
        "x.bin",
        ".hidden.safetensors",
        "",
    ],
)
def test_shard_names_that_leave_the_folder_or_are_no_safetensors(folder, name):
    write_index(folder, {"a.weight": name})
    refused(folder, "shard name", ascii(name)[:120], "must be a plain .safetensors file name")


def test_symlinked_shards(folder, tmp_path):
    shard = folder / SECOND
    elsewhere = tmp_path / "elsewhere.safetensors"
    shard.rename(elsewhere)
    shard.symlink_to(elsewhere)
    refused(folder, f"{shard}: a symlink to {elsewhere}", "copy the file here")
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    refused(folder, "a broken symlink")
    shard.unlink()
    shard.symlink_to(SECOND)
    refused(folder, "a broken symlink")
    shard.unlink()
    elsewhere.rename(folder / "renamed.part")
    shard.symlink_to("renamed.part")
    assert len(open_checkpoint(folder).tensors) == 3
    (tmp_path / "link").symlink_to(folder)
    assert len(open_checkpoint(tmp_path / "link").tensors) == 3


def test_a_shard_that_is_no_file(folder):
    (folder / SECOND).unlink()
    os.mkfifo(folder / SECOND)
    refused(folder, SECOND, "not a regular file")
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    refused(folder, SECOND, "not a regular file")


def test_the_hub_cache_links_into_its_blobs_and_nowhere_else(folder, tmp_path):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "abc" / "transformer"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(folder.iterdir())):
        file.rename(repository / "blobs" / str(i))
        (snapshot / file.name).symlink_to(f"../../../blobs/{i}")
    assert len(open_checkpoint(snapshot).tensors) == 3
    stranger = tmp_path / "hub" / "models--other--name" / "blobs" / "1"
    stranger.parent.mkdir(parents=True)
    (repository / "blobs" / "2").rename(stranger)
    (snapshot / SECOND).unlink()
    (snapshot / SECOND).symlink_to(stranger)
    refused(snapshot, "outside its folder")


def test_a_damaged_shard_is_named(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    refused(folder, SECOND, "cut short")

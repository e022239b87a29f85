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


def refused(path: Path, *words: str, variant: str | None = None) -> None:
    with pytest.raises(WanError) as caught:
        open_checkpoint(path, variant)
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


def test_the_released_name_without_a_variant_is_taken_with_a_note(folder):
    write_tensors(folder / f"{STEM}.fp16.safetensors", {"a.weight": torch.ones(2)})
    with pytest.warns(UserWarning, match=rf"{STEM} is taken, not {STEM}\.fp16\*.*variant=fp16"):
        assert len(open_checkpoint(folder).tensors) == 3
    write_tensors(folder / "merged.safetensors", {"b.weight": torch.ones(2)})
    with pytest.warns(UserWarning, match=r"merged\*\.safetensors"):
        assert len(open_checkpoint(folder).tensors) == 3
    assert list(open_checkpoint(folder, "fp16").tensors) == ["a.weight"]
    refused(folder, "no weights of variant=bf16", STEM, variant="bf16")


def test_several_checkpoints_of_which_none_has_a_released_name(tmp_path):
    for name in ("ema", "ema.fp16", "merged"):
        write_tensors(tmp_path / f"{name}.safetensors", {"a.weight": torch.ones(2)})
    refused(tmp_path, "several checkpoints", "merged*.safetensors", "give the file or index")
    (tmp_path / "merged.safetensors").unlink()
    with pytest.warns(UserWarning, match="ema is taken"):
        open_checkpoint(tmp_path)
    write_tensors(tmp_path / "model.safetensors", {"a.weight": torch.ones(2)})
    write_tensors(tmp_path / f"{STEM}.safetensors", {"a.weight": torch.ones(2)})
    refused(tmp_path, "several checkpoints")


@pytest.mark.parametrize(
    ("shards", "index"),
    [
        (f"{STEM}.fp16-0000{{}}-of-00002.safetensors", f"{STEM}.safetensors.index.fp16.json"),
        (f"{STEM}-0000{{}}-of-00002.fp16.safetensors", f"{STEM}.safetensors.fp16.index.json"),
    ],
)
@pytest.mark.parametrize("with_index", [True, False])
def test_shards_of_a_variant_beside_those_without(folder, shards, index, with_index):
    names = [shards.format(number) for number in (1, 2)]
    for name, tensor in zip(names, "ab", strict=True):
        write_tensors(folder / name, {f"{tensor}.weight": torch.ones(2)})
    found = open_checkpoint(folder, "fp16").tensors
    if with_index:
        listed = {name: tensor.file.path.name for name, tensor in found.items()}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": listed}))
        found = open_checkpoint(folder, "fp16").tensors
    assert {tensor.file.path.name for tensor in found.values()} == set(names)
    with pytest.warns(UserWarning, match="variant=fp16"):
        assert len(open_checkpoint(folder).tensors) == 3
    (folder / names[0]).unlink()
    refused(folder, names[0], variant="fp16")


def test_variants_are_those_that_diffusers_writes(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "ffn_dim": 8, "num_layers": 2}
    network = diffusers.WanTransformer3DModel(**sizes, text_dim=8, freq_dim=8, cross_attn_norm=True)
    for shard in ("10GB", "4KB"):
        network.save_pretrained(tmp_path / shard)
        network.save_pretrained(tmp_path / shard, variant="fp16", max_shard_size=shard)
        found = open_checkpoint(tmp_path / shard, "fp16")
        assert set(found.tensors) == set(network.state_dict())
        assert all(".fp16" in file.path.name for file in found.files)
        assert (len(found.files) > 1) == (shard == "4KB")


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
    refused(folder, f"{shard}: leads to {elsewhere}", "copy them there")
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    refused(folder, f"{shard}: leads to")
    shard.unlink()
    shard.symlink_to("nowhere")
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
    refused(snapshot, f"outside of {snapshot}")


def test_a_damaged_shard_is_named(folder):
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)
    refused(folder, SECOND, "cut short")

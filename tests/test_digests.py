"""Hashes: a changed bit, a missing file and a stranger are all found."""

import hashlib
import os
import shutil
import subprocess
import time

import pytest
import torch

from wan.errors import WanError
from wan.pipeline.folder import load_part
from wan.pipeline.pipeline import WanDMDPipeline
from wan.weights import digests
from wan.weights.digests import (
    MANIFEST,
    verify_digests,
    verify_hub_digests,
    verify_manifest,
    write_manifest,
)
from wan.weights.hub import STUDENT


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights of mine.safetensors").write_bytes(bytes(range(256)) * 99)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x").write_text("not part of the model")
    return tmp_path


def test_a_manifest_is_what_sha256sum_reads(folder):
    write_manifest(folder)
    assert verify_manifest(folder) == verify_digests(folder) == 2
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", MANIFEST], cwd=folder, check=True)
    before = (folder / MANIFEST).read_text()
    assert write_manifest(folder).read_text() == before


def test_one_flipped_bit_a_missing_file_and_a_stranger_are_all_named(folder):
    write_manifest(folder)
    weights = folder / "vae" / "weights of mine.safetensors"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    (folder / "config.json").unlink()
    (folder / "extra.json").write_text("{}")
    with pytest.raises(WanError) as caught:
        verify_manifest(folder)
    for words in (
        "config.json is missing",
        "extra.json is not listed",
        "vae/weights of mine.safetensors has other content",
        "fetch these files again",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("line", ["x", "0" * 64 + "  ../x", "0" * 64 + "  /x", "0" * 63 + "  x"])
def test_manifests_that_are_none_or_point_outside(folder, line):
    (folder / MANIFEST).write_text(line + "\n")
    with pytest.raises(WanError, match="line 1 is not"):
        verify_manifest(folder)


def test_no_manifest(folder):
    with pytest.raises(WanError, match="has no SHA256SUMS"):
        verify_manifest(folder)
    with pytest.raises(WanError, match="not a link into the hub cache"):
        verify_digests(folder)


def test_hub_snapshots_are_held_against_their_blob_names(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    large, small = b"large" * 1000, b"{}\n"
    names = {
        "model.safetensors": (hashlib.sha256(large).hexdigest(), large),
        # what `git hash-object` says of a file that holds `{}` and a newline
        "config.json": ("0967ef424bce6791893e9a57bb952f80fd536e93", small),
    }
    for name, (digest, content) in names.items():
        (blobs / digest).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    assert verify_hub_digests(snapshot) == verify_digests(snapshot) == 2
    (blobs / names["model.safetensors"][0]).write_bytes(large[:-1] + b"x")
    with pytest.raises(WanError, match=r"model\.safetensors has other content"):
        verify_hub_digests(snapshot)
    (blobs / names["config.json"][0]).unlink()
    with pytest.raises(WanError, match=r"config\.json is missing; model\.safetensors has other"):
        verify_hub_digests(snapshot)


def test_an_empty_snapshot_proves_nothing(tmp_path):
    with pytest.raises(WanError, match="no files to verify"):
        verify_hub_digests(tmp_path)


# --- what is published is compared by whoever loads -----------------------------------------------


@pytest.fixture
def hashed(monkeypatch):
    """The files that are hashed, in order; what was remembered before is forgotten."""
    files = []

    def note(path):
        files.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(digests, "sha256_file", note)
    memory = digests.memory_file()
    memory.unlink(missing_ok=True)
    return files


@pytest.fixture
def model(tmp_path):
    """The shipped miniature; its files are older than the clock's tick."""
    folder = tmp_path / "model"
    shutil.copytree(STUDENT, folder)
    time.sleep(2 * digests.CLOCK_TICK_NS / 1e9)
    return folder


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


PARTS = ("transformer", "vae", "text_encoder")


@pytest.mark.parametrize("part", PARTS)
def test_one_flipped_bit_is_noticed_by_loading(model, part, hashed):
    load_part(model, part)
    file = next((model / part).glob("*.safetensors"))
    flip_a_bit(file)
    with pytest.raises(WanError, match=r"content is not what .*SHA256SUMS says.*Fetch it again"):
        load_part(model, part)
    assert hashed == [file, file]
    (model / MANIFEST).unlink()
    load_part(model, part)


def test_a_file_is_hashed_once_and_again_when_its_size_or_time_changes(model, hashed):
    file = next((model / "vae").glob("*.safetensors"))
    for _ in range(3):
        load_part(model, "vae")
    assert hashed == [file]
    status = file.stat()
    flip_a_bit(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # as `cp -p` and rsync do
    with pytest.raises(WanError, match="content is not"):
        load_part(model, "vae")
    assert hashed == [file, file]


def test_a_file_that_has_just_been_written_is_not_remembered(model, hashed):
    file = next((model / "vae").glob("*.safetensors"))
    for _ in range(2):
        os.utime(file)
        load_part(model, "vae")
    assert hashed == [file, file]


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"%s": 3}', '{"%s": [1, 2, 3, 4, "x"]}'])
def test_a_damaged_memory_is_no_memory(model, hashed, content):
    file = next((model / "vae").glob("*.safetensors"))
    digests.memory_file().parent.mkdir(exist_ok=True, parents=True)
    digests.memory_file().write_text(content.replace("%s", str(file)))
    load_part(model, "vae")
    load_part(model, "vae")
    assert hashed == [file]


@pytest.mark.parametrize("cache", ["/proc/nowhere", "/dev/null", None])
def test_where_nothing_can_be_remembered_files_are_hashed_each_time(
    model, hashed, monkeypatch, cache
):
    if cache is None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(digests.Path, "home", no_home)
        assert digests.memory_file() is None
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    for _ in range(2):
        load_part(model, "vae")
    assert len(hashed) == 2


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_the_hubs_names_are_compared_too(tmp_path, hashed):
    repository = tmp_path / "models--owner--name"
    blobs, vae = repository / "blobs", repository / "snapshots" / "abc" / "vae"
    blobs.mkdir(parents=True)
    vae.mkdir(parents=True)
    for file in (STUDENT / "vae").iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (vae / file.name).symlink_to(f"../../../blobs/{digest}")
    load_part(vae.parent, "vae")
    assert len(hashed) == 1
    flip_a_bit(next(vae.glob("*.safetensors")))
    with pytest.raises(WanError, match="content is not what the hub says"):
        load_part(vae.parent, "vae")


def test_a_model_that_is_saved_over_another_is_not_held_against_its_manifest(model):
    pipeline = WanDMDPipeline.from_pretrained(model)
    with torch.no_grad():
        pipeline.transformer.head.proj.bias.add_(1)
    pipeline.save_pretrained(model)
    WanDMDPipeline.from_pretrained(model)


def test_weights_without_published_digests_are_not_hashed(model, hashed):
    (model / MANIFEST).unlink()
    load_part(model, "vae")
    assert not hashed

"""Hashes: a changed bit, a missing file and a stranger are all found."""

import hashlib
import shutil
import subprocess

import pytest

from wan.errors import WanError
from wan.weights.digests import (
    MANIFEST,
    verify_digests,
    verify_hub_digests,
    verify_manifest,
    write_manifest,
)


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

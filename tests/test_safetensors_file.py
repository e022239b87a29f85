"""Damaged, hostile and mistaken files: each is refused by name, before a tensor is read."""

import json
import os
import pickle
import random
import struct
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from wan.errors import WanError
from wan.weights.safetensors_file import (
    MAX_HEADER_BYTES,
    map_tensors,
    raw_bytes,
    read_bytes,
    read_header,
    write_tensors,
)

TENSORS = {
    "blocks.0.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "blocks.1.weight": torch.arange(4, dtype=torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
}


def entry(start: int, end: int, dtype: str = "F32", shape: list | None = None) -> dict:
    shape = [(end - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def assemble(path: Path, header: dict | str | bytes, body: int) -> Path:
    """A file from any header text and so many body bytes."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\1" * body)
    return path


def refused(path: Path) -> str:
    """The message a file is refused with: it names the file and comes at once."""
    start = time.process_time()
    with pytest.raises(WanError) as caught:
        read_header(path)
    assert time.process_time() - start < 1
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_is_written_reads_back_bit_for_bit_here_and_in_the_reference_library(path):
    write_tensors(path, TENSORS, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    theirs = safetensors.torch.load_file(path)
    ours = map_tensors(header)
    assert set(ours) == set(theirs) == set(TENSORS)
    for name, tensor in TENSORS.items():
        for read in (ours[name], theirs[name]):
            assert read.dtype == tensor.dtype
            assert torch.equal(read, tensor)


def test_files_of_the_reference_library_are_read(path):
    safetensors.torch.save_file(TENSORS, path, {"note": "x"})
    ours = map_tensors(read_header(path))
    assert all(torch.equal(ours[name], tensor) for name, tensor in TENSORS.items())


def test_writing_is_deterministic_and_obeys_the_umask(tmp_path):
    for name, items in (("a", TENSORS.items()), ("b", reversed(TENSORS.items()))):
        old = os.umask(0o027)
        write_tensors(tmp_path / name, dict(items))
        os.umask(old)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(path):
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    broken = {"ok": torch.zeros(2), "meta": torch.zeros(2, device="meta")}
    with pytest.raises(NotImplementedError):
        write_tensors(path, broken)
    with pytest.raises(WanError, match=r"complex64 can't be written"):
        write_tensors(path, {"c": torch.zeros(1, dtype=torch.complex64)})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_mapping_shares_the_file_and_never_writes_to_it(path):
    write_tensors(path, TENSORS)
    before = path.read_bytes()
    tensors = map_tensors(read_header(path))
    tensors["blocks.0.weight"].fill_(7)
    assert path.read_bytes() == before
    again = map_tensors(read_header(path))
    assert torch.equal(again["blocks.0.weight"], TENSORS["blocks.0.weight"])


def test_an_unaligned_body_is_read_right(path):
    values = torch.arange(3, dtype=torch.float32)
    header = json.dumps({"a": entry(0, 12)})
    header += " " * (1 - (8 + len(header)) % 2)  # the body begins at an odd byte
    raw = header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(raw_bytes(values)))
    assert (8 + len(raw)) % 2 == 1
    assert torch.equal(map_tensors(read_header(path))["a"], values)


@pytest.mark.parametrize("keep", ["0", "7", "8", "header-1", "header", "body/2", "end-1"])
def test_cut_short(path, keep):
    write_tensors(path, TENSORS)
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = {"header-1": header - 1, "header": header, "end-1": len(whole) - 1}
    lengths["body/2"] = (header + len(whole)) // 2
    length = lengths[keep] if keep in lengths else int(keep)
    path.write_bytes(whole[:length])
    message = refused(path)
    assert "fetch it again" in message
    assert f"{length:,} bytes" in message
    if length >= header:
        assert f"promises {len(whole):,}" in message


def test_trailing_bytes_and_an_appended_archive(path):
    write_tensors(path, TENSORS)
    with path.open("ab") as file:
        file.write(b"abcd")
    assert "4 more than the header promises" in refused(path)
    write_tensors(path, TENSORS)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("payload", "x")
    assert "more than the header promises" in refused(path)


@pytest.mark.parametrize("length", [0, 1, 2**32, 2**63, 100_000_001, MAX_HEADER_BYTES + 1])
def test_impossible_header_lengths(path, length):
    path.write_bytes(struct.pack("<Q", length) + b'{"a":' + b" " * 100)
    assert f"header of {length:,} bytes" in refused(path)


def test_a_header_longer_than_the_file(path):
    path.write_bytes(struct.pack("<Q", 5000) + b'{"a":')
    assert "the header alone needs 5,008" in refused(path)


def test_too_many_tensors(path):
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    assemble(path, "{" + ",".join(one % i for i in range(60_000)) + "}", 0)
    assert "more than 50,000 tensors" in refused(path)


@pytest.mark.parametrize(
    ("header", "body", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, ["b overlaps a"]),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, ["b leaves a hole behind a"]),
        ({"a": entry(4, 8)}, 8, ["a leaves a hole behind the header"]),
        ({"a": entry(-4, 4, shape=[2])}, 8, ["tensor a", "whole numbers"]),
        ({"a": entry(8, 0, shape=[2])}, 8, ["tensor a", "hold -8"]),
        ({"a": entry(0, 8, shape=[3])}, 8, ["tensor a", "needs 12 bytes", "hold 8"]),
        ({"a": entry(0, 8, shape=[2**40, 2**40])}, 8, ["tensor a", "[1099511627776,"]),
        ({"a": entry(0, 8, shape=[-1, -2])}, 8, ["tensor a", "whole numbers"]),
        ({"a": entry(0, 8, shape=[2.0])}, 8, ["tensor a", "whole numbers"]),
        ({"a": entry(0, 4, shape=[True])}, 4, ["tensor a", "whole numbers"]),
        ({"a": entry(0, 8, dtype="F33")}, 8, ["tensor a", "'F33'", "BF16"]),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, ["tensor a", "data_offsets"]),
        ({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, 4, ["tensor a"]),
        ({"a": {**entry(0, 4), "dtype": ["F32"]}}, 4, ["tensor a", "dtype ['F32']"]),
        ({"a": [0, 4]}, 4, ["tensor a"]),
        ({"__metadata__": {"x": 1}, "a": entry(0, 4)}, 4, ["__metadata__", "strings"]),
        ('{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)),) * 2), 4, ["'a' occurs twice"]),
        ('{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', 4, ["'dtype'"]),
        ('{"a":', 0, ["not valid JSON"]),
        ('{"a": NaN}', 0, ["NaN"]),
        (b'{"\xff": 1}', 0, ["not valid JSON"]),
        ('{"a":' * 200_000 + "1" + "}" * 200_000, 0, ["nested more than 32"]),
        ('{"a":' * 40 + "1" + "}" * 40, 0, ["nested more than 32"]),
        ("{" + '"a":' + "9" * 5000 + "}", 0, ["a number of 5,000 digits, 99"]),
        ('{"a": 1e999}', 0, ["1e999 is no number"]),
        ('{"a": "\\ud800"}', 0, ["\\ud800", "half of a character"]),
        ({"a": entry(0, 0, shape=[0, 2**60])}, 0, ["tensor a", "[0, 1152921504606846976]"]),
    ],
)  # fmt: skip
def test_damaged_headers(path, header, body, words):
    message = refused(assemble(path, header, body))
    for word in words:
        assert word in message
    assert "fetch or write it again" in message or "readable: F64" in message


@pytest.mark.parametrize(
    "name", ["../../etc/x", "a/b", "a\\b", "bl\u043ecks.0", "a b", "a..b", "", "a\0", "x" * 600]
)
def test_tensor_names_that_are_no_names(path, name):
    message = refused(assemble(path, {name: entry(0, 4)}, 4))
    assert ascii(name)[:80] in message
    assert message.isascii()


def test_a_leading_space_in_the_header_is_padding(path):
    assemble(path, "  " + json.dumps({"a": entry(0, 4)}), 4)
    assert list(read_header(path).tensors) == ["a"]


def make_zip(path):
    torch.save({"a": torch.zeros(2)}, path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (make_zip, ["pickle", "weights_only=True", "model-converted.safetensors"]),
        (pickle.dumps({"a": list(range(99))}, 2), ["pickle", "weights_only=True"]),
        (b"<!DOCTYPE html><html>Sign in to continue", ["a web page"]),
        (b"\n <HTML><head><title>404</title>", ["a web page"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", ["LFS", "hf download"]),
        (b"GGUF\3\0\0\0" + b"\0" * 40, ["a GGUF file"]),
        (b"\x1f\x8b\x08" + b"\0" * 40, ["gzip"]),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, ["a picture or a video"]),
        (b"\0\0\0\x20ftypisom" + b"\0" * 40, ["a picture or a video"]),
        (b'{"metadata": {"total_size": 1}, "weight_map": {}}', ["a JSON text"]),
        (b"\0" * 4096, ["zero bytes", "fetch it again"]),
        (b"", ["0 bytes", "fetch it again"]),
    ],
)  # fmt: skip
def test_other_kinds_of_file_are_named(path, content, words):
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    message = refused(path)
    for word in words:
        assert word in message


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_by_their_suffix_alone(tmp_path, suffix):
    write_tensors(tmp_path / f"model{suffix}", TENSORS)
    assert "weights_only=True" in refused(tmp_path / f"model{suffix}")


def test_the_command_that_a_refused_pickle_comes_with_converts_it(tmp_path):
    path = tmp_path / "it's a model.pth"
    torch.save({"blocks.0.weight": torch.ones(2, 2).t()}, path)
    message = refused(path)
    command = message[message.index("python -c") :]
    assert os.system(command.replace("python", os.sys.executable, 1)) == 0
    assert list(read_header(path.with_suffix(".safetensors")).tensors) == ["blocks.0.weight"]


def test_paths_that_are_no_files(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "dangling.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name, words in (
        ("folder", "not a regular file"),
        ("pipe", "not a regular file"),
        ("dangling", "no such file"),
        ("loop", "too many levels"),
        ("missing", "no such file"),
    ):
        assert words in refused(tmp_path / f"{name}.safetensors")


def test_a_file_that_changes_after_its_header_was_read(path):
    write_tensors(path, TENSORS)
    header = read_header(path)
    write_tensors(path, {"other": torch.zeros(100)})
    with pytest.raises(WanError, match="changed while it was being loaded"):
        map_tensors(header)


def test_a_file_cut_while_it_is_read(path):
    write_tensors(path, TENSORS)
    with read_header(path).open() as file:
        os.truncate(path, 100)
        with pytest.raises(WanError, match="ends at byte 100"):
            read_bytes(file, torch.empty(64, dtype=torch.uint8), 90)


def test_mutated_headers_are_read_or_refused_and_never_crash(path):
    write_tensors(path, TENSORS, {"format": "pt"})
    whole = path.read_bytes()
    rng = random.Random(0)
    refusals = 0
    for _ in range(500):
        mutated = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            mutated[rng.randrange(len(mutated) - 40)] = rng.choice(b'0123456789{}[]",:\0\xffaF')
        path.write_bytes(mutated)
        try:
            header = read_header(path)
        except WanError:
            refusals += 1
            continue
        for tensor in map_tensors(header).values():
            tensor.float().sum()
    assert 100 < refusals < 500

"""The tiny decoder is the published one, and only its files are read."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wan.errors import WanError
from wan.models.taehv import KINDS, TinyDecoder
from wan.pipeline.tiny_decoder import load_tiny_decoder, open_tiny_decoder, published_name

GOLDEN = Path(__file__).parent / "golden"
SPEC = importlib.util.spec_from_file_location("golden_taehv", GOLDEN / "taehv.py")
golden = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(golden)
NUMBERS = json.loads((GOLDEN / "taehv.json").read_text())
TAEW = dict(zip(("taew2_1", "taew2_2"), KINDS, strict=True))


def published_state(kind):
    with torch.device("meta"):
        ours = TinyDecoder(kind).state_dict()
    shapes = {published_name(name): tuple(tensor.shape) for name, tensor in ours.items()}
    return golden.published_weights(shapes)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both generations, as published: with an encoder that nobody reads."""
    folder = tmp_path_factory.mktemp("taehv")
    for name, kind in TAEW.items():
        state = published_state(kind) | {"encoder.0.weight": torch.zeros(2, 2)}
        save_file(state, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("name", TAEW)
def test_it_decodes_as_the_published_code(files, name):
    decoder = load_tiny_decoder(files / f"{name}.safetensors")
    latents = golden.latents(decoder.kind.channels)
    for last_only in (False, True):
        found = {}
        for chunk in (None, 1):
            parts = list(decoder.decode_stream(latents, chunk, last_only))
            found[chunk] = torch.cat(parts, dim=2)
        torch.testing.assert_close(found[1], found[None], atol=1e-5, rtol=0)
        expected = NUMBERS[name + (" last_only" if last_only else "")]
        summary = golden.summary(found[None])
        assert summary.pop("shape") == expected["shape"]
        for key, values in summary.items():  # sums of other kernels round differently
            assert values == pytest.approx(expected[key], abs=2e-5), key
        assert 0.2 < summary["std"] < 0.7  # neither flat nor clamped everywhere


def test_a_batch_is_its_samples(files):
    decoder = load_tiny_decoder(files / "taew2_2.safetensors")
    latents = torch.cat([golden.latents(48), -golden.latents(48)])
    together = torch.cat(list(decoder.decode_stream(latents)), dim=2)
    alone = [torch.cat(list(decoder.decode_stream(one)), dim=2) for one in latents.split(1)]
    assert torch.equal(together, torch.cat(alone))


def test_names_are_those_of_the_published_file():
    names = [published_name(name) for name in TinyDecoder(KINDS[0]).state_dict()]
    assert len(set(names)) == len(names) == 64
    layers = {int(name.split(".")[1]) for name in names}
    # Between them stand layers without numbers: clamping, ReLU, and doubling at 6, 12 and 18.
    assert layers == {1, 22} | {3, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 19, 20}


def damage(state, how):
    if how == "foreign":
        return {"blocks.0.weight": torch.zeros(2, 2)}
    if how == "missing":
        del state["decoder.7.conv.weight"]
    if how == "wide":
        state["decoder.3.conv.0.weight"] = torch.zeros(8, 8, 3, 3)
    if how == "more":
        state["decoder.30.weight"] = torch.zeros(2)
    if how == "nan":
        state["decoder.22.bias"] = state["decoder.22.bias"] * float("nan")
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("foreign", "not a tiny decoder of Wan's latents; those of TAEHV are taew2_1.safetensors"),
        ("missing", "missing: decoder.7.conv.weight"),
        ("wide", r"decoder.3.conv.0.weight has \(8, 8, 3, 3\), not \(256, 512, 3, 3\)"),
        ("more", "unexpected: decoder.30.weight"),
        ("nan", "decoder.22.bias is not finite"),
    ],
)
def test_other_files_are_refused_with_what_does_not_fit(tmp_path, how, message):
    path = tmp_path / "taew2_1.safetensors"
    save_file(damage(published_state(KINDS[0]), how), path)
    with pytest.raises(WanError, match=message):
        load_tiny_decoder(path)


def test_pickles_are_not_opened(tmp_path):
    torch.save({}, tmp_path / "taew2_1.pth")
    with pytest.raises(WanError, match=r"only .safetensors files are read"):
        open_tiny_decoder(tmp_path / "taew2_1.pth")

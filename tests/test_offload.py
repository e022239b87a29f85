"""Weights that come and go: the same numbers, and no more of them on the device than promised."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from test_pipeline import DIT, PROMPT, SHIFT_12, TEXT, build, random_weights, write_tokenizer

from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.models.umt5 import UMT5Encoder
from wan.runtime.offload import BlockStream, at_work, homes_of, resolve_device, streaming
from wan.weights.quantize import quantize

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def blocks(count: int) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(count))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_a_block_at_work_has_its_own_weights_in_one_of_two_slots(count):
    layers = blocks(count)
    originals = [layer.weight for layer in layers]
    stream = BlockStream(layers, CPU)
    memory = set()
    for _ in range(2):
        for layer, original in zip(layers, originals, strict=True):
            with stream(layer):
                assert layer.weight is not original
                assert torch.equal(layer.weight, original)
                memory.add(layer.weight.data_ptr())
    assert len(memory) == min(2, count)
    assert all(layer.weight is original for layer, original in zip(layers, originals, strict=True))


def test_the_next_block_is_copied_before_it_is_asked_for():
    layers = blocks(4)
    stream = BlockStream(layers, CPU)
    fetched = []
    fetch = stream._fetch

    def watched(index: int, slot: int) -> None:
        fetched.append(index)
        fetch(index, slot)

    stream._fetch = watched
    seen = []
    for layer in (*layers, layers[0]):
        with stream(layer):
            seen.append(list(fetched))
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 0], [0, 1, 2, 3, 0, 1]]


def test_blocks_may_be_used_out_of_order():
    layers = blocks(4)
    stream = BlockStream(layers, CPU)
    for index in (2, 0, 3, 3, 1):
        with stream(layers[index]):
            x = layers[index](torch.ones(3))
        assert torch.equal(x, layers[index](torch.ones(3)))


@pytest.mark.parametrize("kind", ["none", "int8", "fp8"])
def test_a_streamed_network_gives_the_same_numbers(kind):
    dit = random_weights(WanDiT(DIT), 2)
    quantize(dit, kind)
    latents, context = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 6, DIT.text_dim)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return dit(latents, torch.tensor([500.0]), dit.prepare_context(context))

    expected = run()
    before = [tensor for _, _, tensor in homes_of(dit)]
    with streaming(dit, CPU):
        assert torch.equal(run(), expected)
    after = [tensor for _, _, tensor in homes_of(dit)]
    assert all(a is b for a, b in zip(after, before, strict=True))
    assert dit.block_at_work is nullcontext


def test_a_failure_sends_everything_home():
    encoder = random_weights(UMT5Encoder(TEXT), 1)
    before = [tensor for _, _, tensor in homes_of(encoder)]
    with pytest.raises(IndexError), streaming(encoder, CPU):
        encoder(torch.tensor([[10_000]]))
    assert all(a is b for (_, _, a), b in zip(homes_of(encoder), before, strict=True))


def test_on_another_device_are_two_blocks_and_what_is_not_in_blocks():
    encoder = UMT5Encoder(TEXT)
    with streaming(encoder, torch.device("meta")):
        assert encoder.token_embedding.weight.device.type == "meta"
        assert {p.device.type for p in encoder.blocks.parameters()} == {"cpu"}
        with encoder.block_at_work(encoder.blocks[1]):
            assert {p.device.type for p in encoder.blocks[1].parameters()} == {"meta"}
            assert {p.device.type for p in encoder.blocks[0].parameters()} == {"cpu"}


@pytest.mark.parametrize("offload", ["stage", "block"])
def test_offloading_changes_no_video(tokenizer_folder, offload):
    pipeline = build(tokenizer_folder, two_experts=True, scheduler=SHIFT_12)
    expected = pipeline(PROMPT, seed=3).frames
    offloaded = build(tokenizer_folder, two_experts=True, scheduler=SHIFT_12)
    offloaded.offload = offload
    assert np.array_equal(offloaded(PROMPT, seed=3).frames, expected)


def test_without_offload_nothing_is_copied():
    with at_work(torch.nn.Linear(2, 2), torch.device("meta"), "none"):
        pass
    layer = torch.nn.Linear(2, 2)
    with at_work(layer, torch.device("meta"), "block"):  # no blocks: a visit as a whole
        assert layer.weight.is_meta


@pytest.mark.parametrize("name", ["meta", "xpu", "cpu:3", "tpu", torch.device("xla")])
def test_only_devices_that_it_names_are_accepted(name):
    with pytest.raises(WanError, match=f"device={name}: choose auto, cpu, cuda, cuda:N or mps"):
        resolve_device(name)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(
    ("cuda", "on_mac", "found"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_finds_cuda_then_mps_then_the_cpu(cuda, on_mac, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(cuda))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: on_mac)
    assert resolve_device("auto").type == found
    # Training and times: MPS only where it is named, if at all.
    assert resolve_device("auto", mps=False).type == ("cuda" if cuda else "cpu")


def test_an_unknown_way_is_refused(tokenizer_folder):
    with pytest.raises(WanError, match="offload: unknown disk; known are none, stage, block"):
        build(tokenizer_folder).__class__.from_pretrained("x", offload="disk")

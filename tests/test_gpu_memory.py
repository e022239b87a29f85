"""Weights that come and go, and memory as it was predicted."""

import gc
import math
from dataclasses import replace
from itertools import pairwise
from statistics import median

import numpy as np
import pytest
import torch
from test_memory import TOLERANCE, request_of
from test_pipeline import (
    DEFAULTS,
    DIT,
    PROMPT,
    TEXT,
    VAE,
    build,
    random_weights,
    write_tokenizer,
)

from wan.models.dit import WanDiT
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import UMT5Encoder
from wan.models.vae import WanVAE
from wan.pipeline.config import BASE, PipelineConfig
from wan.pipeline.memory import estimate_memory
from wan.pipeline.memory_counts import kept_bytes
from wan.pipeline.pipeline import WanPipeline
from wan.runtime.memory_meter import LiveBytes
from wan.runtime.offload import BlockStream, pin

CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


# --- offload --------------------------------------------------------------------------------------


def kept_on(module: torch.nn.Module) -> set[str]:
    return {parameter.device.type for parameter in module.parameters()}


@pytest.mark.parametrize("offload", ["stage", "block"])
def test_offload_changes_no_video_and_keeps_weights_off_the_device(
    device, tokenizer_folder, offload
):
    resident, offloaded = (build(tokenizer_folder).to(device) for _ in range(2))
    offloaded.set_offload(offload)
    expected = resident(PROMPT, seed=3).frames
    for _ in range(2):  # the second call finds the slots as the first has left them
        np.testing.assert_allclose(offloaded(PROMPT, seed=3).frames, expected, atol=1e-5)
    assert kept_on(resident.transformer) == {device.type}
    assert kept_on(offloaded.transformer) == {"cpu"}
    pinned = {weight.is_pinned() for weight in offloaded.transformer.blocks.parameters()}
    assert pinned == {device.type == "cuda" and offload == "block"}


def test_adapters_work_while_blocks_come_and_go(device, tokenizer_folder):
    generator = torch.Generator().manual_seed(5)
    layers = [f"blocks.{n}.{name}" for n in (0, 1) for name in ("attn1.to_q", "ffn.net.2")]
    tensors = {}
    for layer in layers:
        inputs = DIT.ffn_dim if layer.endswith("net.2") else DIT.width
        for name, shape in (("A", (3, inputs)), ("B", (DIT.width, 3))):
            tensors[f"transformer.{layer}.lora_{name}.weight"] = torch.randn(
                shape, generator=generator
            )
    resident, offloaded = (build(tokenizer_folder).to(device) for _ in range(2))
    offloaded.set_offload("block")
    without = resident(PROMPT, seed=3).frames
    frames = {}
    for pipeline in (resident, offloaded):
        pipeline.load_lora_weights(tensors, adapter_name="style")
        for strength in (1.0, 0.5):
            pipeline.set_adapters(["style"], [strength])
            frames[pipeline, strength] = pipeline(PROMPT, seed=3).frames
        pipeline.disable_lora()
        np.testing.assert_allclose(pipeline(PROMPT, seed=3).frames, without, atol=1e-5)
    for strength in (1.0, 0.5):
        one, other = frames[resident, strength], frames[offloaded, strength]
        np.testing.assert_allclose(other, one, atol=1e-5)
        assert np.abs(one - without).max() > 1e-3


def milliseconds(run, times: int = 5) -> float:
    """The median time of a piece of GPU work, by events."""
    taken = []
    for _ in range(times + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        taken.append(start.elapsed_time(end))
    return median(taken[1:])


@pytest.mark.gpu
def test_a_block_is_copied_while_the_one_before_computes():
    half = {"dtype": torch.bfloat16, "bias": False}
    blocks = torch.nn.ModuleList(torch.nn.Linear(4096, 4096, **half) for _ in range(6))
    blocks.requires_grad_(False)
    pin(blocks)
    x = torch.randn(8192, 4096, dtype=torch.bfloat16, device=CUDA)
    here = blocks[0].weight.to(CUDA)
    copying = milliseconds(lambda: here.copy_(blocks[0].weight, non_blocking=True))
    product = milliseconds(lambda: torch.nn.functional.linear(x, here))
    products = math.ceil(3 * copying / product)  # a block computes three times as long
    stream = BlockStream(blocks, CUDA)
    events = []
    for _ in range(3):
        for block in blocks:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with stream(block):
                start.record()  # after the wait for the block's weights
                for _ in range(products):
                    block(x)
                end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    pairs = pairwise(events)
    stalls = [end.elapsed_time(start) for (_, end), (start, _) in pairs]
    assert median(stalls) < 0.2 * copying, (stalls, copying, product, products)


# --- the estimate ---------------------------------------------------------------------------------


def pipeline_for(device: torch.device, tokenizer_folder) -> tuple[WanPipeline, dict, torch.dtype]:
    """A pipeline, a size and a dtype, of which activations take more than kernels' workspaces."""
    if device.type == "cpu":
        size = {"height": 64, "width": 96, "num_frames": 17}
        return build(tokenizer_folder, expand_timesteps=True), size, torch.float32
    sizes = {"num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 4, "ffn_dim": 4096}
    config = PipelineConfig(
        BASE,
        replace(DIT, **sizes),
        replace(VAE, base_dim=48, decoder_base_dim=48),
        TEXT,
        defaults=DEFAULTS,
        expand_timesteps=True,
    )
    pipeline = WanPipeline(
        config=config,
        tokenizer=Tokenizer.from_folder(tokenizer_folder),
        text_encoder=random_weights(UMT5Encoder(TEXT), 1),
        transformer=random_weights(WanDiT(config.transformer), 2),
        vae=random_weights(WanVAE(config.vae), 3),
    )
    size = {"height": 256, "width": 256, "num_frames": 33}
    return pipeline.to(device, torch.bfloat16), size, torch.bfloat16


def peak_of(run, device: torch.device) -> int:
    """Bytes on the device that a call takes beside what is there."""
    if device.type == "cpu":
        with LiveBytes() as memory:
            run()
        return memory.peak
    run()  # cuBLAS keeps the workspace of a first call
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_stages_take_the_memory_that_is_predicted(device, tokenizer_folder, guidance):
    pipeline, size, dtype = pipeline_for(device, tokenizer_folder)
    # The CPU's count of tensors is held against the estimate for a GPU.
    plan = estimate_memory(request_of(pipeline, size, CUDA, guidance=guidance, dtype=dtype))
    weights = sum(kept_bytes(module) for module in pipeline.modules.values())
    options = {"guidance_scale": guidance, "num_inference_steps": 2, **size}
    pipeline.encode_prompt(PROMPT, "")  # the call finds it done

    def denoise():
        return pipeline(PROMPT, seed=0, output_type="latent", **options).frames

    latents = denoise()
    measured = {
        "denoise": peak_of(denoise, device),
        "decode": peak_of(lambda: pipeline.decode_latents(latents), device),
    }
    if device.type == "cpu":
        measured["decode"] -= plan.host  # the finished video, which leaves a GPU
    for stage, peak in measured.items():
        assert plan.stages[stage] == pytest.approx(weights + peak, rel=TOLERANCE), stage

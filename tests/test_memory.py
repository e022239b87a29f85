"""Predicted memory against what is measured: tensors that live on the CPU, and the process."""

import json
import os
import platform
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_pipeline import PROMPT, TEXT, VAE, build, write_tokenizer

from wan.errors import WanError
from wan.models.attention import AttentionConfig, network_attention
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.taehv import KINDS
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import UMT5Config
from wan.models.vae import VAEConfig
from wan.pipeline import memory as memory_module
from wan.pipeline.config import PipelineConfig, SamplingDefaults, read_pipeline_config
from wan.pipeline.folder import ModelFolder
from wan.pipeline.memory import CPU_MARGIN, check_fits, estimate_memory, fewest, remedies
from wan.pipeline.memory_counts import (
    MemoryRequest,
    counted_attention,
    kept_bytes,
    load_bytes,
    networks_of,
    rough_bytes,
    stored_dtypes,
    text_bytes,
    video_bytes,
)
from wan.pipeline.pipeline import WanPipeline
from wan.pipeline.plan import SamplingRequest, plan_sampling
from wan.runtime.memory_meter import FusedAttention, LiveBytes, free_bytes, peak_bytes
from wan.weights.hub import resolve_model
from wan.weights.quantize import is_quantized_weight
from wan.weights.save import save_component

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
# Tensors, and loading: estimate and measurement are at most 15 % apart.
TOLERANCE = 0.15
TINY = KINDS[0]._replace(channels=VAE.z_dim)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def request_of(pipeline, size, device=CPU, **changes) -> MemoryRequest:
    tokens = len(pipeline.tokenizer(PROMPT, 16).ids)
    plan = pipeline.plan(guidance_scale=changes.pop("guidance", 5.0), num_inference_steps=3)
    shape = pipeline.config.latent_shape(**size)
    options = {"dtype": torch.float32} | changes
    return MemoryRequest(pipeline.config, shape, plan, tokens, 16, device, **options)


def measured(compute, weights: int) -> int:
    """Tensors, as they live on any device."""
    with LiveBytes() as memory:
        result = compute()
    del result
    return weights + memory.peak


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({}, {"vae"}),
        ({"decoder": TINY}, {"decoder"}),
        ({"decoder": TINY, "has_image": True}, {"vae", "decoder"}),
    ],
)
def test_with_a_tiny_decoder_the_vae_is_there_for_pictures_only(tokenizer_folder, options, parts):
    size = {"height": 32, "width": 32, "num_frames": 5}
    request = request_of(build(tokenizer_folder), size, CUDA, **options)
    networks = networks_of(request)
    assert networks.keys() == {"transformer", "text_encoder"} | parts
    assert estimate_memory(request).stages["decode"] > sum(map(kept_bytes, networks.values()))


# --- counting -------------------------------------------------------------------------------------


def test_what_lives_is_counted_once_and_what_died_is_not():
    given = torch.zeros(100)
    with LiveBytes() as memory:
        a = given + 1  # 400 bytes
        view = a.view(10, 10).t()
        assert memory.live == 400
        b = a.double()  # 800
        assert (memory.live, memory.peak) == (1200, 1200)
        del b
        assert memory.live == 400
        del a
        assert memory.live == 400  # the view holds it
        del view
        given.add_(1)
    assert (memory.live, memory.peak) == (0, 1200)


def test_tensors_without_values_count_like_real_ones():
    def compute(device):
        x = torch.ones(64, 32, device=device)
        return ((x @ x.t()).softmax(-1) @ x).sum()

    assert peak_bytes(lambda: compute("meta")) == peak_bytes(lambda: compute("cpu")) > 0


def test_attention_is_fused_where_channels_are_innermost():
    q = torch.empty(1, 2, 50, 8, device="meta")
    flipped = torch.empty(1, 2, 8, 50, device="meta").transpose(2, 3)
    with FusedAttention():
        fused, scores = (
            peak_bytes(lambda x=x: torch.nn.functional.scaled_dot_product_attention(x, x, x))
            for x in (q, flipped)
        )
    assert fused == q.nbytes
    assert scores > 2 * 50 * 50 * 4


# --- against measurement --------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_every_stage_takes_what_was_predicted(tokenizer_folder, guidance, attention):
    """Of tensors, which a GPU holds as the CPU does here; activations outweigh the weights."""
    pipeline = build(tokenizer_folder, expand_timesteps=True)
    pipeline.set_attention(attention)
    size = {"height": 64, "width": 96, "num_frames": 17}
    request = request_of(pipeline, size, CUDA, guidance=guidance, attention=attention)
    plan = estimate_memory(request)
    with_image = estimate_memory(replace(request, has_image=True))
    weights = sum(kept_bytes(module) for module in pipeline.modules.values())
    options = {"guidance_scale": guidance, "num_inference_steps": 3, **size}

    text = measured(
        lambda: pipeline.encode_prompt(PROMPT, None, False, max_sequence_length=16), weights
    )
    pixels = torch.zeros(3, 64, 96)
    image = measured(lambda: pipeline.encode_image(pixels, 64, 96), weights)
    pipeline.encode_prompt(PROMPT, "")  # the call finds it done
    denoise = measured(lambda: pipeline(PROMPT, seed=0, output_type="latent", **options), weights)
    latents = pipeline(PROMPT, seed=0, output_type="latent", **options).frames
    decode = measured(lambda: pipeline.decode_latents(latents), weights) - plan.host
    assert plan.host == video_bytes(request)  # the finished video
    assert denoise > 2 * weights
    assert with_image.stages["encode_image"] == pytest.approx(image, rel=TOLERANCE)
    stages = {"encode_text": text, "denoise": denoise, "decode": decode}
    for name, bytes_measured in stages.items():
        assert plan.stages[name] == pytest.approx(bytes_measured, rel=TOLERANCE), name


def test_decoding_takes_what_was_predicted_in_chunks_of_any_length(tokenizer_folder):
    pipeline = build(tokenizer_folder)
    size = {"height": 64, "width": 96, "num_frames": 65}
    latents = torch.zeros(1, *pipeline.config.latent_shape(**size))
    weights = sum(kept_bytes(module) for module in pipeline.modules.values())
    peaks = []
    for chunk in (1, 2, 4):
        pipeline.chunk_latents = chunk
        plan = estimate_memory(request_of(pipeline, size, CUDA, chunk_latents=chunk))
        peaks.append(measured(lambda: pipeline.decode_latents(latents), weights) - plan.host)
        assert plan.stages["decode"] == pytest.approx(peaks[-1], rel=TOLERANCE), chunk
    assert peaks[0] < peaks[1] < peaks[2]


def test_quantised_weights_are_predicted_as_they_are_kept(tokenizer_folder, tmp_path):
    pipeline = build(tokenizer_folder)
    pipeline.save_pretrained(tmp_path / "model")
    size = {"height": 32, "width": 32, "num_frames": 9}
    for dtype, kind in ((torch.float32, "none"), (torch.bfloat16, "none"), (torch.bfloat16, "fp8")):
        loaded = WanPipeline.from_pretrained(tmp_path / "model", dtype=dtype, quantize=kind)
        request = request_of(pipeline, size, dtype=dtype, quantize=kind)
        for part, module in loaded.modules.items():
            assert kept_bytes(networks_of(request)[part]) == kept_bytes(module), (part, kind)


def peak_of_process(script: str, *arguments: str, **environment: str) -> Any:
    """What a script prints as JSON, run in a process of its own."""
    command = [sys.executable, "-c", STATUS + script, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return json.loads(done.stdout)


STATUS = """
import ctypes, gc, json, sys, torch
from pathlib import Path

def status(key):
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows[key].split()[0]) * 1024

def peak(compute):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    resting = status("VmRSS")
    result = compute()
    return status("VmHWM") - resting

torch.set_num_threads(1)
"""

STAGES = """
from wan.weights.hub import resolve_model
from wan.pipeline.pipeline import WanDMDPipeline
from wan.pipeline.memory_counts import rough_bytes
from wan.models.umt5 import UMT5Encoder, UMT5Config, encode_text

dtype, sizes = getattr(torch, sys.argv[1]), eval(sys.argv[2])
pipe = WanDMDPipeline.from_pretrained(resolve_model("builtin:miniature"), dtype=dtype)
rough_bytes(pipe.config, (48, 5, 8, 8), dtype)
assert not {"torch._dynamo", "sympy"} & sys.modules.keys()  # a second, for a small video's command
encoder = UMT5Encoder(UMT5Config(**eval(sys.argv[3]))).to(dtype).requires_grad_(False)
prompt, length = sys.argv[4:]

def stages(height, width, num_frames):
    latents = torch.randn(1, *pipe.config.latent_shape(height, width, num_frames))
    pixels = torch.zeros(3, height, width)
    size = {"height": height, "width": width, "num_frames": num_frames}
    return {
        "encode_text": lambda: encode_text(encoder, pipe.tokenizer, [prompt], int(length)),
        "encode_image": lambda: pipe.encode_image(pixels, height, width),
        "denoise": lambda: pipe("a red circle", seed=0, output_type="latent", **size),
        "decode": lambda: pipe.decode_latents(latents),
    }

for compute in stages(32, 32, 9).values():
    compute()  # libraries load, and make what they keep
print(json.dumps([{name: peak(compute) for name, compute in stages(*size).items()}
                  for size in sizes]))
"""
SIZES = ((256, 384, 17), (512, 512, 17))
# Weights of the encoder and what it needs beside them are a few times the miniature's.
LONG_TEXT = {"vocab_size": 600, "d_model": 512, "d_ff": 1024, "num_layers": 2, "num_heads": 16}


def predicted_and_measured(dtype) -> list[tuple[str, int, int]]:
    """(stage, working memory predicted, measured) of the miniature at all sizes."""
    config = read_pipeline_config(resolve_model("builtin:miniature"))
    tokenizer = Tokenizer.from_folder(resolve_model("builtin:miniature") / "tokenizer")
    prompt = "circle " * 400
    name = str(dtype).removeprefix("torch.")
    arguments = (name, repr(SIZES), repr(LONG_TEXT), prompt, "512")
    measured = peak_of_process(STAGES, *arguments)
    rows = []
    for size, peaks in zip(SIZES, measured, strict=True):
        plan = plan_sampling(config, SamplingRequest())
        shape = config.latent_shape(*size)
        request = MemoryRequest(config, shape, plan, 4, 512, CPU, dtype, has_image=True)
        stages = estimate_memory(request).stages
        weights = sum(map(kept_bytes, networks_of(request).values()))
        with_text = replace(
            config,
            text_encoder=UMT5Config(**LONG_TEXT),
            transformer=replace(config.transformer, text_dim=LONG_TEXT["d_model"]),
        )
        tokens = len(tokenizer(prompt, 512).ids)
        text = replace(request, config=with_text, prompt_tokens=tokens)
        rows.append(("encode_text", CPU_MARGIN * text_bytes(text), peaks.pop("encode_text")))
        rows += [(name, stages[name] - weights, peak) for name, peak in peaks.items()]
    return rows


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the margin was measured there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_stage_takes_more_of_the_process_than_was_estimated(dtype):
    """Resident memory beside the weights: below the estimate, and not by more than its margin."""
    libraries = 3 * 2**20  # what they may keep for themselves
    for stage, predicted, taken in predicted_and_measured(dtype):
        assert taken - libraries < predicted, stage
        assert predicted < CPU_MARGIN * (taken + libraries), stage


LOAD = """
from wan.weights.checkpoint import open_checkpoint
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.weights.load import load_module

checkpoint = open_checkpoint(sys.argv[1])
torch.ones(300, 300).bfloat16().float() @ torch.ones(300, 300)
config = DiTConfig(**eval(sys.argv[2]))
print(peak(lambda: load_module(lambda: WanDiT(config), checkpoint, "transformer",
                               dtype=torch.bfloat16, quantize=sys.argv[3])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_loading_takes_what_was_predicted(tmp_path, kind):
    """In a process of its own: resident memory of reading 350 MB of float32."""
    settings = {"num_attention_heads": 8, "num_layers": 6, "ffn_dim": 4096, "text_dim": 256}
    settings |= {"in_channels": 16, "out_channels": 16}
    config = DiTConfig(**settings)
    dit = WanDiT(config)
    save_component(dit.state_dict(), tmp_path, "transformer")
    stored = kept_bytes(dit)
    del dit
    # With a malloc that gives back: glibc's own keeps as much again in one of seven runs of int8.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    taken = peak_of_process(LOAD, str(tmp_path), repr(settings), kind, **environment)
    pipeline = PipelineConfig("WanPipeline", config, VAE, replace(TEXT, d_model=256))
    plan = plan_sampling(pipeline, SamplingRequest())
    request = MemoryRequest(pipeline, (16, 1, 8, 8), plan, 8, 16, CPU, quantize=kind)
    predicted = load_bytes(request, {"transformer": networks_of(request)["transformer"]})
    assert stored > 3e8
    assert predicted == pytest.approx(taken, rel=TOLERANCE)


# --- what it says ---------------------------------------------------------------------------------


def full_size(**changes) -> MemoryRequest:
    """FastWan 5B at 121 x 704 x 1280."""
    config = PipelineConfig(
        "WanDMDPipeline",
        DiTConfig(),
        VAEConfig(),
        UMT5Config(),
        timesteps=(1000, 757, 522),
        defaults=SamplingDefaults(704, 1280, 121, 24),
    )
    plan = plan_sampling(config, SamplingRequest())
    return MemoryRequest(
        config, config.latent_shape(704, 1280, 121), plan, 30, 512, CUDA, **changes
    )


def test_the_5b_needs_less_with_every_option():
    everything = estimate_memory(full_size())
    assert 21 * GIB < everything.stages["load"] < 22 * GIB
    stage = estimate_memory(full_size(offload="stage"))
    assert stage.stages["load"] == 0
    assert 10.5 * GIB < stage.stages["encode_text"] < 11 * GIB
    assert stage.host > 22 * GIB
    block = estimate_memory(full_size(offload="block"))
    assert block.stages["encode_text"] < 4 * GIB
    assert block.stages["denoise"] < stage.stages["denoise"] - 8 * GIB
    small = estimate_memory(full_size(offload="stage", quantize="int8"))
    assert small.stages["encode_text"] < 0.65 * stage.stages["encode_text"]
    assert "denoise" in str(small)
    assert "host" in str(small)


def test_shorter_chunks_are_offered_before_what_changes_numbers():
    plan = estimate_memory(full_size())
    one = estimate_memory(full_size(chunk_latents=1))
    assert one.stages["decode"] < plan.stages["decode"] - 3 * GIB
    assert one.stages | {"decode": 0} == plan.stages | {"decode": 0}
    with pytest.raises(WanError, match=r"free; chunk_latents=1 would take 28\.\d GiB"):
        check_fits(plan, 31 * GIB)
    with pytest.raises(WanError, match=r"free; chunk_latents=1 offload=block would take"):
        check_fits(plan, 12 * GIB)
    offered = remedies(full_size(dtype=torch.float32))
    assert [name for one in offered for name in one] == [
        *("chunk_latents", "offload", "offload", "dtype", "quantize", "tile"),
    ]
    offload = {"offload": "block"}
    assert remedies(full_size(tile=16, chunk_latents=1, quantize="fp8", **offload)) == []


def test_no_option_is_offered_that_is_not_needed():
    options = [{"a": 1}, {"b": 1}, {"b": 2}, {"c": 1}]
    assert fewest(options, lambda chosen: chosen.get("b") == 2) == {"b": 2}
    assert fewest(options, lambda chosen: {"a", "c"} <= chosen.keys()) == {"a": 1, "c": 1}
    assert fewest(options, lambda chosen: "d" in chosen) is None


def test_a_fused_kernel_is_offered_in_place_of_the_formula():
    written = full_size(attention=AttentionConfig("sliced", slice_size=8192))
    assert remedies(written)[:2] == [{"attention": "sdpa"}, {"chunk_latents": 1}]
    with pytest.raises(WanError, match=r"free; attention=sdpa would take 3\d\.\d GiB"):
        check_fits(estimate_memory(full_size(attention="math")), 80 * GIB)


def test_each_stage_is_predicted_once_for_the_options_it_depends_on(tokenizer_folder, monkeypatch):
    pipeline = build(tokenizer_folder)
    side = 18 * pipeline.config.vae.spatial_stride  # more than a tile
    size = {"height": side, "width": side, "num_frames": 5}
    options = {"dtype": torch.bfloat16, "chunk_latents": 1}
    plan, computed = estimate_memory(request_of(pipeline, size, CUDA, **options)), []

    def watch(name, function):
        def watched(request):
            computed.append(name)
            return function(request)

        monkeypatch.setattr(memory_module, name, watched)

    names = ("networks_of", "text_bytes", "denoise_bytes", "decode_bytes")
    for name in names:
        watch(name, getattr(memory_module, name))
    with pytest.raises(WanError, match="no option here makes it fit"):
        check_fits(plan, 1000)
    assert len(remedies(plan.request)) == 4  # two ways to offload, int8, tiles
    assert sorted(computed) == sorted(2 * names)


def test_what_is_known_of_other_options_changes_no_prediction(tokenizer_folder):
    size = {"height": 64, "width": 64, "num_frames": 17}
    request = request_of(build(tokenizer_folder), size, CUDA, attention="math", has_image=True)
    known: dict[Any, Any] = {}
    one = request
    for options in remedies(request):
        one = replace(one, **options)
        assert estimate_memory(one, known) == estimate_memory(one)


def test_weights_that_stay_in_their_files_are_not_taken(tokenizer_folder, tmp_path):
    pipeline = build(tokenizer_folder)
    pipeline.save_pretrained(tmp_path)  # float32
    folder = ModelFolder.read(tmp_path)
    size = {"height": 32, "width": 32, "num_frames": 9}

    def estimate(device=CPU, stored=None, **changes):
        stored = stored_dtypes(folder) if stored is None else stored
        return estimate_memory(request_of(pipeline, size, device, stored=stored, **changes))

    weights = sum(map(kept_bytes, pipeline.modules.values()))
    none = estimate(stored={})
    views = estimate()
    assert (none.mapped, views.mapped) == (0, weights)
    for stage in ("encode_text", "denoise", "decode"):
        assert none.stages[stage] - views.stages[stage] == weights
    assert views.stages["load"] < none.stages["load"] / 4  # the reader's buffers
    # Another dtype is a copy, but for what stays in float32; so are weights in 8 bits or merged.
    exact = estimate(dtype=torch.bfloat16).mapped
    assert 0 < exact < 0.8 * weights
    quantized = [
        weight.nbytes
        for part in ("transformer", "text_encoder")
        for name, weight in pipeline.modules[part].named_parameters()
        if is_quantized_weight(name)
    ]
    assert quantized
    int8 = estimate(quantize="int8")
    assert int8.mapped == weights - sum(quantized)
    assert (
        int8.mapped
        == estimate(quantize="int8", stored=dict.fromkeys(folder.config.components)).mapped
    )
    others = kept_bytes(pipeline.modules["transformer"])
    assert estimate(stored=stored_dtypes(folder, ["transformer"])).mapped == weights - others
    # Weights that are still to be fetched may be stored in any dtype.
    for part in folder.config.components:
        for file in folder.part(part).glob("*.safetensors"):
            file.unlink()
    assert estimate(dtype=torch.bfloat16).mapped > exact
    # On a GPU they are copies, unless they are offloaded.
    assert estimate(CUDA).mapped == 0
    offloaded = estimate(CUDA, offload="stage")
    assert offloaded.mapped == weights
    assert estimate(CUDA, offload="stage", stored={}).host > offloaded.host


def test_a_host_that_is_too_small_is_told_what_would_help(tokenizer_folder):
    size = {"height": 32, "width": 32, "num_frames": 9}
    offloaded = request_of(build(tokenizer_folder), size, CUDA, offload="stage")
    plan, video = estimate_memory(offloaded), video_bytes(offloaded)
    assert estimate_memory(replace(offloaded, offload="none")).host == video
    check_fits(plan, GIB, 2 * plan.host)
    check_fits(plan, GIB)  # nothing is known of the host
    refused = "not enough memory on the host: weights and video would take .*; offload=none would"
    with pytest.raises(WanError, match=refused):
        check_fits(plan, GIB, int(1.1 * video))
    with pytest.raises(WanError, match="smaller height, width or num_frames"):
        check_fits(plan, GIB, video // 2)


def test_what_the_host_keeps_of_the_5b():
    plans = [estimate_memory(full_size(offload=way)) for way in ("stage", "block")]
    # Pinned memory comes in powers of two, and the 5B's matrices are no such sizes.
    assert 1.2 < plans[1].host / plans[0].host < 2
    assert estimate_memory(full_size(offload="stage", quantize="int8")).host < 0.65 * plans[0].host


@pytest.mark.parametrize("name", ["sliding_tile", "frame_causal", "top_k"])
def test_a_gpus_sparse_attention_is_one_fused_kernel(name):
    """And not the copies of keys that a CPU gathers for every window."""
    shape = (1, 2, 16 * 8 * 16, 32)
    config = replace(full_size().config, transformer=DiTConfig(2, 32, num_layers=1))
    request = replace(full_size(attention=name), config=config, latent_shape=(48, 16, 16, 32))
    assert request.grid == (16, 8, 16)
    (attend,) = counted_attention(request).layers

    def on_gpu():
        q, k, v = (torch.empty(shape, device="meta") for _ in range(3))
        return attend(q, k, v, request.grid)

    def gathered():
        dit = WanDiT(config.transformer, name)
        q, k, v = (torch.empty(shape, device="meta") for _ in range(3))
        with FusedAttention():
            return dit.blocks[0].self_attention.attention(q, k, v, request.grid)

    peak_bytes(on_gpu)  # the block mask is made
    tensor = 4 * 2 * 16 * 8 * 16 * 32
    # q, k, v, the same in the kernel's order, what it returns, and that in the grid's order: less
    # what is dead by then. top_k's means take float32 copies of queries and keys, one at a time.
    assert 7 * tensor <= peak_bytes(on_gpu) < 9 * tensor
    assert peak_bytes(gathered) > 7 * tensor
    for same in (replace(request, device=CPU), replace(request, attention="spatial")):
        found = counted_attention(same)  # the second has disjoint windows
        assert found == network_attention(same.attention, 1)


def test_sparse_attention_of_the_5b_on_a_gpu_costs_little_more_than_dense():
    dense, sparse = (
        estimate_memory(full_size(attention=name)).stages["denoise"] for name in ("sdpa", "top_k")
    )
    assert dense <= sparse < dense + GIB


def test_a_prediction_is_worth_it_for_large_models_and_for_large_videos():
    model = read_pipeline_config(resolve_model("builtin:miniature"))

    def rough(height, width, num_frames, dtype=torch.float32):
        return rough_bytes(model, model.latent_shape(height, width, num_frames), dtype)

    assert rough(128, 128, 17) < 0.1 * GIB
    assert rough(704, 1280, 121) > GIB
    request = full_size()
    assert rough_bytes(request.config, (48, 1, 4, 4), torch.bfloat16) > 20 * GIB
    plan = plan_sampling(model, SamplingRequest())
    for size in ((256, 256, 33), (704, 1280, 121)):
        one = MemoryRequest(model, model.latent_shape(*size), plan, 30, 512, CPU, torch.float32)
        # The estimate has the CPU's margin, the rough one has not.
        assert 0.3 < rough(*size) / estimate_memory(one).peak < 1.5


def test_what_does_not_fit_is_refused_with_what_would(tokenizer_folder, monkeypatch):
    plan = estimate_memory(full_size())
    check_fits(plan, 80 * GIB)
    with pytest.raises(
        WanError, match=r"not enough memory on cuda: .* 16.0 GiB are free; .*offload=stage"
    ):
        check_fits(plan, 16 * GIB)
    tiny = build(tokenizer_folder)
    size = {"height": 32, "width": 32, "num_frames": 9}
    plan = estimate_memory(request_of(tiny, size, chunk_latents=1))
    with pytest.raises(WanError, match="take a smaller height, width or num_frames"):
        check_fits(plan, 1000)
    free = int(plan.peak / 1.01)
    # Where products are in float32, weights of half the size are too little here.
    for fast, remedy in ((True, "dtype=bfloat16 would take"), (False, "no option here")):
        monkeypatch.setattr("wan.precision.cpu_is_fast_in_bfloat16", lambda fast=fast: fast)
        with pytest.raises(WanError, match=remedy):
            check_fits(plan, free)


def test_some_memory_is_free():
    assert free_bytes(CPU) > 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("line", "root", "names"),
    [
        ("0::/pod/job", ".", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:memory:/pod/job",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["v2", "v1"],
)
def test_a_container_has_what_its_tightest_group_leaves(tmp_path, monkeypatch, line, root, names):
    def group(path: str, limit: str, used: int) -> None:
        folder = tmp_path / root / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (limit, str(used)), strict=False):
            (folder / name).write_text(f"{text}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} 300\n")

    monkeypatch.setattr("wan.runtime.memory_meter.CGROUPS", tmp_path)
    monkeypatch.setattr("wan.runtime.memory_meter.OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(f"9:cpu:/elsewhere\n{line}\n")
    unlimited = "max" if root == "." else "9223372036854771712"
    group("pod/job", unlimited, 7000)
    assert free_bytes(CPU) > 2**20  # the host's
    group("pod", "10000", 9000)
    assert free_bytes(CPU) == 1300
    group("pod/job", "8000", 7500)
    assert free_bytes(CPU) == 800
    group("pod/job", "8000", 9000)
    assert free_bytes(CPU) == 0


def test_guidance_of_either_expert_is_counted(tokenizer_folder):
    pipeline = build(tokenizer_folder, two_experts=True)
    shape = pipeline.config.latent_shape(64, 64, 17)

    def denoise(scale: float, scale_2: float) -> int:
        plan = pipeline.plan(guidance_scale=scale, guidance_scale_2=scale_2, num_inference_steps=3)
        request = MemoryRequest(pipeline.config, shape, plan, 500, 512, CUDA, torch.float32)
        return estimate_memory(request).stages["denoise"]

    assert denoise(1, 1) < denoise(1, 4) == denoise(4, 1) == denoise(4, 4)

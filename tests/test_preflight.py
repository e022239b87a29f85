"""Predicted memory against what is measured: tensors that live on the CPU, and the process."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_pipeline import PROMPT, TEXT, VAE, build, write_tokenizer

from wan.dit import WanDiT
from wan.dit_config import DiTConfig
from wan.errors import WanError
from wan.memory import LiveBytes, free_bytes, peak_bytes
from wan.pipeline import WanPipeline
from wan.pipeline_config import PipelineConfig, SamplingDefaults
from wan.preflight import (
    MemoryRequest,
    alternatives,
    check_fits,
    kept_bytes,
    load_bytes,
    network_of,
    predict_memory,
)
from wan.sampling_plan import SamplingRequest, plan_sampling
from wan.umt5 import UMT5Config
from wan.vae import VAEConfig
from wan.weights import save_component

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
# The promise: prediction and measurement are at most 15 % apart.
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def request_of(pipeline, size, **changes) -> MemoryRequest:
    tokens = len(pipeline.tokenizer(PROMPT, 16).ids)
    plan = pipeline.plan(guidance_scale=changes.pop("guidance", 5.0), num_inference_steps=3)
    shape = pipeline.config.latent_shape(**size)
    options = {"dtype": torch.float32} | changes
    return MemoryRequest(pipeline.config, shape, plan, tokens, 16, CPU, **options)


def measured(compute, weights: int) -> int:
    with LiveBytes() as memory:
        result = compute()
    del result
    return weights + memory.peak


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


# --- against measurement --------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_every_stage_takes_what_was_predicted(tokenizer_folder, guidance, attention):
    """On the CPU, where all weights are resident; here activations outweigh them."""
    pipeline = build(tokenizer_folder, expand_timesteps=True)
    pipeline.set_attention(attention)
    size = {"height": 64, "width": 96, "num_frames": 17}
    request = request_of(pipeline, size, guidance=guidance, attention=attention)
    plan = predict_memory(request)
    with_image = predict_memory(replace(request, has_image=True))
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
    decode = measured(lambda: pipeline.decode_latents(latents), weights)
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
        plan = predict_memory(request_of(pipeline, size, chunk_latents=chunk))
        peaks.append(measured(lambda: pipeline.decode_latents(latents), weights))
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
            assert kept_bytes(network_of(request, part)) == kept_bytes(module), (part, kind)


LOAD = """
import sys, torch
from wan.checkpoint import open_checkpoint
from wan.dit import WanDiT
from wan.dit_config import DiTConfig
from wan.weights import load_module

def status(key):
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows[key].split()[0]) * 1024

torch.set_num_threads(1)
checkpoint = open_checkpoint(sys.argv[1])
torch.ones(300, 300).bfloat16().float() @ torch.ones(300, 300)
before = status("VmRSS")
config = DiTConfig(**eval(sys.argv[2]))
dit = load_module(lambda: WanDiT(config), checkpoint, "transformer", dtype=torch.bfloat16,
                  quantize=sys.argv[3])
print(status("VmHWM") - before)
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
    command = [sys.executable, "-c", LOAD, str(tmp_path), repr(settings), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pipeline = PipelineConfig("WanPipeline", config, VAE, replace(TEXT, d_model=256))
    plan = plan_sampling(pipeline, SamplingRequest())
    request = MemoryRequest(pipeline, (16, 1, 8, 8), plan, 8, 16, CPU, quantize=kind)
    predicted = load_bytes(request, {"transformer": network_of(request, "transformer")})
    assert stored > 3e8
    assert predicted == pytest.approx(int(done.stdout), rel=TOLERANCE)


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
    everything = predict_memory(full_size())
    assert 21 * GIB < everything.stages["load"] < 22 * GIB
    stage = predict_memory(full_size(offload="stage"))
    assert stage.stages["load"] == 0
    assert 10.5 * GIB < stage.stages["encode_text"] < 11 * GIB
    assert stage.host > 22 * GIB
    block = predict_memory(full_size(offload="block"))
    assert block.stages["encode_text"] < 4 * GIB
    assert block.stages["denoise"] < stage.stages["denoise"] - 8 * GIB
    small = predict_memory(full_size(offload="stage", quantize="int8"))
    assert small.stages["encode_text"] < 0.65 * stage.stages["encode_text"]
    assert "denoise" in str(small)
    assert "host" in str(small)


def test_shorter_chunks_are_offered_before_what_changes_numbers():
    plan = predict_memory(full_size())
    one = predict_memory(full_size(chunk_latents=1))
    assert one.stages["decode"] < plan.stages["decode"] - 3 * GIB
    assert one.stages | {"decode": 0} == plan.stages | {"decode": 0}
    with pytest.raises(WanError, match=r"free; chunk_latents=1 would take 28\.\d GiB"):
        check_fits(plan, 31 * GIB)
    with pytest.raises(WanError, match=r"free; offload=block chunk_latents=1 would take"):
        check_fits(plan, 12 * GIB)
    offered = list(alternatives(full_size()))
    assert offered[:2] == [{"chunk_latents": 1}, {"offload": "stage"}]
    exact = [one for one in offered if not {"quantize", "dtype", "tile"} & one.keys()]
    assert offered[: len(exact)] == exact
    offload = {"offload": "block"}
    assert list(alternatives(full_size(tile=16, chunk_latents=1, quantize="fp8", **offload))) == []


def test_what_does_not_fit_is_refused_with_what_would(tokenizer_folder):
    plan = predict_memory(full_size())
    check_fits(plan, 80 * GIB)
    with pytest.raises(
        WanError, match=r"not enough memory on cuda: .* 16.0 GiB are free; .*offload=stage"
    ):
        check_fits(plan, 16 * GIB)
    tiny = build(tokenizer_folder)
    size = {"height": 32, "width": 32, "num_frames": 9}
    plan = predict_memory(request_of(tiny, size, chunk_latents=1))
    with pytest.raises(WanError, match="take a smaller height, width or num_frames"):
        check_fits(plan, 1000)
    needed = plan.peak
    with pytest.raises(WanError, match="dtype=bfloat16 would take"):
        check_fits(plan, int(needed / 1.01))


def test_some_memory_is_free():
    assert free_bytes(CPU) > 2**20

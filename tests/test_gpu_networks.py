"""bfloat16 networks against diffusers and transformers, 8-bit weights, and compiled networks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_pipeline import DIT, PROMPT, build, random_weights, write_tokenizer

from configs.benchmark import BenchConfig
from infer.bench.against_diffusers import parity_rows
from infer.bench.stages import SIZES
from infer.parity.models import random_sides
from infer.parity.tolerance import compare_to_truth
from infer.parity.with_weights import PROMPTS, rounded
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer, clean_prompt
from wan.models.umt5 import encode_text
from wan.pipeline.config import part_folder
from wan.pipeline.stages import cast_weights
from wan.weights.quantize import QUANTIZE, quantize, restore_weight

HALF, CPU = torch.bfloat16, torch.device("cpu")
BLOCK = DiTConfig(  # heads of 128 channels, as the released models have them
    num_attention_heads=2,
    num_layers=1,
    ffn_dim=512,
    in_channels=8,
    out_channels=8,
    text_dim=32,
)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


# --- parity in bfloat16 ---------------------------------------------------------------------------


@pytest.mark.gpu  # on the CPU `test_bench.py` runs the same rows, of narrower heads
def test_blocks_and_decoder_are_as_exact_as_those_of_diffusers(tmp_path):
    size = replace(SIZES["tiny"], transformer=BLOCK)
    config = BenchConfig(stages="tiny", device="cuda")
    for row in parity_rows(size, torch.device("cuda"), config, tmp_path):
        assert row.passed, row


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """Two small releases, one of each generation, that are loaded in bfloat16."""
    return random_sides(tmp_path_factory.mktemp("sides"), {"dtype": HALF})


def results_of_theirs(sides, part: str, device: torch.device, run):
    """The reference's result in bfloat16 on the device, then in float32 on the CPU: the truth."""
    for where, dtype in ((device, HALF), (CPU, torch.float32)):
        model = sides.theirs(part, dtype).to(where)
        yield run(model, where, dtype).float().cpu()


def assert_held(what: str, ours: torch.Tensor, theirs: torch.Tensor, truth: torch.Tensor) -> None:
    row = compare_to_truth("gpu", what, ours.float().cpu(), theirs, truth)
    assert row.passed, row


def test_the_text_encoder_is_as_exact_as_that_of_transformers(device, sides):
    one = sides[0]
    texts, length = [PROMPTS[0], PROMPTS[-1]], one.config.defaults.max_sequence_length
    tokens = one.their_tokenizer()(
        [clean_prompt(text) for text in texts],
        padding="max_length",
        max_length=length,
        truncation=True,
        return_tensors="pt",
    )

    def theirs(model, where, dtype):
        ids, mask = tokens.input_ids.to(where), tokens.attention_mask.to(where)
        return model(ids, mask).last_hidden_state * mask.unsqueeze(-1)

    encoder = one.ours("text_encoder").to(device)
    tokenizer = Tokenizer.from_folder(part_folder(one.folder, "tokenizer"))
    found = encode_text(encoder, tokenizer, texts, length)
    assert_held("text", found, *results_of_theirs(one, "text_encoder", device, theirs))


@pytest.mark.parametrize("generation", [0, 1], ids=["2.2", "2.1"])
def test_both_autoencoders_are_as_exact_as_those_of_diffusers(device, sides, generation):
    one = sides[generation]
    vae = one.ours("vae").to(device)
    mean, std = vae.latent_statistics(CPU)
    generator = torch.Generator().manual_seed(1)
    video = rounded(torch.rand(1, 3, 9, 48, 48, generator=generator) * 2 - 1)
    latents = rounded(torch.randn(1, vae.config.z_dim, 3, 3, 3, generator=generator))

    def encode(model, where, dtype):
        found = model.encode(video.to(where, dtype)).latent_dist.mode()
        return (found.float().cpu() - mean) / std

    def decode(model, where, dtype):
        return model.decode((latents * std + mean).to(where, dtype), return_dict=False)[0]

    with torch.no_grad():
        found = vae.encode_normalized(video.to(device))
        assert_held("encode", found, *results_of_theirs(one, "vae", device, encode))
        found = vae.decode_normalized(latents.to(device))
        assert_held("decode", found, *results_of_theirs(one, "vae", device, decode))


# --- 8-bit weights --------------------------------------------------------------------------------


def restored(dit: WanDiT) -> WanDiT:
    """A float32 network with the weights that an 8-bit one stands for."""
    state = dict(dit.state_dict())
    for name in [name for name in state if name.endswith(".scale")]:
        weight = name.removesuffix("scale") + "weight"
        state[weight] = restore_weight(state[weight], state.pop(name), torch.float32)
    plain = WanDiT(DIT).eval()
    plain.load_state_dict(state)
    return plain


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("kind", [kind for kind in QUANTIZE if kind != "none"])
def test_quantised_networks_compute_with_their_restored_weights(device, kind, dtype):
    dit = random_weights(WanDiT(DIT), 2)
    cast_weights(dit, dtype)
    quantize(dit, kind)
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, DIT.in_channels, 3, 8, 8, generator=generator)
    context = torch.randn(1, 6, DIT.text_dim, generator=generator)

    @torch.no_grad()
    def velocity(network: WanDiT, where: torch.device) -> torch.Tensor:
        inputs = (latents.to(where), torch.tensor([500.0], device=where))
        prepared = network.prepare_context(context.to(where))
        return network(*inputs, prepared).float().cpu()

    expected = velocity(restored(dit), CPU)
    found = velocity(dit.to(device), device)
    assert {p.device.type for p in dit.parameters()} == {device.type}
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype != HALF else 3e-2)


# --- compiled -------------------------------------------------------------------------------------


@pytest.fixture
def traced_on_the_cpu(device, monkeypatch):
    """On the CPU the compiler's graphs run op by op: no C++ compiler is needed."""
    compile_module = torch.nn.Module.compile
    if device.type == "cpu":
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda module, **options: compile_module(module, backend="eager", **options),
        )
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def test_blocks_and_decoder_are_compiled_once_for_all_steps_and_prompts(
    device, tokenizer_folder, traced_on_the_cpu
):
    eager, compiled = (build(tokenizer_folder).to(device) for _ in range(2))
    compiled._compile("all" if device.type == "cuda" else "dit")  # decoders are traced slowly
    compiled(PROMPT, seed=1, num_inference_steps=2)
    words = "a red square"  # fewer tokens
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompt, seed, steps in ((PROMPT, 2, 5), (words, 3, 3)):
            frames = compiled(prompt, seed=seed, num_inference_steps=steps).frames
    expected = eager(words, seed=3, num_inference_steps=3).frames
    np.testing.assert_allclose(frames, expected, atol=1e-3)

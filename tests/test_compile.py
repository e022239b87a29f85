"""What the compiler traces: blocks and decoder are one graph each, over steps and prompts.

The graphs are run op by op (backend "eager"), so no C++ compiler is needed.
"""

from types import SimpleNamespace

import pytest
import torch
from test_dit import FRAMES, TINY, random_dit, random_inputs, to_bfloat16
from test_vae import build

from wan import precision
from wan.lora.files import LowRank
from wan.lora.merge import LoRA, merge_lora
from wan.models.vae_config import VAEConfig
from wan.pipeline.stages import PipelineStages
from wan.precision import conv3d_warning
from wan.weights.quantize import quantize

ONE = torch.tensor([900.0, 900.0])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def fast(request, monkeypatch):
    """Whether the CPU is fast in bfloat16, in this test."""
    monkeypatch.setattr(precision, "cpu_is_fast_in_bfloat16", lambda: request.param)
    return request.param


class Graphs:
    """A backend that counts the graphs that it gets."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def compiled_dit(prepare):
    dit, graphs = random_dit().requires_grad_(False), Graphs()
    prepare(dit)
    for block in dit.blocks:
        block.compile(backend=graphs, fullgraph=True, dynamic=False)
    return dit, graphs


PREPARE = {
    "float32": lambda dit: None,
    "bfloat16": to_bfloat16,
    "bfloat16, int8": lambda dit: quantize(to_bfloat16(dit), "int8"),
}
KINDS = [("float32", True), ("bfloat16", True), ("bfloat16", False), ("bfloat16, int8", False)]


@pytest.mark.parametrize(("kind", "fast"), KINDS, indirect=["fast"])
@torch.no_grad()
def test_blocks_are_one_graph_over_steps_and_prompts(kind, fast):
    latents, context = random_inputs()
    dit, graphs = compiled_dit(PREPARE[kind])
    for timesteps, expected in ((ONE, 1), (FRAMES, 2)):  # of a clip, and with a clean first frame
        for step in range(3):
            for prompt in (context, context.flip(-1)):
                prepared = dit.prepare_context(prompt, 5)
                found = dit(latents + step, timesteps * (1 - 0.1 * step), prepared)
        assert graphs.count == expected  # all blocks share it
        eager = random_dit()
        PREPARE[kind](eager)
        again = eager(latents + 2, timesteps * 0.8, eager.prepare_context(context.flip(-1), 5))
        error = (found - again).norm() / again.norm()
        assert error < 2e-2 if "bfloat16" in kind and fast else error < 1e-4


@torch.no_grad()
def test_a_merged_lora_needs_no_other_graph():
    latents, context = random_inputs()
    dit, graphs = compiled_dit(PREPARE["float32"])
    before = dit(latents, ONE, context)
    width, name = TINY.width, "blocks.1.self_attention.query.weight"
    pair = LowRank(torch.randn(2, width), torch.randn(width, 2), 0.5)
    merge_lora(dit, LoRA("style.safetensors", "test", 2, {name: pair}, {}), 1.0)
    assert not torch.equal(dit(latents, ONE, context), before)
    assert graphs.count == 1


@pytest.mark.parametrize("fast", [False], indirect=True)
@torch.no_grad()
def test_the_decoder_is_one_graph_per_kind_of_chunk(fast):
    """The first chunk, the second, which has a history, and the rest of the same size."""
    small = {"dim_mult": (1, 1), "temperal_downsample": (True,), "num_res_blocks": 1, "z_dim": 4}
    vae = build(VAEConfig(base_dim=4, decoder_base_dim=4, **small)).bfloat16()
    latents = torch.randn(1, 4, 9, 4, 4)  # chunks of 3, 2, 2 and 2
    expected = vae.decode_normalized(latents, 2)
    graphs = Graphs()
    vae.decoder.compile(backend=graphs, fullgraph=True, dynamic=False)
    first = vae.decode_normalized(latents, 2)
    made = graphs.count
    assert made <= 3
    for prompt in range(2):
        vae.decode_normalized(latents + prompt, 2)
    assert graphs.count == made
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-2)  # rounded once, to bfloat16


@pytest.mark.parametrize(
    ("torch_version", "cudnn", "message"),
    [
        ("2.9.0+cu128", 91002, "install PyTorch 2.9.1 or later, with cuDNN 9.15"),
        ("2.9.0+cu130", 91501, "install PyTorch 2.9.1"),
        ("2.9.1+cu128", 91002, "takes many times the memory: install cuDNN 9.15 or later"),
        ("2.9.1", 91501, None),
        ("2.10.0", 91501, None),
        ("2.13.0a0+git", 91300, "install cuDNN 9.15"),
        ("2.8.0+cu126", 91002, "may decode wrongly"),
        ("2.9.0", 90501, None),
        ("2.13.0+cpu", None, None),
    ],
)
def test_versions_that_decode_badly_on_a_gpu_are_named(torch_version, cudnn, message):
    found = conv3d_warning(torch_version, cudnn)
    assert (found is None) if message is None else (message in found)


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.bfloat16), ("cpu", torch.bfloat16)])
def test_a_pipeline_says_so_where_it_decodes_in_bfloat16(device, dtype, monkeypatch, recwarn):
    monkeypatch.setattr("wan.pipeline.stages.conv3d_warning", lambda *_: "the versions")
    vae = torch.nn.Linear(2, 2).to(dtype)
    pipeline = SimpleNamespace(device=torch.device(device), _parts={"vae": vae})
    PipelineStages._warn_of_decoding(pipeline)
    assert [str(one.message) for one in recwarn] == (["the versions"] if device == "cuda" else [])
    vae.float()
    PipelineStages._warn_of_decoding(pipeline)
    assert len(recwarn) == (1 if device == "cuda" else 0)


def test_the_decision_is_a_constant_for_the_compiler():
    marked = precision.working_dtype
    assert marked._dynamo_marked_constant
    assert torch.compiler.assume_constant_result(lambda: 0)._dynamo_marked_constant

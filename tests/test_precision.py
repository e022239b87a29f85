"""In which precision a device computes: the decision, and networks of bfloat16 on plain CPUs."""

import pytest
import torch
import torch.nn.functional as F
from test_dit import FRAMES, random_dit, random_inputs, relative_rms, to_bfloat16
from test_umt5 import tiny_encoder
from test_vae import GENERATIONS, WAN22, build, clip
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wan import precision
from wan.precision import (
    Linear,
    convolve,
    default_dtype,
    is_fast_in_bfloat16,
    linear,
    precision_note,
    working_dtype,
)
from wan.runtime.memory_meter import peak_bytes
from wan.weights.quantize import QuantizedLinear, quantize, restore_weight

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PRODUCTS = ("mm", "addmm", "bmm", "convolution", "mkldnn_convolution", "scaled_dot")


class Products(TorchDispatchMode):
    """Collects the dtypes that matrix products, convolutions and attention compute in."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(word in str(func) for word in PRODUCTS):
            self.dtypes |= {x.dtype for x in tree_leaves(args) if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def fast(request, monkeypatch):
    """Whether the CPU is fast in bfloat16, in this test."""
    monkeypatch.setattr(precision, "cpu_is_fast_in_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("machine", "capability", "onednn", "variables", "fast"),
    [
        ("x86_64", "AVX512", True, {}, True),
        ("AMD64", "AVX512_VNNI", True, {}, True),
        ("AMD64", "AVX2", True, {}, False),  # what ATEN_CPU_CAPABILITY=avx2 gives
        ("x86_64", "DEFAULT", True, {}, False),
        ("x86_64", "AVX512", False, {}, False),
        ("x86_64", "AVX512", True, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ("x86_64", "AVX512", True, {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, True),
        ("x86_64", "AVX512", True, {"DNNL_MAX_CPU_ISA": "SSE41"}, False),
        ("aarch64", "DEFAULT", True, {}, True),  # ARM has no AVX; oneDNN knows its instructions
        ("arm64", "DEFAULT", None, {}, False),  # PyTorch for macOS is built without oneDNN
    ],
)
def test_a_cpu_is_fast_in_bfloat16_if_all_that_pytorch_uses_is(
    machine, capability, onednn, variables, fast, monkeypatch
):
    for name in precision.ONEDNN_LIMITS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn is not None)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    assert precision.cpu_is_fast_in_bfloat16.__wrapped__() is fast


def test_one_decision_gives_the_dtype_of_weights_and_of_products(fast):
    assert is_fast_in_bfloat16(CPU) is fast
    assert is_fast_in_bfloat16(CUDA)
    assert (default_dtype(CUDA), default_dtype(CPU)) == (torch.bfloat16, torch.float32)
    assert working_dtype(torch.bfloat16, CPU) == (torch.bfloat16 if fast else torch.float32)
    assert working_dtype(torch.bfloat16, CUDA) == torch.bfloat16
    assert working_dtype(torch.float32, CPU) == torch.float32
    note = "weights bfloat16, computed in float32: this CPU has no fast bfloat16"
    assert precision_note(torch.bfloat16, CPU) == (None if fast else note)


def products_of(compute):
    with Products() as products, torch.no_grad():
        result = compute()
    return result, products.dtypes


def test_a_dit_of_bfloat16_computes_as_its_cpu_is_fast(fast):
    latents, context = random_inputs()
    dit = to_bfloat16(random_dit())
    out, dtypes = products_of(lambda: dit(latents, FRAMES, dit.prepare_context(context, 5)))
    assert (torch.bfloat16 in dtypes) is fast
    with torch.no_grad():
        same_weights = dit.float()(latents, FRAMES, context)
    assert out.dtype == torch.float32
    assert relative_rms(out, same_weights) < (1e-2 if fast else 2e-6)
    assert fast or not torch.equal(out, random_dit()(latents, FRAMES, context))


def test_a_text_encoder_of_bfloat16_computes_as_its_cpu_is_fast(fast):
    encoder, ids = tiny_encoder().bfloat16(), torch.tensor([[5, 9, 31, 1]])
    out, dtypes = products_of(lambda: encoder(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert out.dtype == torch.bfloat16  # what it returns keeps the dtype of the weights
    assert (torch.bfloat16 in dtypes) is fast
    same_weights = encoder.float()(ids)
    assert fast or torch.equal(out, same_weights.bfloat16())
    assert relative_rms(out, same_weights) < 2e-2


@GENERATIONS
def test_an_autoencoder_of_bfloat16_computes_as_its_cpu_is_fast(config, fast):
    vae, video = build(config).bfloat16(), clip(config)
    latents, dtypes = products_of(lambda: vae.encode_normalized(video))
    (again, of_decoding) = products_of(lambda: vae.decode_normalized(latents))
    assert (latents.dtype, again.dtype) == (torch.float32, torch.bfloat16)
    assert (torch.bfloat16 in dtypes & of_decoding) is fast
    assert fast or torch.bfloat16 not in dtypes | of_decoding
    with torch.no_grad():
        whole = vae.float().decode_normalized(latents)
    assert fast or relative_rms(again, whole) < 3e-3  # rounded once, at the end


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "fp8"])
@torch.no_grad()
def test_a_weight_is_restored_piece_by_piece(kind, monkeypatch):
    """float32 products with a narrow weight take the memory of one piece, and are the products."""
    monkeypatch.setattr(precision, "PIECE", 1 << 14)
    layer = Linear(256, 1000)
    x = torch.randn(2, 3, 256)
    if kind == "bfloat16":
        layer.bfloat16()
        whole = layer.weight.float()
    else:
        network = torch.nn.Module()
        network.blocks = torch.nn.ModuleList([torch.nn.ModuleDict({"ffn": torch.nn.Module()})])
        network.blocks[0]["ffn"].up = layer
        quantize(network, kind)
        layer = network.blocks[0]["ffn"].up
        assert isinstance(layer, QuantizedLinear)
        whole = restore_weight(layer.weight, layer.scale, torch.float32)
    expected = F.linear(x, whole, layer.bias.float())
    torch.testing.assert_close(layer(x), expected)
    assert peak_bytes(lambda: layer(x)) < whole.nbytes / 2


def test_gradients_pass_a_narrow_weight():
    """Of a frozen weight in bfloat16, beside float32 activations: as with adapters in training."""
    layer = Linear(5, 7).bfloat16().requires_grad_(False)
    x = torch.randn(3, 5, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().clone().requires_grad_(True)
    F.linear(y, layer.weight.float(), layer.bias.float()).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kernel", [(3, 3), (3, 3, 3)], ids=["2d", "3d"])
def test_a_convolution_of_narrow_weights_is_that_of_the_weights_in_float32(kernel):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, *(6,) * len(kernel), generator=generator)
    weight = torch.randn(7, 5, *kernel, generator=generator).bfloat16()
    bias = torch.randn(7, generator=generator).bfloat16()
    rest = ((1,) * len(kernel), (1,) * len(kernel))
    expected = convolve(x, weight.float(), bias.float(), *rest)
    assert torch.equal(convolve(x, weight, bias, *rest), expected)


def test_autocast_chooses_the_dtype_before_a_weight_is_restored():
    layer, x = Linear(5, 7).bfloat16(), torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert linear(x.double(), layer.weight, layer.bias).dtype == torch.float64


class NoFloat64(TorchDispatchMode):
    """Refuses float64 on any device but the CPU, as MPS does; meta stands for MPS."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                assert leaf.dtype != torch.float64, func
        return result


@torch.no_grad()
def test_networks_make_no_float64_on_a_device_that_has_none():
    meta = torch.device("meta")
    latents, context = random_inputs()
    dit, encoder, vae = random_dit().to(meta), tiny_encoder().to(meta), build(WAN22).to(meta)
    with pytest.raises(AssertionError), NoFloat64():
        torch.zeros(2, device=meta).double()
    with NoFloat64():
        prepared = dit.prepare_context(context.to(meta))
        assert dit(latents.to(meta), FRAMES.to(meta), prepared).is_meta
        assert encoder(torch.zeros(1, 4, dtype=torch.int64, device=meta)).is_meta
        encoded = vae.encode_normalized(clip(WAN22).to(meta))
        assert vae.decode_normalized(encoded).is_meta

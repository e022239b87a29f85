"""8-bit weights of files that people have: plain ones are raised, scaled ones are multiplied."""

import json

import pytest
import torch
from test_weights import DIT, load, random_state, refused, rewrite, save
from torch import Tensor

from configs.conversion import ConvertConfig
from infer.convert.run import convert
from wan.files import write_json
from wan.lora.extract import read_stored
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import load_state, match_names
from wan.weights.quantize import quantize_weight
from wan.weights.safetensors_file import read_header, write_tensors

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
QUERY = "blocks.1.attn1.to_q"
OURS = "blocks.1.self_attention.query.weight"


def in_fp8(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices in 8 bits, the rest as it was: a plain fp8 file."""
    return {n: t.to(dtype) if t.ndim == 2 else t for n, t in tensors.items()}


def scaled(
    tensors: dict[str, Tensor],
    suffix: str = "scale_weight",
    dtype: torch.dtype = torch.float8_e4m3fn,
    per_channel: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a scaled fp8 file: every matrix divided by a scale that stands beside it."""
    made = {}
    for name, tensor in tensors.items():
        made[name] = tensor
        if tensor.ndim == 2 and name.endswith(".weight"):
            largest = tensor.abs().amax(dim=1, keepdim=True) if per_channel else tensor.abs().max()
            scale = (largest / torch.finfo(dtype).max).float()
            made[name] = (tensor / scale).to(dtype)
            made[name.removesuffix("weight") + suffix] = scale
    return made


def product(tensors: dict[str, Tensor], name: str, scale: str, dtype: torch.dtype) -> Tensor:
    """A weight as ComfyUI restores it: both factors in the dtype of the result."""
    return tensors[name].to(dtype) * tensors[scale].to(dtype)


@pytest.mark.parametrize("stored", FP8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("layout", ["diffusers", "official"])
def test_plain_fp8_is_raised_to_the_dtype_exactly(tmp_path, stored, dtype, layout):
    state = save("dit", tmp_path, layout)
    rewrite(tmp_path, lambda tensors: in_fp8(tensors, stored))
    loaded = load("dit", tmp_path, dtype=dtype).state_dict()
    weight = "blocks.0.self_attention.query.weight"
    assert loaded[weight].dtype == (dtype or torch.bfloat16)
    assert torch.equal(loaded[weight].float(), state[weight].to(stored).float())
    head = "head.proj.weight"  # stays float32 whatever the dtype
    assert loaded[head].dtype == torch.float32
    assert torch.equal(loaded[head], state[head].to(stored).float())


@pytest.mark.parametrize("suffix", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", FP8)
def test_scaled_fp8_is_multiplied_as_comfyui_does(tmp_path, suffix, per_channel, dtype, stored):
    save("dit", tmp_path)
    kept = {}

    def scale(tensors):
        kept.update(scaled(tensors, suffix, stored, per_channel))
        return kept | {
            f"{QUERY}.{'scale_input' if suffix == 'scale_weight' else 'input_scale'}": torch.ones(
                ()
            ),
            "scaled_fp8": torch.zeros(2, dtype=stored),
        }

    rewrite(tmp_path, scale)
    loaded = load("dit", tmp_path, dtype=dtype).state_dict()
    expected = product(kept, f"{QUERY}.weight", f"{QUERY}.{suffix}", dtype)
    assert torch.equal(loaded[OURS], expected)
    head = product(kept, "proj_out.weight", f"proj_out.{suffix}", torch.float32)
    assert torch.equal(loaded["head.proj.weight"], head)
    assert (expected.float() - random_state("dit")[OURS]).abs().max() < 0.3  # it is that weight
    state = load_state(open_checkpoint(tmp_path), "transformer")
    assert torch.equal(
        state[OURS], product(kept, f"{QUERY}.weight", f"{QUERY}.{suffix}", torch.bfloat16)
    )
    small = match_names(open_checkpoint(tmp_path), "transformer").stored[OURS]
    whole = product(kept, f"{QUERY}.weight", f"{QUERY}.{suffix}", torch.float32)
    assert torch.equal(read_stored(small), whole)  # for LoRA extraction


def test_a_prefixed_scaled_file_of_the_official_names(tmp_path):
    """The marker may stand without the prefix of the weights, as the tokenizer does."""
    save("dit", tmp_path, "official")
    made = {}

    def change(tensors):
        made.update(scaled(tensors))
        prefixed = {f"model.diffusion_model.{n}": t for n, t in made.items()}
        return prefixed | {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}

    rewrite(tmp_path, change)
    loaded = load("dit", tmp_path, dtype=torch.float32).state_dict()
    name = "blocks.2.ffn.0"
    expected = product(made, f"{name}.weight", f"{name}.scale_weight", torch.float32)
    assert torch.equal(loaded["blocks.2.ffn.up.weight"], expected)


def test_newer_files_name_the_format_of_each_weight(tmp_path):
    save("dit", tmp_path)
    text = json.dumps({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}).encode()
    mark = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rewrite(tmp_path, lambda t: scaled(t, "weight_scale") | {f"{QUERY}.comfy_quant": mark})
    load("dit", tmp_path, dtype=torch.bfloat16)
    other = torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    rewrite(tmp_path, lambda tensors: tensors | {f"{QUERY}.comfy_quant": other})
    message = refused("dit", tmp_path)
    assert f"a quantised checkpoint: {QUERY}.comfy_quant names the format nvfp4" in message
    assert "same release" not in message


def test_the_scale_of_a_wide_weight_counts_too(tmp_path):
    state = save("dit", tmp_path)
    half = {f"{QUERY}.scale_weight": torch.tensor(0.5)}
    rewrite(tmp_path, lambda tensors: tensors | half)
    assert torch.equal(load("dit", tmp_path).state_dict()[OURS], state[OURS] / 2)


def test_every_tensor_beside_the_weights_is_accounted_for(tmp_path):
    save("dit", tmp_path)
    rewrite(tmp_path, scaled)
    lost = {"blocks.7.attn1.to_q.scale_weight": torch.ones(()), "x.input_scale": torch.ones(())}
    rewrite(tmp_path, lambda tensors: tensors | lost)
    message = refused("dit", tmp_path, dtype=torch.bfloat16)
    assert "2 unexpected: blocks.7.attn1.to_q.scale_weight, x.input_scale" in message
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n not in lost})
    rewrite(tmp_path, lambda tensors: tensors | {"spiece_model": torch.zeros(3, dtype=torch.uint8)})
    assert "1 unexpected: spiece_model" in refused("dit", tmp_path)  # a text encoder may have it


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((32, 2), torch.float32), ((16, 1), torch.float32), ((32,), torch.float32), ((), torch.uint8)],
)
def test_scales_per_block_are_refused(tmp_path, shape, dtype):
    save("dit", tmp_path)
    block = {f"{QUERY}.weight_scale": torch.ones(shape, dtype=dtype)}
    rewrite(tmp_path, lambda tensors: in_fp8(tensors, FP8[0]) | block)
    message = refused("dit", tmp_path)
    assert f"a quantised checkpoint: {QUERY}.weight is float8_e4m3fn of shape (32, 32)" in message
    assert f"with a scale of shape {shape}" in message
    assert "same release" not in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_found_in_8_bits_too(tmp_path, value):
    save("dit", tmp_path)

    def damage(tensors):
        made = scaled(tensors, dtype=torch.float8_e5m2)
        made[f"{QUERY}.weight"].view(torch.uint8)[3, 3] = 0x7C if value == float("inf") else 0x7F
        return made

    rewrite(tmp_path, damage)
    for dtype in (torch.bfloat16, torch.float16):
        message = refused("dit", tmp_path, dtype=dtype)
        assert f"tensor {QUERY}.weight is not finite" in message
        assert "the file is damaged" in message
    rewrite(tmp_path, lambda t: t | {f"{QUERY}.weight": torch.zeros(32, 32)})
    rewrite(tmp_path, lambda t: t | {f"{QUERY}.scale_weight": torch.tensor(value)})
    assert f"{QUERY}.scale_weight is not finite" in refused("dit", tmp_path, dtype=torch.bfloat16)


def test_scaled_weights_are_quantised_anew(tmp_path):
    save("dit", tmp_path)
    made = {}

    def change(tensors):
        made.update(scaled(tensors))
        return made

    rewrite(tmp_path, change)
    loaded = load("dit", tmp_path, dtype=torch.bfloat16, quantize="int8").state_dict()
    plain = product(made, f"{QUERY}.weight", f"{QUERY}.scale_weight", torch.bfloat16)
    assert torch.equal(loaded[OURS], quantize_weight(plain, "int8")[0])


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_conversion_restores_scaled_weights_and_keeps_plain_8_bits(tmp_path, dtype):
    save("dit", tmp_path / "a")
    made = {}

    def change(tensors):
        made.update(scaled(tensors))
        del made["proj_out.scale_weight"]  # one weight without a scale, in 8 bits
        return made | {"scaled_fp8": torch.zeros(0)}

    rewrite(tmp_path / "a", change)
    write_json(tmp_path / "a/config.json", DIT.to_json())
    target = ConvertConfig(str(tmp_path / "a"), str(tmp_path / "b"), "official", dtype=dtype)
    convert(target)
    (file,) = (tmp_path / "b").glob("*.safetensors")
    assert not [n for n in read_header(file).tensors if n.endswith(("scaled_fp8", "scale_weight"))]
    found = open_checkpoint(file).map()
    result = torch.bfloat16 if dtype is None else torch.float32
    expected = product(made, f"{QUERY}.weight", f"{QUERY}.scale_weight", result)
    assert torch.equal(found["blocks.1.self_attn.q.weight"], expected)
    head = found["head.head.weight"]
    assert head.dtype == (FP8[0] if dtype is None else torch.float32)
    assert torch.equal(head.float(), made["proj_out.weight"].float())


@pytest.mark.parametrize("name", ["qweight", "weight_packed", "absmax", "weight_scale_2"])
def test_kinds_that_are_no_product_are_refused_by_name(tmp_path, name):
    save("dit", tmp_path)
    rewrite(tmp_path, lambda t: t | {f"{QUERY}.{name}": torch.zeros(4, dtype=torch.uint8)})
    message = refused("dit", tmp_path)
    assert f"this is a quantised checkpoint, see {QUERY}.{name}; use the float32" in message


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_gguf_is_refused_by_name_with_what_to_take(tmp_path, suffix):
    file = tmp_path / f"wan2.2_ti2v_5B_Q8_0{suffix}"
    file.write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    for path in (file, tmp_path):
        message = refused("dit", path)
        assert (
            "a GGUF file (quantised); use the float32, bfloat16 or float16 safetensors" in message
        )
    file.write_bytes(b"GGUF")  # even if it is cut short
    assert ("a GGUF file" in refused("dit", file)) == (suffix == ".gguf")


def test_block_dtypes_of_the_format_are_called_quantised(tmp_path):
    save("dit", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    write_tensors(file, {"a.weight_scale": torch.zeros(4, dtype=torch.float8_e5m2)})
    file.write_bytes(file.read_bytes().replace(b'"F8_E5M2"', b'"F8_E8M0"'))
    assert "a quantised checkpoint, tensor a.weight_scale has dtype F8_E8M0" in refused(
        "dit", tmp_path
    )

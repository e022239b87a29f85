"""Names in LoRA files: every combination of front, layout and suffix that tools write."""

import itertools
import re

import pytest
import torch
from test_lora import WIDTH, assert_changed_by, merged_state, numbers, pairs_for, state_of, tiny_dit
from torch import Tensor

from wan.errors import WanError
from wan.lora.files import module_pattern, parse_lora
from wan.lora.merge import merge_lora, read_lora
from wan.lora.names import FASTVIDEO_MODULES, LAYOUTS, parameters
from wan.weights.keys import detect_layout, released_name
from wan.weights.safetensors_file import write_tensors

RANK = 3
LAYERS = (
    "blocks.0.self_attention.query",
    "blocks.1.self_attention.out",
    "blocks.0.cross_attention.key",
    "blocks.1.cross_attention.out",
    "blocks.0.ffn.up",
    "blocks.1.ffn.down",
)
PAIRS = pairs_for(list(LAYERS), RANK)
FRONTS = (
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.diffusion_model.",
    "base_model.model.",
    "_orig_mod.",
    "module._orig_mod.",
    "diffusion.model.",
    "pipe.dit.",
    "lora_unet_",
    "lora_unet__",
    "lora_transformer_",
    "lora_transformer.",
    "lycoris_",
)
SUFFIXES = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A", ".lora_B"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)


def module_name(layout: str, layer: str) -> str:
    """A layer's name in a layout, with dots."""
    released = "diffusers" if layout == "fastvideo" else layout
    name = released_name("transformer", released, f"{layer}.weight").removesuffix(".weight")
    head, number, rest = name.split(".", 2)
    template = f"{head}.#.{rest}"
    renames = FASTVIDEO_MODULES if layout == "fastvideo" else {}
    return renames.get(template, template).replace("#", number)


def merged(tensors: dict[str, Tensor], expert: str | None = None) -> dict[str, Tensor]:
    dit = tiny_dit()
    merge_lora(dit, parse_lora(tensors, expert=expert))
    return state_of(dit)


def pair_file(front: str, layout: str, suffix: tuple[str, str], dots: str = ".") -> dict:
    tensors = {}
    for layer, (down, up) in PAIRS.items():
        stem = front + module_name(layout, layer).replace(".", dots)
        tensors |= {stem + suffix[0]: down, stem + suffix[1]: up}
    return tensors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dots", [".", "_"])
def test_every_combination_of_front_layout_and_suffix_is_read(layout, dots):
    expected = {f"{layer}.weight": up @ down for layer, (down, up) in PAIRS.items()}
    for front, suffix in itertools.product(FRONTS, SUFFIXES):
        lora = parse_lora(pair_file(front, layout, suffix, dots))
        assert {name: pair.delta().shape for name, pair in lora.pairs.items()} == {
            name: delta.shape for name, delta in expected.items()
        }
        for name, delta in expected.items():
            torch.testing.assert_close(lora.pairs[name].delta(), delta, msg=f"{front} {suffix}")
        assert lora.format.startswith(f"{layout} names")
        assert "full differences" not in lora.format


def test_half_dotted_names_and_wrappers_of_single_layers_are_read():
    down, up = PAIRS[LAYERS[0]]
    for stem in (
        "lora_unet_blocks.0.self_attn_q",
        "lycoris_blocks_0_self_attn.q",
        "transformer.blocks.0._orig_mod.attn1.to_q",
        "blocks.0._checkpoint_wrapped_module._fsdp_wrapped_module.attn1.to_q",
        "blocks.0.attn1.processor.to_q",
    ):
        tensors = {f"{stem}_lora.down.weight": down, f"{stem}_lora.up.weight": up}
        assert_changed_by(merged(tensors), {f"{LAYERS[0]}.weight": up @ down})


def test_the_attention_processors_of_older_diffusers_are_read():
    down, up = PAIRS["blocks.1.self_attention.out"]
    stem = "transformer.blocks.1.attn1.processor.to_out_lora"
    tensors = {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
    assert_changed_by(merged(tensors), {"blocks.1.self_attention.out.weight": up @ down})


@pytest.mark.parametrize("layout", ["diffusers", "fastvideo"])
def test_what_fastvideos_extractor_writes_is_read(layout):
    """Rank and alpha are tensors of one element, other changes are whole differences."""
    tensors: dict[str, Tensor] = {}
    for layer, (down, up) in PAIRS.items():
        stem = module_name(layout, layer)
        tensors |= {
            f"{stem}.lora_A.weight": down,
            f"{stem}.lora_B.weight": up,
            f"{stem}.lora_rank": torch.tensor([RANK], dtype=torch.int32),
            f"{stem}.lora_alpha": torch.tensor([2.0 * RANK]),
        }
    norm = "norm2" if layout == "diffusers" else "self_attn_residual_norm.norm"
    changes = {
        "blocks.0.modulation": numbers(1, 6, WIDTH, seed=50),
        "head.modulation": numbers(1, 2, WIDTH, seed=51),
        "blocks.1.cross_norm.weight": numbers(WIDTH, seed=52),
        "blocks.1.cross_norm.bias": numbers(WIDTH, seed=53),
    }
    names = (
        "blocks.0.scale_shift_table.diff_param",
        "scale_shift_table.diff_param",
        f"blocks.1.{norm}.diff",
        f"blocks.1.{norm}.diff_b",
    )
    tensors |= dict(zip(names, changes.values(), strict=True))
    expected = {f"{layer}.weight": 2 * up @ down for layer, (down, up) in PAIRS.items()}
    assert_changed_by(merged(tensors), expected | changes)
    about = parse_lora(tensors).format
    assert about == f"{layout} names, lora_A/lora_B, alpha per layer, full differences"


def test_a_rank_that_is_not_the_pairs_is_refused():
    down, up = PAIRS[LAYERS[0]]
    stem = "blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A": down, f"{stem}.lora_B": up, f"{stem}.lora_rank": torch.tensor([8])}
    with pytest.raises(WanError, match="ranks differ"):
        parse_lora(tensors)


def test_every_form_of_a_table_is_one_parameter():
    delta = numbers(1, 6, WIDTH)
    for name in (
        "diffusion_model.blocks.0.diff_m",
        "diffusion_model.blocks.0.modulation.diff",
        "blocks.0.scale_shift_table.diff",
        "blocks.0.scale_shift_table.diff_param",
        "blocks.0.modulation.diff_m",
    ):
        assert_changed_by(merged({name: delta}), {"blocks.0.modulation": delta})


def test_norms_of_lycoris_are_read():
    weight, bias = numbers(WIDTH), numbers(WIDTH, seed=2)
    tensors = {"lycoris_blocks_0_norm3.w_norm": weight, "lycoris_blocks_0_norm3.b_norm": bias}
    expected = {"blocks.0.cross_norm.weight": weight, "blocks.0.cross_norm.bias": bias}
    assert_changed_by(merged(tensors), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_two_parameters_have_one_name_with_underscores(layout):
    names = [parameter.released for parameter in parameters(layout).values()]
    assert len({name.replace(".", "_") for name in names}) == len(set(names))
    ours = {parameter.ours for parameter in parameters(layout).values()}
    assert ours == {re.sub(r"blocks\.\d+", "blocks.#", name) for name in state_of(tiny_dit())}


# --- experts --------------------------------------------------------------------------------------


def both_experts(high: str, low: str) -> dict[str, Tensor]:
    """A file for both experts, that changes the first parameter by 1 and the second by 2 pairs."""
    down, up = PAIRS[LAYERS[0]]
    tensors = {}
    for front, scale in ((high, 1), (low, 2)):
        stem = f"{front}blocks.0.self_attn.q"
        tensors |= {f"{stem}.lora_A.weight": scale * down, f"{stem}.lora_B.weight": up}
    return tensors


@pytest.mark.parametrize(
    ("high", "low"),
    [
        ("transformer.", "transformer_2."),
        ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
        ("pipe.dit.", "pipe.dit2."),
        ("high_noise_model.", "low_noise_model."),
        ("lora_transformer_", "lora_transformer_2_"),
    ],
)
def test_a_file_for_both_experts_gives_each_its_half(high, low):
    tensors = both_experts(high, low)
    down, up = PAIRS[LAYERS[0]]
    name = f"{LAYERS[0]}.weight"
    assert_changed_by(merged(tensors, "transformer"), {name: up @ down})
    assert_changed_by(merged(tensors, "transformer_2"), {name: 2 * up @ down})
    with pytest.raises(WanError, match="both experts"):
        parse_lora(tensors)


@pytest.mark.parametrize(
    ("front", "wrong"),
    [
        ("transformer_2.", "transformer"),
        ("diffusion_model.transformer_2.", "transformer"),
        ("pipe.dit2.", "transformer"),
        ("diffusion_model.transformer_1.", "transformer_2"),
        ("high_noise_model.", "transformer_2"),
    ],
)
def test_a_file_of_one_expert_is_refused_for_the_other(front, wrong):
    tensors = pair_file(front, "diffusers", SUFFIXES[0])
    right = "transformer" if wrong == "transformer_2" else "transformer_2"
    with pytest.raises(WanError, match=f"names say {right} .* given for {wrong} "):
        parse_lora(tensors, expert=wrong)
    for expert in (right, None):  # models with one network take it too
        assert parse_lora(tensors, expert=expert).pairs


def test_names_that_say_no_expert_fit_either():
    for front in ("transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_", ""):
        tensors = pair_file(front, "diffusers", SUFFIXES[0])
        for expert in ("transformer", "transformer_2"):
            assert len(parse_lora(tensors, expert=expert).pairs) == len(LAYERS)


# --- what a file is called ------------------------------------------------------------------------


def test_a_file_with_lora_in_its_names_is_never_called_a_whole_model(tmp_path):
    strange = {"blocks.0.attn1.to_q.my_lora_thing": torch.ones(3, 3)}
    write_tensors(tmp_path / "a.safetensors", strange)
    with pytest.raises(WanError, match="a form that is not known here") as caught:
        read_lora(tmp_path / "a.safetensors")
    assert "whole model" not in str(caught.value)
    with pytest.raises(WanError, match="no LoRA for Wan"):
        parse_lora({"conv.kernel": torch.ones(3)})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_given_as_weights_is_called_a_lora(layout):
    for front, suffix in itertools.product(FRONTS, SUFFIXES):
        with pytest.raises(WanError, match="this is a LoRA"):
            detect_layout("transformer", pair_file(front, layout, suffix))


@pytest.mark.parametrize("front", ["model.diffusion_model.", "base_model.model.diffusion_model."])
def test_the_report_says_what_was_read(front):
    tensors = pair_file(front, "official", SUFFIXES[0])
    assert parse_lora(tensors).format == "official names, lora_A/lora_B"
    tensors[f"{front}blocks.0.self_attn.q.diff_b"] = numbers(WIDTH)
    assert parse_lora(tensors).format == "official names, lora_A/lora_B, full differences"
    kohya = pair_file("lora_unet_", "official", SUFFIXES[3], dots="_")
    assert parse_lora(kohya).format == "official names with underscores, lora_down/lora_up"


def test_names_that_are_not_known_are_listed_whatever_stands_in_front():
    tensors = pair_file("_orig_mod.", "official", SUFFIXES[1])
    tensors |= {"_orig_mod.blocks.0.self_attn.z.lora_A": numbers(2, 4)}
    tensors |= {"_orig_mod.blocks.0.self_attn.z.lora_B": numbers(4, 2)}
    with pytest.raises(WanError, match=r"none of Wan's: _orig_mod\.blocks\.0\.self_attn\.z"):
        parse_lora(tensors)


# --- patterns from files --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "module", "fits"),
    [
        ("to_v", "blocks.0.attn1.to_v", True),
        ("to_v", "blocks.0.attn1.into_v", False),
        (r"^blocks.1.attn2.to_k", "blocks.1.attn2.to_k", True),
        (r"blocks\.\d+\.attn1\.to_q", "blocks.12.attn1.to_q", True),
        (r"blocks\.(0|1)\.attn[12]\.to_q", "blocks.1.attn2.to_q", True),
    ],
)
def test_a_pattern_means_what_it_means_in_peft(key, module, fits):
    functional = pytest.importorskip("peft.utils.other")
    pattern = module_pattern("a", "b", key)
    assert (pattern.fullmatch(module) is not None) == fits
    assert (functional.get_pattern_key([key], module) == key) == fits


@pytest.mark.parametrize("key", ["(a+)+b", "(a|aa)+b", ".*.*.*.*.*x", "(?:a)", "((a*)*)*"])
def test_a_pattern_that_could_take_long_is_refused(key):
    with pytest.raises(WanError, match="repeats"):
        module_pattern("a", "b", key)


def test_merging_reads_the_pattern_of_every_layout(tmp_path):
    down, up = PAIRS[LAYERS[0]]
    stem = "base_model.model.blocks.0.self_attn.q"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    metadata = {
        "lora_adapter_metadata": '{"transformer.lora_alpha": 3, '
        '"transformer.alpha_pattern": {"self_attn.q": 6}}'
    }
    write_tensors(tmp_path / "a.safetensors", tensors, metadata)
    expected = {f"{LAYERS[0]}.weight": 2 * up @ down}
    assert_changed_by(merged_state(tmp_path / "a.safetensors"), expected)

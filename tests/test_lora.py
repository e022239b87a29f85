"""LoRA: every file format against peft and diffusers or the formula, what is refused, training."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from wan.errors import WanError
from wan.lora.merge import (
    LoRAMerge,
    add_lora,
    fold_lora,
    lora_layers,
    lora_state,
    merge_lora,
    read_lora,
    save_lora,
)
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.weights.checkpoint import open_checkpoint
from wan.weights.keys import LAYOUTS, released_name
from wan.weights.load import load_module
from wan.weights.safetensors_file import map_tensors, read_header, write_tensors
from wan.weights.save import save_component

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=40,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=8,
)
WIDTH = TINY.width
QUERY = "blocks.0.self_attention.query"


def tiny_dit(seed: int = 0, **changes) -> WanDiT:
    dit = WanDiT(DiTConfig(**(vars(TINY) | changes)))
    generator = torch.Generator().manual_seed(seed)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return dit.eval()


def run(dit: WanDiT) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(1, 4, 2, 4, 4, generator=generator)
    context = torch.randn(1, 5, 16, generator=generator)
    return dit(latents, torch.tensor([300.0]), context)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def merged_state(path, strength: float = 1.0, **options) -> dict[str, Tensor]:
    dit = tiny_dit()
    merge_lora(dit, read_lora(path, **options), strength)
    return state_of(dit)


def assert_changed_by(state: dict[str, Tensor], deltas: dict[str, Tensor]) -> None:
    """`state` is the tiny DiT's plus exactly these deltas."""
    for name, before in state_of(tiny_dit()).items():
        after = before + deltas[name] if name in deltas else before
        torch.testing.assert_close(state[name], after, rtol=1e-6, atol=1e-6, msg=name)


# --- against peft and diffusers -------------------------------------------------------------------


def tiny_diffusers():
    """The tiny DiT as a diffusers model."""
    models = pytest.importorskip("diffusers")
    fields = TINY.to_json()
    fields.pop("_class_name")
    model = models.WanTransformer3DModel(**fields)
    state = {
        released_name("transformer", "diffusers", name): value
        for name, value in state_of(tiny_dit()).items()
    }
    model.load_state_dict(state)
    return model


def by_our_names(model: nn.Module) -> dict[str, Tensor]:
    to_ours = {
        released_name("transformer", "diffusers", name): name for name in state_of(tiny_dit())
    }
    return {to_ours[n]: v.detach() for n, v in model.state_dict().items() if n in to_ours}


def peft_model(**options):
    """A peft model on the tiny diffusers DiT, its pairs random."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "time_proj"],
        **options,
    )
    model = peft.get_peft_model(tiny_diffusers(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # peft takes a pair's bias for damage
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {r"blocks\.1\.attn2\.to_k": 11, "to_v": 3}, "rank_pattern": {"to_v": 2}},
        {"lora_bias": True},
    ],
    ids=["plain", "rslora", "patterns", "bias"],
)
def test_a_peft_folder_merges_as_peft_merges_it(tmp_path, options):
    model = peft_model(**options)
    model.save_pretrained(tmp_path)
    expected = by_our_names(model.merge_and_unload())
    state = merged_state(tmp_path)
    assert not torch.equal(state[QUERY + ".weight"], tiny_dit().get_parameter(QUERY + ".weight"))
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("with_alpha", [True, False])
def test_a_diffusers_file_merges_as_diffusers_fuses_it(tmp_path, with_alpha):
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    model = tiny_diffusers()
    config = peft.LoraConfig(r=4, lora_alpha=10, target_modules=["to_q", "to_out.0", "proj_out"])
    model.add_adapter(config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    metadata = {**config.to_dict(), "target_modules": sorted(config.target_modules)}
    diffusers.WanPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=peft.get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=metadata if with_alpha else None,
    )
    expected = fused_by_diffusers(tmp_path / "pytorch_lora_weights.safetensors")
    state = merged_state(tmp_path, strength=1.0)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)


def fused_by_diffusers(path) -> dict[str, Tensor]:
    diffusers = pytest.importorskip("diffusers")
    model = tiny_diffusers()
    converted, metadata = diffusers.WanPipeline.lora_state_dict(
        str(path), return_lora_metadata=True
    )
    diffusers.WanPipeline.load_lora_into_transformer(converted, model, metadata=metadata)
    model.fuse_lora()
    model.unload_lora()
    return by_our_names(model)


def pairs_for(layers: list[str], rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (down, up) for layers of the tiny DiT."""
    pairs = {}
    for seed, layer in enumerate(layers):
        rows, columns = tiny_dit().get_parameter(f"{layer}.weight").shape
        pairs[layer] = (
            numbers(rank, columns, seed=2 * seed),
            numbers(rows, rank, seed=2 * seed + 1),
        )
    return pairs


BLOCK_LAYERS = [
    f"blocks.{n}.{layer}"
    for n in range(2)
    for layer in (
        *(
            f"{a}_attention.{p}"
            for a in ("self", "cross")
            for p in ("query", "key", "value", "out")
        ),
        "ffn.up",
        "ffn.down",
    )
]


def official(layer: str) -> str:
    return released_name("transformer", "official", f"{layer}.weight").removesuffix(".weight")


def write(path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None):
    write_tensors(path, tensors, metadata)
    return path


@pytest.mark.parametrize(("down", "up"), [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_diffusion_model_files_merge_as_in_diffusers(tmp_path, down, up, alpha):
    tensors: dict[str, Tensor] = {}
    for layer, (low, high) in pairs_for(BLOCK_LAYERS).items():
        stem = f"diffusion_model.{official(layer)}"
        tensors |= {f"{stem}.{down}.weight": low, f"{stem}.{up}.weight": high}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    path = write(tmp_path / "a.safetensors", tensors)
    state = merged_state(path)
    for name, value in fused_by_diffusers(path).items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("underscores", ["_", "__"])
def test_kohya_files_merge_as_in_diffusers(tmp_path, underscores):
    tensors: dict[str, Tensor] = {}
    for layer, (low, high) in pairs_for(BLOCK_LAYERS).items():
        stem = f"lora_unet{underscores}{official(layer).replace('.', '_')}"
        tensors |= {
            f"{stem}.lora_down.weight": low,
            f"{stem}.lora_up.weight": high,
            f"{stem}.alpha": torch.tensor(1.5, dtype=torch.bfloat16),
        }
    state = merged_state(write(tmp_path / "a.safetensors", tensors))
    single = {name.replace("lora_unet__", "lora_unet_"): t for name, t in tensors.items()}
    expected = fused_by_diffusers(write(tmp_path / "single.safetensors", single))
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=1e-6, msg=name)


# --- against the formula --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layer_has_one_kohya_name(tmp_path, layout):
    dit = tiny_dit()
    layers = [name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)]
    pairs = pairs_for(layers)
    tensors: dict[str, Tensor] = {}
    for layer, (low, high) in pairs.items():
        module = released_name("transformer", layout, f"{layer}.weight").removesuffix(".weight")
        stem = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": low, f"{stem}.lora_up.weight": high}
    assert len(tensors) == 2 * len(layers)
    expected = {f"{layer}.weight": high @ low for layer, (low, high) in pairs.items()}
    assert_changed_by(merged_state(write(tmp_path / "a.safetensors", tensors)), expected)


@pytest.mark.parametrize(
    "stem",
    [
        "transformer.blocks.0.attn1.to_q.lora_{}.weight",
        "blocks.0.attn1.to_q.lora_{}.weight",
        "transformer.blocks.0.attn1.to_q.lora_{}.default.weight",
        "base_model.model.blocks.0.attn1.to_q.lora_{}.weight",
        "base_model.model.transformer.blocks.0.attn1.to_q.lora_{}.my_adapter.weight",
        "blocks.0.self_attn.q.lora_{}.default.weight",
        "pipe.dit.blocks.0.self_attn.q.lora_{}.default.weight",
        "base_model.model.blocks.0.self_attn.q.lora_{}.default.weight",
        "diffusion_model.blocks.0.self_attn.q.lora_{}.weight",
        "model.diffusion_model.blocks.0.self_attn.q.lora_{}.weight",
        "transformer_2.blocks.0.attn1.to_q.lora_{}.weight",
    ],
)
def test_prefixes_and_adapter_names_are_taken_off(tmp_path, stem):
    low, high = numbers(3, WIDTH), numbers(WIDTH, 3, seed=2)
    path = write(tmp_path / "a.safetensors", {stem.format("A"): low, stem.format("B"): high})
    assert_changed_by(merged_state(path), {f"{QUERY}.weight": high @ low})


@pytest.mark.parametrize("strength", [0.0, 0.35, -1.0])
def test_strength_scales_pairs_and_differences_alike(tmp_path, strength):
    low, high, bias = numbers(3, WIDTH), numbers(WIDTH, 3, seed=2), numbers(WIDTH, seed=3)
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{stem}.lora_down.weight": low,
        f"{stem}.lora_up.weight": high,
        f"{stem}.alpha": torch.tensor(12.0),
        f"{stem}.diff_b": bias,
    }
    state = merged_state(write(tmp_path / "a.safetensors", tensors), strength)
    expected = {
        f"{QUERY}.weight": strength * 4 * high @ low,
        f"{QUERY}.bias": strength * bias,
    }
    assert_changed_by(state, expected)


def test_full_differences_reach_every_parameter(tmp_path):
    # What an extractor of a fully fine-tuned model may write: one difference for each tensor.
    tensors, expected = {}, {}
    for seed, (name, value) in enumerate(state_of(tiny_dit()).items()):
        delta = numbers(*value.shape, seed=seed)
        module, _, leaf = released_name("transformer", "official", name).rpartition(".")
        suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
        tensors[f"diffusion_model.{module}.{suffix}"] = delta
        expected[name] = delta
    path = write(tmp_path / "a.safetensors", tensors)
    assert_changed_by(merged_state(path), expected)
    report = merge_lora(tiny_dit(), read_lora(path))
    assert report.num_tensors == len(report.parameters) == len(expected)


def test_a_pair_and_a_difference_for_one_weight_add_up(tmp_path):
    low, high, delta = numbers(3, WIDTH), numbers(WIDTH, 3, seed=2), numbers(WIDTH, WIDTH, seed=3)
    stem = "diffusion_model.blocks.0.self_attn.q"
    tensors = {
        f"{stem}.lora_down.weight": low,
        f"{stem}.lora_up.weight": high,
        f"{stem}.diff": delta,
    }
    state = merged_state(write(tmp_path / "a.safetensors", tensors))
    assert_changed_by(state, {f"{QUERY}.weight": high @ low + delta})


def test_the_patch_embedding_takes_a_convolution_pair(tmp_path):
    low, high = numbers(3, 4, 1, 2, 2), numbers(WIDTH, 3, 1, 1, 1, seed=2)
    stem = "diffusion_model.patch_embedding"
    tensors = {f"{stem}.lora_down.weight": low, f"{stem}.lora_up.weight": high}
    state = merged_state(write(tmp_path / "a.safetensors", tensors))
    expected = torch.einsum("or,rcthw->octhw", high.flatten(1), low)
    assert_changed_by(state, {"patch_embedding.weight": expected})


def test_the_norm_that_two_layouts_number_differently_is_one(tmp_path):
    delta = numbers(WIDTH)
    three = write(tmp_path / "official.safetensors", {"diffusion_model.blocks.0.norm3.diff": delta})
    two = write(tmp_path / "diffusers.safetensors", {"transformer.blocks.0.norm2.diff": delta})
    for path in (three, two):
        assert_changed_by(merged_state(path), {"blocks.0.cross_norm.weight": delta})
    mixed = {"diffusion_model.blocks.0.norm2.diff": delta} | {
        f"diffusion_model.{official(QUERY)}.diff": numbers(WIDTH, WIDTH),
        f"diffusion_model.{official(QUERY)}.diff_b": numbers(WIDTH),
    }
    with pytest.raises(WanError, match=r"none of Wan's: diffusion_model\.blocks\.0\.norm2\.diff"):
        read_lora(write(tmp_path / "mixed.safetensors", mixed))


def test_merging_into_bfloat16_rounds_once(tmp_path):
    # Beside 1, bfloat16 loses 2^-9 and 2^-8 one by one (a tie goes to even) but not their sum.
    dit = tiny_dit().to(torch.bfloat16)
    weight = dit.get_parameter(f"{QUERY}.weight")
    with torch.no_grad():
        weight.fill_(1.0)
    low, high = torch.full((1, WIDTH), 2.0**-8), torch.full((WIDTH, 1), 0.5)
    stem = "blocks.0.attn1.to_q"
    tensors = {
        f"{stem}.lora_A.weight": low,
        f"{stem}.lora_B.weight": high,
        f"{stem}.diff": torch.full((WIDTH, WIDTH), 2.0**-8),
    }
    merge_lora(dit, read_lora(write(tmp_path / "a.safetensors", tensors)))
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, torch.full_like(weight, 1 + 2.0**-7))


def test_merging_while_loading_rounds_once(tmp_path):
    # The deltas are below what bfloat16 keeps of the stored float32 weights.
    dit = tiny_dit()
    save_component(dit.state_dict(), tmp_path / "dit", "transformer")
    delta = numbers(WIDTH, WIDTH) * 1e-2
    lora = read_lora(write(tmp_path / "a.safetensors", {"blocks.0.attn1.to_q.diff": delta}))
    loaded = load_module(
        lambda: WanDiT(TINY),
        open_checkpoint(tmp_path / "dit"),
        "transformer",
        dtype=torch.bfloat16,
        changes=LoRAMerge(lora).changes,
    )
    weight, merged = (m.get_parameter(f"{QUERY}.weight") for m in (dit, loaded))
    assert torch.equal(merged, (weight + delta).bfloat16())
    assert not torch.equal(merged, (weight.bfloat16() + delta).bfloat16())  # twice would differ
    other = "blocks.1.self_attention.query.weight"
    assert torch.equal(loaded.get_parameter(other), dit.get_parameter(other).bfloat16())


def test_a_file_for_both_experts_needs_a_choice(tmp_path):
    tensors: dict[str, Tensor] = {}
    for expert, seed in (("transformer", 1), ("transformer_2", 5)):
        stem = f"{expert}.blocks.0.attn1.to_q.lora_"
        tensors[f"{stem}A.weight"] = numbers(3, WIDTH, seed=seed)
        tensors[f"{stem}B.weight"] = numbers(WIDTH, 3, seed=seed + 1)
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(WanError, match="both experts"):
        read_lora(path)
    with pytest.raises(WanError, match="must be one of"):
        read_lora(path, expert="low_noise")
    expected = numbers(WIDTH, 3, seed=6) @ numbers(3, WIDTH, seed=5)
    assert_changed_by(merged_state(path, expert="transformer_2"), {f"{QUERY}.weight": expected})


# --- refusals -------------------------------------------------------------------------------------


def pair(stem: str = "diffusion_model.blocks.0.self_attn.q", rank: int = 3) -> dict[str, Tensor]:
    return {
        f"{stem}.lora_down.weight": numbers(rank, WIDTH),
        f"{stem}.lora_up.weight": numbers(WIDTH, rank, seed=2),
    }


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.dora_scale": torch.ones(WIDTH)}, "DoRA"),
        ({"blocks.0.attn1.to_q.lora_magnitude_vector.default.weight": torch.ones(2)}, "DoRA"),
        ({"lora_unet_blocks_0_self_attn_k.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
        ({"lora_unet_blocks_0_self_attn_k.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        (pair("diffusion_model.blocks.0.img_attn.q"), r"none of Wan's.*img_attn"),
        (pair("diffusion_model.blocks.0.cross_attn.k_img"), "image-to-video"),
        (pair("lora_unet_double_blocks_0_img_mod_lin"), "none of Wan's"),
        (pair("text_encoders.t5.blocks.0.attn.q"), "none of Wan's"),
        ({"diffusion_model.blocks.1.ffn.0.lora_up.weight": torch.ones(4, 3)}, "half a pair"),
        ({"diffusion_model.blocks.1.ffn.0.alpha": torch.tensor(3.0)}, "half a pair"),
        ({"diffusion_model.blocks.1.norm7.weight": torch.ones(4)}, "unknown kinds of tensors"),
        ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.ones(2)}, "alpha that is not"),
        ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(torch.nan)}, "alpha that is"),
        ({"diffusion_model.blocks.0.self_attn.q.alpha": torch.tensor(0)}, "alpha that is not"),
        ({"diffusion_model.head.head.diff_b": torch.tensor([1.0, torch.inf])}, "NaN or infinite"),
        ({"diffusion_model.head.head.diff_b": torch.ones(16, dtype=torch.int8)}, "not floating"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_up.weight": numbers(WIDTH, 4)}, "ranks"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": numbers(3, WIDTH)}, "two tensors"),
        (pair("lora_unet_blocks_0_self_attn_q"), "two tensors"),
    ],
)
def test_what_cannot_be_used_is_an_error(tmp_path, extra, message):
    path = write(tmp_path / "a.safetensors", pair() | extra)
    with pytest.raises(WanError, match=message):
        read_lora(path)


def test_all_problems_of_a_file_are_listed_together(tmp_path):
    tensors = pair() | pair("diffusion_model.blocks.0.cross_attn.k_img")
    tensors |= pair("diffusion_model.blocks.1.cross_attn.k_img")
    tensors |= {"diffusion_model.blocks.0.ffn.0.alpha": torch.tensor(1.0)}
    with pytest.raises(WanError) as caught:
        read_lora(write(tmp_path / "a.safetensors", tensors))
    message = str(caught.value)
    assert "blocks.{0..1}.cross_attn.k_img.lora_down.weight (2)" in message
    assert "half a pair: diffusion_model.blocks.0.ffn.0.alpha" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 1}, r"lacks: blocks\.1\.self_attention\.query\.weight.*blocks up to numb"),
        ({"num_attention_heads": 4}, r"other shapes:.*LoRA \(24, 24\), model \(48, 48\).*width 24"),
    ],
)
def test_a_lora_for_another_model_changes_nothing(tmp_path, changes, message):
    stems = [f"diffusion_model.blocks.{n}.self_attn.q" for n in range(2)]
    lora = read_lora(write(tmp_path / "a.safetensors", pair(stems[0]) | pair(stems[1])))
    dit = tiny_dit(**changes)
    before = state_of(dit)
    with pytest.raises(WanError, match=message):
        merge_lora(dit, lora)
    assert all(torch.equal(before[name], value) for name, value in state_of(dit).items())


def test_the_model_that_a_lora_was_made_for_is_named(tmp_path):
    stem = "diffusion_model.blocks.39.self_attn.q"
    tensors = {
        f"{stem}.lora_down.weight": torch.ones(1, 5120),
        f"{stem}.lora_up.weight": torch.ones(5120, 1),
    }
    lora = read_lora(write(tmp_path / "a.safetensors", tensors))
    with pytest.raises(WanError, match=r"number 39, width 5120 \(a Wan 14B or A14B\)"):
        merge_lora(tiny_dit(), lora)


def test_other_files_are_refused(tmp_path):
    base = {released_name("transformer", "official", n): v for n, v in state_of(tiny_dit()).items()}
    with pytest.raises(WanError, match=r"no LoRA layers.*whole model"):
        read_lora(write(tmp_path / "base.safetensors", base))
    (tmp_path / "a.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(WanError, match="pickle"):
        read_lora(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_lora(tmp_path / "b.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WanError, match="exactly one"):
        read_lora(tmp_path / "empty")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa_niter_4"}, "base weights"),
        ({"lora_alpha": "8"}, "must hold numbers"),
        ([], "JSON is not an object"),
        ("{", "not valid JSON"),
    ],
)
def test_settings_of_peft_that_change_the_meaning_are_refused(tmp_path, config, message):
    text = config if isinstance(config, str) else json.dumps(config)
    path = write(tmp_path / "a.safetensors", pair(), {"lora_adapter_metadata": text})
    with pytest.raises(WanError, match=message):
        read_lora(path)


def test_merging_needs_weights_and_a_number(tmp_path):
    lora = read_lora(write(tmp_path / "a.safetensors", pair()))
    with torch.device("meta"):
        empty = WanDiT(TINY)
    with pytest.raises(WanError, match="load the model's weights first"):
        merge_lora(empty, lora)
    with pytest.raises(WanError, match="finite"):
        merge_lora(tiny_dit(), lora, strength=float("nan"))


# --- training -------------------------------------------------------------------------------------


def trained(**options) -> WanDiT:
    """A tiny DiT with pairs that do something."""
    dit = tiny_dit()
    add_lora(dit, rank=4, alpha=6, generator=torch.Generator().manual_seed(3), **options)
    for name, parameter in dit.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(4))
    return dit


def test_a_new_pair_changes_nothing_and_trains_alone():
    dit = tiny_dit()
    before = run(dit)
    names = add_lora(dit, rank=4)
    assert len(names) == 2 * 10
    torch.testing.assert_close(run(dit), before, rtol=0, atol=0)
    trainable = {name for name, parameter in dit.named_parameters() if parameter.requires_grad}
    assert trainable == lora_state(dit).keys()
    assert set(state_of(tiny_dit())) <= set(dit.state_dict())  # checkpoints still load


def test_the_start_depends_on_the_generator_alone():
    states = [lora_state(trained()) for _ in range(2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_accepted_target_takes_part_in_the_forward():
    dit = tiny_dit()
    linear = [name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)]
    accepted = []
    for name in linear:
        try:
            accepted += add_lora(dit, rank=2, targets=[name.replace(".", r"\.")])
        except WanError as error:
            assert "Float32Linear" in str(error)  # noqa: PT017
    assert set(linear) - set(accepted) == {
        "time_embedding.in_proj",
        "time_embedding.out_proj",
        "time_modulation",
        "head.proj",
    }
    for parameter in dit.parameters():
        parameter.requires_grad_(True)
    run(dit).square().sum().backward()
    for name in accepted:
        gradient = dit.get_parameter(f"{name}.lora_B").grad
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


def test_folding_gives_the_same_function_in_plain_layers():
    dit = trained()
    with_pairs = run(dit)
    fold_lora(dit)
    assert not lora_layers(dit)
    assert set(dit.state_dict()) == set(tiny_dit().state_dict())
    torch.testing.assert_close(run(dit), with_pairs, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(with_pairs, run(tiny_dit()), atol=1e-2)


def test_a_saved_lora_merges_to_the_trained_function(tmp_path):
    dit = trained()
    path = save_lora(tmp_path / "run", dit, metadata={"base": "tiny"})
    assert path.name == "pytorch_lora_weights.safetensors"
    assert read_header(path).metadata["base"] == "tiny"
    merged = tiny_dit()
    report = merge_lora(merged, read_lora(path))
    assert "40 tensors" in str(report)
    assert report.ranks == (4,)
    torch.testing.assert_close(run(merged), run(dit), rtol=1e-5, atol=1e-5)


def test_diffusers_loads_a_saved_lora_with_the_same_meaning(tmp_path):
    dit = trained()
    expected = fused_by_diffusers(save_lora(tmp_path / "a.safetensors", dit))
    fold_lora(dit)
    for name, value in state_of(dit).items():
        torch.testing.assert_close(expected[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_the_trained_state_goes_back_into_a_new_model():
    state = lora_state(trained())
    dit = tiny_dit()
    add_lora(dit, rank=4, alpha=6)
    missing, unexpected = dit.load_state_dict(state, strict=False)
    assert not unexpected
    assert not set(missing) & state.keys()
    torch.testing.assert_close(run(dit), run(trained()), rtol=0, atol=0)


def test_a_pair_beside_bfloat16_weights_stays_float32():
    dit = tiny_dit().to(torch.bfloat16)
    add_lora(dit, rank=2)
    assert {value.dtype for value in lora_state(dit).values()} == {torch.float32}
    assert run(dit).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda dit: add_lora(dit, rank=0), "at least 1"),
        (lambda dit: add_lora(dit, rank=2, alpha=float("nan")), "positive"),
        (lambda dit: add_lora(dit, rank=2, targets=["attn1"]), "matches no layer"),
        (lambda dit: add_lora(dit, rank=2, targets=["("]), "not a regular expression"),
        (lambda dit: add_lora(dit, rank=2, targets=["patch_embedding"]), "PatchEmbedding"),
        (lambda dit: (add_lora(dit, rank=2), add_lora(dit, rank=2)), "LoRALinear"),
        (lambda dit: save_lora("x.safetensors", dit), "no LoRA to save"),
    ],
)
def test_wrong_requests_for_training(call: Callable[[WanDiT], object], message):
    with pytest.raises(WanError, match=message):
        call(tiny_dit())


def test_saving_in_bfloat16_halves_the_file(tmp_path):
    path = save_lora(tmp_path / "a.safetensors", trained(), dtype=torch.bfloat16)
    assert {t.dtype for t in map_tensors(read_header(path)).values()} == {torch.bfloat16}

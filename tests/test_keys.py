"""Names of parameters, held against the releases.

golden/released_names.json stores facts: official name, diffusers name and shape of each tensor,
with `#` for a block number. Our side comes from our modules, built at full size on the meta device.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.weights.keys import (
    COMPONENTS,
    LAYOUTS,
    PREFIXES,
    VAELevels,
    detect_layout,
    our_name,
    refuse_foreign,
    released_name,
    table,
)

GOLDEN = json.loads((Path(__file__).parent / "golden/released_names.json").read_text())
WAN21_VAE = VAEConfig(
    96, None, 16, is_residual=False, in_channels=3, out_channels=3, patch_size=None
)
BIG_DIT = DiTConfig(40, num_layers=40, ffn_dim=13824, in_channels=16, out_channels=16)
SMALL_DIT = DiTConfig(12, ffn_dim=8960, in_channels=16, out_channels=16)
MODELS = {
    "ti2v-5b-transformer": ("transformer", None, lambda: WanDiT(DiTConfig())),
    "t2v-1.3b-transformer": ("transformer", None, lambda: WanDiT(SMALL_DIT)),
    "t2v-14b-transformer": ("transformer", None, lambda: WanDiT(BIG_DIT)),
    "ti2v-5b-vae": ("vae", VAELevels(True, 2), lambda: WanVAE(VAEConfig())),
    "wan21-vae": ("vae", VAELevels(False, 2), lambda: WanVAE(WAN21_VAE)),
    "umt5-xxl-encoder": ("text_encoder", None, lambda: UMT5Encoder(UMT5Config())),
}


def released(model: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(official, diffusers, shape) of every tensor of a release."""
    facts = GOLDEN[model]
    rows = []
    for official, diffusers, shape in facts["rows"]:
        for block in range(facts["blocks"]) if "#" in official else (0,):
            names = [name.replace("#", str(block)) for name in (official, diffusers)]
            rows.append((*names, tuple(shape)))
    assert len(rows) == facts["tensors"]
    return rows


@pytest.mark.parametrize("model", MODELS)
def test_full_size_module_has_the_released_names_and_shapes(model):
    component, levels, build = MODELS[model]
    with torch.device("meta"):
        state = build().state_dict()
    rows = released(model)
    for column, layout in ((1, "diffusers"), (0, "official")):
        shapes = {our_name(component, layout, row[column], levels): row[2] for row in rows}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("model", MODELS)
def test_the_map_is_a_bijection_on_every_release(model):
    component, levels, _ = MODELS[model]
    for official, diffusers, _ in released(model):
        ours = our_name(component, "official", official, levels)
        assert ours == our_name(component, "diffusers", diffusers, levels)
        assert released_name(component, "official", ours, levels) == official
        assert released_name(component, "diffusers", ours, levels) == diffusers


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "module._orig_mod.", "model."])
def test_layout_prefix_and_generation_are_detected(model, prefix):
    component, levels, _ = MODELS[model]
    for column, layout in ((1, "diffusers"), (0, "official")):
        names = [prefix + row[column] for row in released(model)]
        random.Random(0).shuffle(names)
        assert detect_layout(component, names) == (layout, prefix, levels)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_counts_only_if_every_name_has_it(prefix):
    names = [row[1] for row in released("ti2v-5b-transformer")]
    assert detect_layout("transformer", [prefix + names[0], *names[1:]]).prefix == ""


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("num_levels", [2, 4])
def test_vae_of_any_depth_has_the_names_diffusers_gives_it(residual, depth, num_levels):
    diffusers = pytest.importorskip("diffusers")
    settings = {
        "base_dim": 4,
        "decoder_base_dim": 4,
        "z_dim": 2,
        "dim_mult": [1, 1] if num_levels == 2 else [1, 2, 2, 2],
        "num_res_blocks": depth,
        "temperal_downsample": [False, True, True][: num_levels - 1],
        "is_residual": residual,
    }
    with torch.device("meta"):
        ours = WanVAE(VAEConfig(**settings, in_channels=3, out_channels=3, patch_size=None))
        theirs = diffusers.AutoencoderKLWan(
            **settings, latents_mean=[0.0] * 2, latents_std=[1.0] * 2
        )
    levels = VAELevels(residual, depth)
    names = {released_name("vae", "diffusers", name, levels) for name in ours.state_dict()}
    assert names == set(theirs.state_dict())
    assert detect_layout("vae", names) == ("diffusers", "", levels)
    official = {released_name("vae", "official", name, levels) for name in ours.state_dict()}
    assert detect_layout("vae", official) == ("official", "", levels)


@pytest.mark.parametrize(
    ("layout", "name", "ours"),
    [
        ("official", "blocks.3.norm3.weight", "blocks.3.cross_norm.weight"),
        ("diffusers", "blocks.3.norm2.weight", "blocks.3.cross_norm.weight"),
        ("official", "blocks.3.norm2.weight", None),
        ("diffusers", "blocks.3.norm3.weight", None),
        ("official", "head.modulation", "head.modulation"),
        ("official", "blocks.0.modulation", "blocks.0.modulation"),
        ("diffusers", "scale_shift_table", "head.modulation"),
        ("diffusers", "blocks.0.scale_shift_table", "blocks.0.modulation"),
        ("official", "modulation", None),
        ("official", "blocks.01.modulation", None),
        ("official", "blocks.#.modulation", None),
        ("official", "xblocks.1.modulation", None),
        ("official", "blocks.1.modulation.weight", None),
        ("official", "blocks.1.blocks.2.modulation", None),
        ("diffusers", "encoder.block.0.scale_shift_table", None),
        ("official", "freqs", None),
    ],
)
def test_whole_names_only(layout, name, ours):
    assert our_name("transformer", layout, name) == ours


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_are_bijections(component, layout):
    names = table(component, layout, VAELevels(False, 2) if component == "vae" else None)
    assert {ours: name for name, ours in names.to_ours.items()} == names.to_released


@pytest.mark.parametrize("component", COMPONENTS)
def test_released_name_refuses_what_is_not_ours(component):
    with pytest.raises(WanError, match=r"nonsense\.weight: not a parameter of our"):
        released_name(component, "diffusers", "nonsense.weight", VAELevels(True, 2))


def test_unknown_component_layout_and_missing_levels_are_refused():
    with pytest.raises(WanError, match="must be one of transformer, vae, text_encoder"):
        our_name("unet", "diffusers", "x")
    with pytest.raises(WanError, match="must be one of diffusers, official"):
        our_name("transformer", "comfy", "x")
    with pytest.raises(WanError, match="pass vae_levels"):
        our_name("vae", "diffusers", "x")


FOREIGN = {
    "a LoRA": [
        "blocks.0.self_attn.q.lora_A.weight",
        "diffusion_model.blocks.0.ffn.0.lora_down.weight",
        "lora_unet_blocks_0_self_attn_q.lora_up.weight",
        "blocks.0.diff_m",
    ],
    "a Wan2.1 image-to-video model": [
        "img_emb.proj.0.weight",
        "condition_embedder.image_embedder.norm1.weight",
        "blocks.0.attn2.add_k_proj.weight",
        "blocks.0.cross_attn.k_img.weight",
    ],
    "a VACE model": ["vace_blocks.0.before_proj.weight", "vace_patch_embedding.weight"],
    "video sparse attention": ["blocks.0.to_gate_compress.weight"],
    "Animate": ["face_adapter.fuser_blocks.0.linear1_kv.weight", "pose_patch_embedding.weight"],
    "speech-to-video": ["audio_injector.injector.0.q.weight"],
    "camera- or control": ["control_adapter.conv.weight"],
    "quantised": ["blocks.0.self_attn.q.qweight", "blocks.0.ffn.0.weight_scale_2"],
    "whole pipeline": ["first_stage_model.encoder.conv1.weight"],
    "training state": ["optimizer.state.0.exp_avg"],
}


@pytest.mark.parametrize(("kind", "name"), [(k, n) for k, names in FOREIGN.items() for n in names])
def test_checkpoints_of_another_kind_are_named(kind, name):
    base = [row[0] for row in released("t2v-1.3b-transformer")]
    with pytest.raises(WanError) as caught:
        detect_layout("transformer", [*base, name])
    assert kind in str(caught.value)
    assert name in str(caught.value)


def test_text_encoders_of_another_kind_are_named():
    names = [row[1] for row in released("umt5-xxl-encoder")]
    with pytest.raises(WanError, match="a T5 with its decoder"):
        refuse_foreign("text_encoder", [*names, "decoder.block.0.layer.0.SelfAttention.q.weight"])
    with pytest.raises(WanError, match="a CLIP model"):
        detect_layout("text_encoder", ["text_model.encoder.layers.0.mlp.fc1.weight"])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [0, 1])
def test_no_release_is_taken_for_foreign_or_for_another_component(model, layout):
    names = [row[layout] for row in released(model)]
    component = MODELS[model][0]
    refuse_foreign(component, names)
    for other in COMPONENTS:
        if other != component:
            with pytest.raises(WanError, match=f"the names are those of a {component}"):
                detect_layout(other, names)


def test_unrelated_and_empty_checkpoints_are_refused():
    with pytest.raises(WanError, match=r"no name is one of Wan's \(double_blocks\.0\.img_mlp"):
        detect_layout("transformer", ["double_blocks.0.img_mlp.0.weight"])
    with pytest.raises(WanError, match="no tensors at all"):
        detect_layout("vae", [])

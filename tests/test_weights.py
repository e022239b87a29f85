"""Loading is strict both ways and converts what it should, nothing else; saving loses no bit."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from torch import nn

import wan.weights.tensor_reader
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.pipeline import WanPipeline
from wan.weights.checkpoint import open_checkpoint
from wan.weights.keys import PREFIXES, VAELevels, released_name
from wan.weights.load import load_module, load_state
from wan.weights.names import census_line, dtype_census, grouped
from wan.weights.safetensors_file import map_tensors, read_header, write_tensors
from wan.weights.save import save_component

DIT = DiTConfig(2, 16, 3, 48, in_channels=4, out_channels=4, text_dim=24, freq_dim=16)
UMT5 = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)


def vae_config(residual: bool) -> VAEConfig:
    return VAEConfig(
        base_dim=4,
        decoder_base_dim=8 if residual else None,
        z_dim=3 if residual else 2,
        dim_mult=(1, 2, 2),
        num_res_blocks=1,
        temperal_downsample=(False, True),
        is_residual=residual,
        in_channels=3,
        out_channels=3,
        patch_size=None,
    )


BUILD = {
    "dit": lambda: WanDiT(DIT),
    "umt5": lambda: UMT5Encoder(UMT5),
    "vae21": lambda: WanVAE(vae_config(False)),
    "vae22": lambda: WanVAE(vae_config(True)),
}
COMPONENT = {"dit": "transformer", "umt5": "text_encoder", "vae21": "vae", "vae22": "vae"}
LEVELS = {"dit": None, "umt5": None, "vae21": VAELevels(False, 1), "vae22": VAELevels(True, 1)}


def random_state(model: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in BUILD[model]().state_dict().items()}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def save(model: str, folder: Path, layout: str = "diffusers", dtype=torch.float32, **options):
    state = random_state(model, dtype)
    save_component(state, folder, COMPONENT[model], layout, vae_levels=LEVELS[model], **options)
    return state


def load(model: str, path: Path, **options) -> nn.Module:
    return load_module(BUILD[model], open_checkpoint(path), COMPONENT[model], **options)


def rewrite(path: Path, change) -> None:
    """Apply `change` to the dict of a one-file checkpoint's tensors."""
    (file,) = path.glob("*.safetensors")
    tensors = {name: t.clone() for name, t in map_tensors(read_header(file)).items()}
    write_tensors(file, change(tensors) or tensors)


def refused(model: str, path: Path, **options) -> str:
    with pytest.raises(WanError) as caught:
        load(model, path, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("model", BUILD)
@pytest.mark.parametrize("layout", ["diffusers", "official"])
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_round_trip_changes_no_bit(tmp_path, model, layout, shard_bytes):
    state = save(model, tmp_path, layout, max_shard_bytes=shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard_bytes < 10**9
    loaded = load(model, tmp_path)
    assert not any(p.is_meta for p in loaded.parameters())
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])
    raw = load_state(open_checkpoint(tmp_path), COMPONENT[model])
    assert set(raw) == set(state)
    other = {"diffusers": "official", "official": "diffusers"}[layout]
    for folder, target in (("there", other), ("back", layout)):
        options = {"vae_levels": LEVELS[model], "max_shard_bytes": shard_bytes}
        save_component(raw, tmp_path / folder, COMPONENT[model], target, **options)
        raw = load_state(open_checkpoint(tmp_path / folder), COMPONENT[model])
        assert all(torch.equal(raw[name], state[name]) for name in state)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixed_single_files_load(tmp_path, prefix):
    state = save("dit", tmp_path, "official")
    rewrite(tmp_path, lambda tensors: {prefix + name: t for name, t in tensors.items()})
    assert torch.equal(load("dit", tmp_path).head.proj.weight, state["head.proj.weight"])


def test_the_released_file_names(tmp_path):
    save("dit", tmp_path / "a", max_shard_bytes=60_000)
    names = sorted(f.name for f in (tmp_path / "a").iterdir())
    count = len(names) - 1
    assert names[0] == f"diffusion_pytorch_model-00001-of-{count:05d}.safetensors"
    assert names[-1] == "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads((tmp_path / "a" / names[-1]).read_text())
    assert set(index["weight_map"].values()) == set(names[:-1])
    save("umt5", tmp_path / "b")
    assert [f.name for f in (tmp_path / "b").iterdir()] == ["model.safetensors"]
    save("vae21", tmp_path / "c", "official")
    assert [f.name for f in (tmp_path / "c").iterdir()] == ["Wan2.1_VAE.safetensors"]


def test_saving_with_a_prefix_and_in_other_dtypes(tmp_path):
    state = random_state("dit")
    dtypes = {name: torch.bfloat16 if "ffn" in name else torch.float32 for name in state}
    options = {"prefix": "model.diffusion_model.", "dtypes": dtypes, "max_shard_bytes": 30_000}
    files = save_component(state, tmp_path, "transformer", "official", **options)
    assert all(file.stat().st_size < 34_000 for file in files)
    checkpoint = open_checkpoint(tmp_path)
    assert all(name.startswith("model.diffusion_model.") for name in checkpoint.tensors)
    for name, tensor in load_state(checkpoint, "transformer").items():
        assert tensor.dtype == dtypes[name]
        assert torch.equal(tensor, state[name].to(dtypes[name]))


def test_saving_refuses_a_folder_with_weights_foreign_names_and_a_full_disk(tmp_path, monkeypatch):
    save("dit", tmp_path)
    with pytest.raises(WanError, match=r"already holds diffusion_pytorch_model\.safetensors"):
        save("dit", tmp_path)
    with pytest.raises(WanError, match=r"x\.weight: not a parameter of our transformer"):
        save_component({"x.weight": torch.zeros(1)}, tmp_path / "b", "transformer")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("wan.weights.save.shutil.disk_usage", lambda _: usage)
    with pytest.raises(WanError, match=r"GB to write, 0\.00 GB free"):
        save("dit", tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(WanError, match=r"file/d: can't be written: Not a directory"):
        save("dit", tmp_path / "file" / "d")


# --- dtypes, sharing, threads ---------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, None]
)
def test_weights_arrive_in_the_asked_dtype_and_the_declared_ones_in_float32(
    tmp_path, monkeypatch, share, stored, dtype
):
    monkeypatch.setattr(
        wan.weights.tensor_reader, "CHUNK_BYTES", 1 << 10
    )  # most tensors take many chunks
    state = save("dit", tmp_path, dtype=stored)
    module = load("dit", tmp_path, dtype=dtype, threads=3, share_mapping=share)
    wide = 0
    for name, tensor in module.state_dict().items():
        expected = stored if dtype is None else dtype
        if expected.itemsize == 2 and any(p in name for p in WanDiT.FLOAT32_PARAMETERS):
            expected = torch.float32
            wide += 1
        assert tensor.dtype == expected
        assert torch.equal(tensor, state[name].to(expected))
    assert (wide > 0) == ((stored if dtype is None else dtype).itemsize == 2)


def test_unconverted_weights_share_the_mapping_and_converted_ones_do_not(tmp_path):
    save("umt5", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    shared = load("umt5", tmp_path)
    assert str(file) in mapped_files()
    before = file.read_bytes()
    with torch.no_grad():
        shared.final_norm.weight.zero_()
    assert file.read_bytes() == before
    del shared
    assert str(file) not in mapped_files()
    own = load("umt5", tmp_path, dtype=torch.bfloat16)
    read = load("umt5", tmp_path, share_mapping=False)
    assert str(file) not in mapped_files()
    del own, read


def mapped_files() -> str:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    return maps.read_text()


def test_weights_do_not_depend_on_the_number_of_threads(tmp_path):
    save("vae22", tmp_path, max_shard_bytes=5_000)
    one, many = (load("vae22", tmp_path, dtype=torch.bfloat16, threads=n) for n in (1, 5))
    for (name, a), b in zip(one.state_dict().items(), many.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_loaded_module_runs(tmp_path):
    state = save("dit", tmp_path)
    module = load("dit", tmp_path)
    plain = WanDiT(DIT)
    plain.load_state_dict(state)
    x, t, context = torch.randn(1, 4, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 24)
    with torch.no_grad():
        assert torch.equal(module(x, t, context), plain(x, t, context))


def test_census():
    module = nn.Sequential(nn.Linear(10, 100, bias=False), nn.Linear(3, 1, bias=False).bfloat16())
    assert dtype_census(module) == {torch.float32: 1000, torch.bfloat16: 3}
    assert census_line(module) == "1.00 k parameters, 0.0 MiB: 1.00 k float32, 3 bfloat16"
    with torch.device("meta"):
        big = nn.Linear(50_000, 99_996, bias=False)
    assert census_line(big) == "5.00 B parameters, 18.63 GiB: 5.00 B float32"


# --- what doesn't fit -----------------------------------------------------------------------------


def test_any_missing_and_unexpected_names_are_all_reported(tmp_path):
    save("dit", tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    names = sorted(read_header(file).tensors)
    whole = {name: t.clone() for name, t in map_tensors(read_header(file)).items()}
    rng = random.Random(0)
    for _ in range(12):
        gone = rng.sample(names, rng.randint(0, 4))
        added = [f"extra_{rng.randrange(99)}.weight" for _ in range(rng.randint(0, 3))]
        kept = {name: t for name, t in whole.items() if name not in gone}
        write_tensors(file, kept | {name: torch.zeros(2) for name in added})
        if not gone and not added:
            load("dit", tmp_path)
            continue
        message = refused("dit", tmp_path)
        for name in [*gone, *added]:
            assert name in message or "blocks.{" in message
        assert f"{len(gone)} missing: " in message or not gone
        assert f"{len(set(added))} unexpected: " in message or not added


def test_missing_block_tensors_are_grouped(tmp_path):
    save("dit", tmp_path, "official")
    rewrite(tmp_path, lambda ts: {n: t for n, t in ts.items() if ".norm3.weight" not in n})
    assert "3 missing: blocks.{0..2}.norm3.weight (3). Weights and" in refused("dit", tmp_path)
    assert grouped([f"blocks.{i}.x" for i in (0, 1, 2, 5, 9, 10)]) == "blocks.{0..2,5,9..10}.x (6)"
    assert grouped(["a.1.b.0", "a.2.b.0", "a.1.b.1"]) == "a.{1..2}.b.0 (2), a.1.b.1"
    assert grouped(["a", "b", "c"], limit=2) == "a, b, and 1 more kinds"


def test_transposed_and_otherwise_shaped_tensors_are_reported(tmp_path):
    save("dit", tmp_path)
    name = "blocks.1.ffn.net.0.proj.weight"
    rewrite(tmp_path, lambda tensors: tensors | {name: tensors[name].t().contiguous()})
    assert f"1 of another shape: {name} (32, 48) for (48, 32)" in refused("dit", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.tensor(1.0)})
    assert f"{name} () for (48, 32)" in refused("dit", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.zeros(0, 32)})
    assert f"{name} (0, 32) for (48, 32)" in refused("dit", tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_dtypes_that_hold_no_plain_weights_are_reported(tmp_path, dtype):
    save("dit", tmp_path)
    name = "blocks.1.ffn.net.2.bias"
    rewrite(tmp_path, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    message = refused("dit", tmp_path)
    assert f"no plain weights: {name} {str(dtype).removeprefix('torch.')}" in message
    assert "Use the float32, bfloat16 or float16 weights" in message
    assert "same release" not in message


def test_weights_of_another_model_are_told_apart_from_the_config(tmp_path):
    save("dit", tmp_path)
    wider = DiTConfig(4, 16, 5, 48, in_channels=8, out_channels=4, text_dim=24, freq_dim=16)
    with pytest.raises(WanError) as caught:
        load_module(lambda: WanDiT(wider), open_checkpoint(tmp_path), "transformer")
    assert "holds a DiT of width 32 with 3 blocks and 4 input channels, but" in str(caught.value)
    assert "a DiT of width 64 with 5 blocks and 8 input channels" in str(caught.value)


def test_a_vae_of_the_other_generation_is_told_apart(tmp_path):
    for stored, wanted in itertools.permutations(("vae21", "vae22")):
        save(stored, tmp_path / stored)
        message = refused(wanted, tmp_path / stored)
        z = {"vae21": 2, "vae22": 3}
        assert f"holds a VAE of width 4 with {z[stored]} latent channels, but" in message


def test_one_component_given_as_another_and_a_lora_given_as_base(tmp_path):
    save("umt5", tmp_path / "t")
    message = refused("dit", tmp_path / "t")
    assert "not a transformer checkpoint: the names are those of a text_encoder" in message
    (tmp_path / "lora").mkdir()
    lora = {"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 32)}
    write_tensors(tmp_path / "lora" / "pytorch_lora_weights.safetensors", lora)
    assert "this is a LoRA" in refused("dit", tmp_path / "lora")
    (tmp_path / "none").mkdir()
    write_tensors(tmp_path / "none" / "model.safetensors", {})
    assert "no tensors at all" in refused("umt5", tmp_path / "none")


def test_diffusers_and_official_names_in_one_file_are_refused(tmp_path):
    save("dit", tmp_path)

    def mix(tensors):
        tensors["blocks.0.self_attn.q.bias"] = tensors.pop("blocks.0.attn1.to_q.bias")

    rewrite(tmp_path, mix)
    message = refused("dit", tmp_path)
    assert "1 missing: blocks.0.attn1.to_q.bias" in message
    assert "1 unexpected: blocks.0.self_attn.q.bias" in message


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 700, -1])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(
    tmp_path, monkeypatch, value, dtype, at
):
    monkeypatch.setattr(wan.weights.tensor_reader, "CHUNK_BYTES", 1 << 10)
    save("dit", tmp_path)
    name = "blocks.2.ffn.net.0.proj.weight"

    def damage(tensors):
        tensors[name].view(-1)[at] = value

    rewrite(tmp_path, damage)
    for share in (True, False):
        assert f"tensor {name} is not finite" in refused(
            "dit", tmp_path, dtype=dtype, share_mapping=share
        )
    load("dit", tmp_path, dtype=dtype, check_finite=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, "float64"], ids=str)
def test_a_pipeline_is_float32_or_bfloat16(dtype):
    message = f"dtype={dtype}: choose torch.bfloat16 or torch.float32"
    with pytest.raises(WanError, match=message):
        WanPipeline.from_pretrained("builtin:miniature", dtype=dtype)


def test_values_too_large_for_float16_are_refused_not_made_infinite(tmp_path):
    save("dit", tmp_path)

    def grow(tensors):
        tensors["proj_out.weight"][0, 0] = 1e6
        tensors["blocks.0.ffn.net.2.weight"][0, 0] = 1e6

    rewrite(tmp_path, grow)
    message = refused("dit", tmp_path, dtype=torch.float16)  # proj_out stays float32
    assert "tensor blocks.0.ffn.net.2.weight is not finite" in message
    assert "load as bfloat16" in message
    load("dit", tmp_path, dtype=torch.bfloat16)


def zero_from(path: Path, share: float, length: int | None = None) -> None:
    """Make holes of the bytes of a file, as a download leaves them that did not finish."""
    (file,) = path.glob("*.safetensors")
    start = int(share * file.stat().st_size)
    count = file.stat().st_size - start if length is None else length
    with file.open("r+b") as content:
        content.seek(start)
        content.write(bytes(count))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("model", BUILD)
@pytest.mark.parametrize("check_finite", [True, False])
def test_a_file_whose_end_was_never_written_is_refused(tmp_path, model, share, check_finite):
    save(model, tmp_path)
    load(model, tmp_path)
    zero_from(tmp_path, share)
    assert "ends in zeros" in refused(model, tmp_path, check_finite=check_finite)


def test_zero_matrices_are_named_and_may_be_a_new_networks(tmp_path, recwarn):
    save("dit", tmp_path)
    load("dit", tmp_path)
    assert not recwarn
    last = max(read_header(next(tmp_path.glob("*.safetensors"))).tensors.items(), key=at_end)[0]
    names = ("blocks.1.ffn.net.2.weight", last)
    rewrite(tmp_path, lambda ts: {n: t.zero_() if n in names else t for n, t in ts.items()})
    with pytest.warns(UserWarning, match=r"blocks\.1\.ffn\.net\.2\.weight") as caught:
        load("dit", tmp_path)
    assert all(name in str(caught[0].message) for name in names)


def at_end(item):
    return item[1].end if len(item[1].shape) > 1 else 0


def test_a_hole_in_a_matrix_is_named(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(wan.weights.tensor_reader, "CHUNK_BYTES", 1 << 10)
    save("dit", tmp_path)
    load("dit", tmp_path)
    assert not recwarn
    zero_from(tmp_path, 0.5, 3 << 10)
    with pytest.warns(UserWarning, match=r"only zeros, in all or in .* MB on end of .*weight"):
        load("dit", tmp_path)


def test_biases_norms_and_unused_rows_of_a_table_may_be_zero(tmp_path, recwarn):
    save("umt5", tmp_path)

    def change(tensors):
        for tensor in tensors.values():
            if tensor.ndim == 1:
                tensor.zero_()
        tensors["shared.weight"].view(-1)[-tensors["shared.weight"].numel() // 100 :] = 0

    rewrite(tmp_path, change)
    load("umt5", tmp_path)
    assert not recwarn


def test_of_two_stored_embeddings_the_one_that_the_encoder_reads_is_taken(tmp_path, recwarn):
    """transformers 5.0 saves both names; see `test_umt5.py` for what it reads of such a file."""
    state = save("umt5", tmp_path)
    value = state["token_embedding.weight"]
    first, second = "shared.weight", "encoder.embed_tokens.weight"
    rewrite(tmp_path, lambda tensors: tensors | {second: tensors[first]})
    assert torch.equal(load("umt5", tmp_path).token_embedding.weight, value)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != first})
    assert torch.equal(load("umt5", tmp_path).token_embedding.weight, value)
    rewrite(tmp_path, lambda tensors: tensors | {first: tensors[second].double()})
    assert torch.equal(load("umt5", tmp_path).token_embedding.weight, value)
    assert not recwarn
    rewrite(tmp_path, lambda tensors: tensors | {first: tensors[second] + 1})
    with pytest.warns(UserWarning, match=f"{second} and {first} differ; {second} is taken"):
        loaded = load("umt5", tmp_path)
    assert torch.equal(loaded.token_embedding.weight, value)


def test_wrappers_around_single_blocks_are_taken_off(tmp_path):
    state = save("dit", tmp_path)
    wrapped = "blocks.{}._orig_mod._checkpoint_wrapped_module.{}".format

    def wrap(tensors):
        parts = {n: n.split(".", 2) for n in tensors}
        return {
            "module." + (wrapped(*parts[n][1:]) if n.startswith("blocks.") else n): t
            for n, t in tensors.items()
        }

    rewrite(tmp_path, wrap)
    assert all(torch.equal(t, state[n]) for n, t in load("dit", tmp_path).state_dict().items())
    twin = "module.blocks.0.attn1.to_q.bias"
    rewrite(tmp_path, lambda tensors: tensors | {twin: torch.zeros(32)})
    assert f"1 unexpected: {twin}" in refused("dit", tmp_path)


def test_every_released_name_of_a_module_is_reported_when_all_are_missing_but_one(tmp_path):
    state = random_state("umt5")
    name = released_name("text_encoder", "diffusers", "final_norm.weight")
    write_tensors(tmp_path / "model.safetensors", {name: state["final_norm.weight"]})
    assert f"{len(state) - 1} missing: " in refused("umt5", tmp_path)

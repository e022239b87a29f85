"""infer.convert: there and back without a changed bit, the configs, whole releases, refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.cli import execute
from configs.command_line import CommandLine
from configs.conversion import ConvertConfig
from infer.convert.releases import official_transformer_config
from infer.convert.run import convert as main
from infer.parity.models import write_part
from wan.errors import WanError
from wan.files import write_json
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.umt5 import UMT5Config, UMT5Encoder
from wan.models.vae import VAEConfig, WanVAE
from wan.pipeline.config import read_pipeline_config
from wan.pipeline.known_models import VAE_CONFIGS, config_of_shapes
from wan.pipeline.layouts import official_pipeline
from wan.sampling.scheduler_config import SchedulerSettings
from wan.weights.checkpoint import open_checkpoint
from wan.weights.load import load_state
from wan.weights.safetensors_file import write_tensors
from wan.weights.save import save_component

DIT = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=3,
    ffn_dim=40,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=8,
)
TINY_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "temperal_downsample": (False, True),
    "latents_mean": (0.5,) * 4,
    "latents_std": (2.0,) * 4,
}
VAES = {
    "2.2": VAEConfig(**TINY_VAE, decoder_base_dim=6),
    "2.1": VAEConfig(
        **TINY_VAE,
        decoder_base_dim=None,
        is_residual=False,
        in_channels=3,
        out_channels=3,
        patch_size=None,
    ),
}
ENCODER = UMT5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)


def random_state(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random bits for every parameter: half of them bfloat16, as releases mix dtypes."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for number, (name, value) in enumerate(module.state_dict().items()):
        random = torch.randn(value.shape, generator=generator)
        state[name] = random.to(torch.bfloat16) if number % 2 else random
    return state


def save_transformer(folder: Path, seed: int = 0) -> dict[str, Tensor]:
    state = random_state(WanDiT(DIT), seed)
    write_part(state, DIT, folder, "transformer", max_shard_bytes=30_000)
    return state


def save_vae(folder: Path, generation: str) -> dict[str, Tensor]:
    state = random_state(WanVAE(VAES[generation]))
    write_part(state, VAES[generation], folder, "vae")
    return state


def save_encoder(folder: Path) -> dict[str, Tensor]:
    state = random_state(UMT5Encoder(ENCODER))
    write_part(state, ENCODER, folder, "text_encoder")
    return state


SAVE = {
    "transformer": save_transformer,
    "vae 2.1": lambda folder: save_vae(folder, "2.1"),
    "vae 2.2": lambda folder: save_vae(folder, "2.2"),
    "text_encoder": save_encoder,
}


def convert(source: Path, output: Path, layout: str, **options) -> Path:
    main(ConvertConfig(str(source), str(output), layout, **options))
    return output


def assert_same(state: dict[str, Tensor], folder: Path, component: str) -> None:
    found = load_state(open_checkpoint(folder), component)
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", SAVE)
def test_there_and_back_changes_no_byte(tmp_path, kind):
    state = SAVE[kind](tmp_path / "first")
    options = {"shard_gb": 3e-5} if kind == "transformer" else {}
    convert(tmp_path / "first", tmp_path / "official", "official", **options)
    assert_same(state, tmp_path / "official", kind.split()[0])
    back = convert(tmp_path / "official", tmp_path / "back", "diffusers", **options)
    assert_same(state, back, kind.split()[0])
    first, second = contents(tmp_path / "first"), contents(back)
    configs = [json.loads(files.pop("config.json")) for files in (first, second)]
    assert first == second
    assert configs[0] == configs[1]


def test_the_names_change(tmp_path):
    save_transformer(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "official", "official")
    convert(tmp_path / "official", tmp_path / "prefixed", "prefixed")
    official = open_checkpoint(tmp_path / "official").tensors
    assert "blocks.2.norm3.weight" in official
    prefixed = open_checkpoint(tmp_path / "prefixed").tensors
    assert set(prefixed) == {f"model.diffusion_model.{name}" for name in official}


def test_a_prefixed_file_alone_converts_back(tmp_path):
    state = save_transformer(tmp_path / "first")
    prefixed = convert(tmp_path / "first", tmp_path / "prefixed", "prefixed")
    (file,) = prefixed.glob("*.safetensors")
    alone = tmp_path / "alone.safetensors"
    file.rename(alone)
    back = convert(alone, tmp_path / "back", "diffusers")
    assert_same(state, back, "transformer")
    assert json.loads((back / "config.json").read_text()) == DIT.to_json()


def test_the_official_config_has_the_official_fields(tmp_path):
    save_transformer(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "official", "official")
    values = json.loads((tmp_path / "official" / "config.json").read_text())
    assert values["_class_name"] == "WanModel"
    assert (values["dim"], values["num_heads"], values["text_dim"]) == (24, 2, 16)
    assert DiTConfig.from_json(values) == DIT
    # The released one, field by field: Wan2.2-TI2V-5B, config.json.
    assert official_transformer_config(DiTConfig(), "ti2v") == {
        "_class_name": "WanModel",
        "model_type": "ti2v",
        "dim": 3072,
        "eps": 1e-06,
        "ffn_dim": 14336,
        "freq_dim": 256,
        "in_dim": 48,
        "num_heads": 24,
        "num_layers": 30,
        "out_dim": 48,
        "text_len": 512,
    }


@pytest.mark.parametrize("config", VAE_CONFIGS, ids=["2.1", "2.2"])
def test_a_released_vae_needs_no_config(config):
    with torch.device("meta"):
        shapes = {
            n: tuple(t.shape) for n, t in WanVAE(VAEConfig.from_json(config)).named_parameters()
        }
    assert config_of_shapes("vae", shapes) == config
    assert len(config["latents_mean"]) == len(config["latents_std"]) == config["z_dim"]


def test_a_released_transformer_needs_no_config():
    config = DiTConfig(12, 128, 30, 8960, 16, 16)
    with torch.device("meta"):
        shapes = {n: tuple(t.shape) for n, t in WanDiT(config).named_parameters()}
    assert config_of_shapes("transformer", shapes) == config.to_json()


def test_dtype_converts_all_but_the_float32_parameters(tmp_path):
    state = save_transformer(tmp_path / "first")
    output = convert(tmp_path / "first", tmp_path / "out", "official", dtype="bfloat16")
    found = load_state(open_checkpoint(output), "transformer")
    query, table = "blocks.0.self_attention.query.weight", "blocks.0.modulation"
    assert found[query].dtype == torch.bfloat16
    assert found[table].dtype == torch.float32
    for name, value in found.items():
        assert torch.equal(value, state[name].to(value.dtype)), name


def test_round_all_converts_the_float32_parameters_too(tmp_path):
    state = save_transformer(tmp_path / "first")
    rounded = {"dtype": "bfloat16", "round_all": True}
    output = convert(tmp_path / "first", tmp_path / "out", "official", **rounded)
    for name, value in load_state(open_checkpoint(output), "transformer").items():
        assert torch.equal(value, state[name].bfloat16()), name


# --- whole releases -------------------------------------------------------------------------------


def save_release(folder: Path, experts: int = 1, per_token: bool = True) -> None:
    names = ["transformer", "transformer_2"][:experts]
    for seed, name in enumerate(names):
        save_transformer(folder / name, seed)
    save_vae(folder / "vae", "2.2")
    save_encoder(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"pieces")
    index = {"_class_name": "WanPipeline", "expand_timesteps": per_token}
    index |= {name: ["diffusers", "WanTransformer3DModel"] for name in names}
    if experts == 1:
        index["transformer_2"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))


def test_text_to_video_of_wan21_has_shift_5(tmp_path):
    """The official code takes 3 for image to video at 480p only."""
    configs = {
        "transformer": DiTConfig(in_channels=16, out_channels=16).to_json(),
        "vae": VAE_CONFIGS[0],
        "text_encoder": UMT5Config().to_json(),
    }
    config = official_pipeline(configs, num_experts=1, folder=tmp_path)
    assert config.scheduler == SchedulerSettings(shift=5.0)


@pytest.mark.parametrize(("experts", "per_token"), [(1, True), (2, False)])
def test_a_release_goes_there_and_back(tmp_path, experts, per_token):
    save_release(tmp_path / "first", experts, per_token)
    official = convert(tmp_path / "first", tmp_path / "official", "official")
    assert (official / "google" / "umt5-xxl" / "spiece.model").read_bytes() == b"pieces"
    assert (official / "low_noise_model").is_dir() == (experts == 2)
    back = convert(official, tmp_path / "back", "diffusers")
    for name in ["transformer", "transformer_2"][:experts]:
        state = random_state(WanDiT(DIT), seed=int(name.endswith("2")))
        assert_same(state, back / name, "transformer")
    assert_same(random_state(WanVAE(VAES["2.2"])), back / "vae", "vae")
    assert_same(random_state(UMT5Encoder(ENCODER)), back / "text_encoder", "text_encoder")
    index = json.loads((back / "model_index.json").read_text())
    assert index["expand_timesteps"] is per_token
    assert index["boundary_ratio"] == (0.875 if experts == 2 else None)
    assert (index["transformer_2"][0] is None) == (experts == 1)
    settings = read_pipeline_config(back)
    assert settings.shift == (5.0 if per_token else 12.0)
    assert settings.components == tuple(["transformer", "transformer_2"][:experts]) + (
        "vae",
        "text_encoder",
    )


def test_a_converted_release_loads_in_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_release(tmp_path / "first")
    convert(tmp_path / "first", tmp_path / "official", "official")
    back = convert(tmp_path / "official", tmp_path / "back", "diffusers")
    for name, builder in (
        ("transformer", diffusers.WanTransformer3DModel),
        ("vae", diffusers.AutoencoderKLWan),
    ):
        model, info = builder.from_pretrained(back / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert sum(p.numel() for p in model.parameters()) > 0
    scheduler = diffusers.UniPCMultistepScheduler.from_pretrained(back / "scheduler")
    assert scheduler.config.flow_shift == 5.0


def test_a_release_with_pickles_says_how_to_convert_them(tmp_path):
    save_release(tmp_path / "first")
    official = convert(tmp_path / "first", tmp_path / "official", "official")
    (official / "Wan2.2_VAE.safetensors").rename(official / "Wan2.2_VAE.pth")
    with pytest.raises(WanError, match=r"Wan2.2_VAE\.pth.*weights_only=True"):
        convert(official, tmp_path / "back", "diffusers")
    assert not (tmp_path / "back").exists()


# --- refusals -------------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    line = CommandLine(ConvertConfig, "convert", (), path_keys=("source", "output", "config"))
    return execute(lambda run: main(run.config), line, "", list(arguments))


def test_shipped_models_go_by_the_names_of_other_commands(tmp_path):
    assert run("source=mini", f"output={tmp_path / 'out'}", "layout=official") == 0
    assert (tmp_path / "out" / "Wan2.2_VAE.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "source= is missing"),
        (["source=first", "output=out", "layout=comfy"], "layout=comfy: choose one of diffusers"),
        (["source=first", "output=out", "layout=official", "dtype=int8"], "dtype=int8"),
        (["source=first", "output=out", "layout=official", "shard_gb=0"], "shard_gb=0"),
        (["source=first", "output=out", "layout=official", "device=cuda"], "only with base="),
        (["source=a", "base=b", "output=c", "rank=1", "shard_gb=2"], "not for a LoRA"),
        (["source=nowhere", "output=out", "layout=official"], "source=nowhere: no such file"),
        (
            ["source=mini", "base=nowhere", "output=a.safetensors", "rank=1"],
            "base=nowhere: no such",
        ),
        (["source=first", "output=full", "layout=official"], "not empty"),
        (["source=first", "output=file", "layout=official"], "not empty"),
        (["source=full", "output=out", "layout=official"], "no .safetensors file here"),
        (["source=vae", "output=out", "layout=prefixed"], "for transformers"),
        (
            ["source=first", "output=out", "layout=official", "config=vae/config.json"],
            "not a trans",
        ),
        (["source=bare", "output=out", "layout=official"], "give its settings as config=FILE"),
        (["source=short", "output=out", "layout=official"], "missing"),
        (["source=lora.safetensors", "output=out", "layout=official"], "a LoRA"),
        (["sorce=first", "output=out"], "did you mean source"),
    ],
)
def test_bad_requests_end_in_one_line_and_leave_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    state = save_transformer(Path("first"))
    save_vae(Path("vae"), "2.2")
    save_component(state, "bare", "transformer")
    save_component({n: t for n, t in state.items() if "ffn" not in n}, "short", "transformer")
    write_json(Path("short/config.json"), DIT.to_json())
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    Path("file").write_text("mine")
    name = "blocks.0.attn1.to_q.lora_A.weight"
    write_tensors(Path("lora.safetensors"), {name: torch.zeros(2, 2)})
    before = contents(tmp_path)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert contents(tmp_path) == before
    assert not any(path.name.endswith(".part") for path in tmp_path.iterdir())


def test_the_command_runs_and_an_empty_output_folder_is_used(tmp_path):
    save_vae(tmp_path / "first", "2.1")
    (tmp_path / "out, (1)").mkdir()
    command = [sys.executable, "-m", "infer.convert", f"source={tmp_path / 'first'}"]
    command += [f"output={tmp_path / 'out, (1)'}", "layout=official"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "vae: diffusers -> official" in done.stdout
    assert [p.name for p in (tmp_path / "out, (1)").iterdir()] == ["Wan2.1_VAE.safetensors"]

"""Folders as people have them: other classes, variants, the official layout and ComfyUI's."""

import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.cli import execute
from configs.command_line import CommandLine
from configs.conversion import ConvertConfig
from configs.evaluation import EvaluateConfig
from infer.convert.__main__ import LINE
from infer.convert.run import convert
from infer.evaluate.measure import draw_examples
from infer.evaluate.sources import reconstruct_truth
from infer.loading import digests_of
from wan.errors import WanError
from wan.files import read_json, write_json
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import UMT5Config
from wan.models.vae_config import VAE_2_1
from wan.pipeline.config import model_files, read_index, read_pipeline_config
from wan.pipeline.folder import ModelFolder
from wan.pipeline.known_models import (
    VAE_2_2,
    component_of,
    config_of_shapes,
    known_config,
    shapes_with,
)
from wan.pipeline.layouts import find_parts
from wan.pipeline.pipeline import PIPELINES, WanPipeline
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import sha256_file
from wan.weights.hub import STUDENT, TEACHER
from wan.weights.load import stored_tokenizer
from wan.weights.save import save_component

SPIECE = STUDENT / "tokenizer" / "spiece.model"
PROMPTS = ("a red circle", "zwei blaue Sterne, ünïcode", "")


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """The teacher in the official layout."""
    folder = tmp_path_factory.mktemp("models") / "official"
    convert(ConvertConfig(str(TEACHER), str(folder), "official"))
    return folder


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory, official) -> Path:
    """The teacher as ComfyUI's models folder, with the tokenizer in the text encoder."""
    folder = tmp_path_factory.mktemp("comfyui")
    places = {
        "diffusion_models/wan2.2_ti2v_5B_fp16": "diffusion_pytorch_model",
        "vae/wan2.2_vae": "Wan2.2_VAE",
        "text_encoders/umt5_xxl_fp16": "models_t5",
    }
    for name, stem in places.items():
        (file,) = official.glob(f"{stem}*.safetensors")
        tensors = load_file(file)
        if stem == "models_t5":
            spiece = bytearray(SPIECE.read_bytes())
            tensors["spiece_model"] = torch.frombuffer(spiece, dtype=torch.uint8)
        (folder / name).parent.mkdir()
        save_file(tensors, folder / f"{name}.safetensors")  # without our metadata
    return folder


@pytest.fixture(scope="module")
def teacher() -> WanPipeline:
    return WanPipeline.from_pretrained(TEACHER, dtype=torch.float32)


def assert_same(pipeline: WanPipeline, other: WanPipeline) -> None:
    """Both have the same weights and settings, the sampling defaults of the folder aside."""
    for part, module in pipeline.modules.items():
        theirs = other.modules[part].state_dict()
        assert all(torch.equal(t, theirs[name]) for name, t in module.state_dict().items())
    for name in ("transformer", "vae", "text_encoder", "expand_timesteps", "boundary_ratio"):
        assert getattr(pipeline.config, name) == getattr(other.config, name), name
    for prompt in PROMPTS:
        assert pipeline.tokenizer(prompt) == other.tokenizer(prompt)


# --- model_index.json -----------------------------------------------------------------------------


def with_index(tmp_path: Path, **entries: object) -> Path:
    """A model_index.json of the teacher with other entries; its networks stay where they are."""
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder, dirs_exist_ok=True)
    write_json(folder / "model_index.json", read_json(TEACHER / "model_index.json") | entries)
    shared = {part: str(STUDENT / part) for part in ("vae", "text_encoder", "tokenizer")}
    write_json(folder / "shared_parts.json", shared)
    return folder


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("WanImageToVideoPipeline", "WanPipeline"),
        ("WanVideoToVideoPipeline", "WanPipeline"),
        ("AggressiveWanUnloadPipeline", "WanPipeline"),
        ("WanImageToVideoDmdPipeline", "WanDMDPipeline"),
    ],
)
def test_a_class_is_recognised_by_its_parts(tmp_path, name, ours):
    none = [None, None]
    folder = with_index(tmp_path, _class_name=name, image_encoder=none, image_processor=none)
    assert read_index(folder)["_class_name"] == ours
    PIPELINES[ours].from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "WanVACEPipeline"}, "pipeline class 'WanVACEPipeline' is not supported"),
        ({"_class_name": "WanAnimatePipeline"}, "'WanAnimatePipeline' is not supported"),
        ({"_class_name": "FluxPipeline"}, "write that name as _class_name"),
        (
            {
                "_class_name": "WanImageToVideoPipeline",
                "image_encoder": ["transformers", "CLIPVisionModel"],
            },
            "'WanImageToVideoPipeline' with an image_encoder is not supported",
        ),
        (
            {"_class_name": "MyWanPipeline", "transformer": ["x", "WanVACETransformer3DModel"]},
            "with a transformer of class 'WanVACETransformer3DModel'",
        ),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, entries, message):
    with pytest.raises(WanError, match=r"known are WanPipeline, WanDMDPipeline") as caught:
        read_pipeline_config(with_index(tmp_path, **entries))
    assert message in str(caught.value)


def test_the_transformer_of_another_image_model_is_called_that(tmp_path):
    folder = with_index(tmp_path, _class_name="WanImageToVideoPipeline")
    config = read_json(folder / "transformer/config.json") | {"in_channels": 36}
    write_json(folder / "transformer/config.json", config)
    with pytest.raises(WanError, match="this is an image-to-video transformer"):
        read_pipeline_config(folder)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_quantised_model_is_called_that(tmp_path, part):
    folder = with_index(tmp_path)
    shutil.copytree(STUDENT / "text_encoder", folder / "text_encoder")
    shared = {part: str(STUDENT / part) for part in ("vae", "tokenizer")}
    write_json(folder / "shared_parts.json", shared)
    file = folder / part / "config.json"
    write_json(file, read_json(file) | {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(WanError, match=r"a quantised model \(quantization_config, by bitsand") as e:
        WanPipeline.from_pretrained(folder)
    assert "quantize=int8" in str(e.value)
    assert "another network" not in str(e.value)


# --- variants -------------------------------------------------------------------------------------


def test_a_variant_is_read_where_a_part_has_it(tmp_path, teacher):
    folder = with_index(tmp_path)
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    other = {n: t.double().mul(2).float() for n, t in load_file(file).items()}
    save_file(other, file.with_suffix(".fp16.safetensors"))
    with pytest.warns(UserWarning, match="variant=fp16 takes the other"):
        plain = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    assert_same(plain, teacher)
    chosen = ModelFolder.read(folder, variant="fp16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        varied = WanPipeline.from_pretrained(chosen, dtype=torch.float32)
    weight = teacher.transformer.head.proj.weight
    assert torch.equal(varied.transformer.head.proj.weight, weight * 2)
    assert torch.equal(
        varied.vae.decoder.conv_out.weight, teacher.vae.decoder.conv_out.weight
    )  # it has no variant
    with pytest.raises(WanError, match="no part has weights of variant=bf16; leave it out"):
        ModelFolder.read(folder, variant="bf16")


# --- the official layout --------------------------------------------------------------------------


def test_an_official_folder_loads(official, teacher):
    with pytest.warns(UserWarning, match="taken for a base model with shift 5"):
        pipeline = WanPipeline.from_pretrained(official, dtype=torch.float32)
    assert_same(pipeline, teacher)
    assert pipeline.config.shift == 5.0
    assert pipeline.config.defaults.num_frames == 121  # those of the official code for TI2V
    files = set(model_files(official, ModelFolder.read(official).places))
    assert "transformer/diffusion_pytorch_model.safetensors" in files
    assert "vae/Wan2.2_VAE.safetensors" in files
    assert "tokenizer/spiece.model" in files


def test_an_official_folder_with_pickles_says_how_to_convert_them(official, tmp_path):
    folder = Path(shutil.copytree(official, tmp_path / "official"))
    (folder / "Wan2.2_VAE.safetensors").rename(folder / "Wan2.2_VAE.pth")
    with pytest.raises(WanError, match=r"Wan2.2_VAE\.pth.*weights_only=True"):
        WanPipeline.from_pretrained(folder)
    vae = official / "Wan2.2_VAE.safetensors"
    WanPipeline.from_pretrained(folder, vae=vae)  # then it is not looked for


def test_where_an_official_folder_is_not_read_the_command_that_converts_it_is_named(official):
    with pytest.raises(WanError, match=r"python -m infer\.convert layout=diffusers source=") as e:
        read_pipeline_config(official)
    command = str(e.value).split("python -m infer.convert ")[1].rstrip(")").split()
    assert f"source={official}" in command


def test_an_official_repository_of_the_hub_names_the_other_one(tmp_path):
    folder = tmp_path / "models--Wan-AI--Wan2.2-T2V-A14B" / "snapshots" / ("0" * 40)
    (folder / "high_noise_model").mkdir(parents=True)
    (folder / "high_noise_model" / "config.json").write_text('{"_class_name": "WanModel"}')
    with pytest.raises(
        WanError, match=r"Wan-AI/Wan2\.2-T2V-A14B-Diffusers has the one that is read"
    ):
        ModelFolder.read(folder)


# --- ComfyUI's files ------------------------------------------------------------------------------


def test_comfyuis_folder_loads_with_the_tokenizer_in_the_text_encoder(comfyui, teacher):
    pipeline = WanPipeline.from_pretrained(comfyui, dtype=torch.float32)
    assert_same(pipeline, teacher)
    places = ModelFolder.read(comfyui).places
    assert places["tokenizer"] == places["text_encoder"]
    assert len(model_files(comfyui, places)) == 4  # the text encoder is the tokenizer too


def test_its_three_files_may_lie_side_by_side_among_others(comfyui, teacher, tmp_path):
    for file in comfyui.rglob("*.safetensors"):
        shutil.copy(file, tmp_path)
    save_file({"double_blocks.0.img_mlp.0.weight": torch.zeros(1)}, tmp_path / "flux.safetensors")
    (tmp_path / "notes.txt").write_text("")
    assert_same(WanPipeline.from_pretrained(tmp_path, dtype=torch.float32), teacher)


def test_what_was_loaded_from_comfyuis_files_is_saved_whole(comfyui, teacher, tmp_path):
    pipeline = WanPipeline.from_pretrained(comfyui, dtype=torch.float32)
    pipeline.save_pretrained(tmp_path / "saved")
    assert_same(WanPipeline.from_pretrained(tmp_path / "saved", dtype=torch.float32), teacher)


def test_conversion_makes_a_released_folder_of_comfyuis_files(comfyui, teacher, tmp_path):
    convert(ConvertConfig(str(comfyui), str(tmp_path / "model"), "diffusers"))
    assert_same(WanPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32), teacher)
    names = {p.name for p in (tmp_path / "model").iterdir()}
    parts = {"transformer", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert names == {*parts, "model_index.json"}
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model/tokenizer")
    for prompt in PROMPTS:
        assert theirs(prompt).input_ids == teacher.tokenizer(prompt).input_ids


def test_conversion_of_named_files_needs_no_folder(comfyui, teacher, tmp_path):
    files = {part: str(place) for part, place in find_parts(comfyui).items()} | {
        "tokenizer": str(STUDENT / "tokenizer")
    }
    convert(ConvertConfig("", str(tmp_path / "model"), "diffusers", **files))
    assert_same(WanPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32), teacher)
    replaced = {"transformer": files["transformer"]}
    convert(ConvertConfig(str(STUDENT), str(tmp_path / "b"), "diffusers", **replaced))
    assert read_index(tmp_path / "b")["_class_name"] == "WanDMDPipeline"
    ours = load_file(tmp_path / "b/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(ours["proj_out.weight"], teacher.transformer.head.proj.weight)


def test_two_transformers_are_told_apart_by_their_names(comfyui, tmp_path):
    folder = Path(shutil.copytree(comfyui, tmp_path / "models"))
    (file,) = (folder / "diffusion_models").iterdir()
    low = {n: t * 2 for n, t in load_file(file).items()}
    save_file(low, file.with_name("wan2.2_t2v_low_noise_14B_fp16.safetensors"))
    file.rename(file.with_name("Wan2_2-T2V-A14B-HIGH_fp16.safetensors"))
    model = ModelFolder.read(folder)
    assert model.config.components[:2] == ("transformer", "transformer_2")
    assert model.config.boundary_ratio == 0.875
    assert model.config.shift == 12
    assert "HIGH" in model.part("transformer").name
    convert(ConvertConfig(str(folder), str(tmp_path / "model"), "diffusers"))
    both = [load_file(f) for f in sorted((tmp_path / "model").glob("transformer*/*.safetensors"))]
    assert torch.equal(both[1]["proj_out.weight"], 2 * both[0]["proj_out.weight"])
    (folder / "diffusion_models" / "wan2.2_t2v_low_noise_14B_fp16.safetensors").unlink()
    with pytest.raises(WanError, match=r"HIGH.*: one of two experts, and no low-noise one") as e:
        ModelFolder.read(folder)
    assert "transformer_2=" in str(e.value)


def test_what_cannot_be_told_apart_or_is_missing_is_asked_for(comfyui, tmp_path):
    folder = Path(shutil.copytree(comfyui, tmp_path / "models"))
    (file,) = (folder / "diffusion_models").iterdir()
    other = Path(shutil.copy(file, file.with_name("wan_other.safetensors")))
    with pytest.raises(WanError, match=r"several files for the transformer .*transformer=FILE"):
        ModelFolder.read(folder)
    assert ModelFolder.read(folder, {"transformer": other}).part("transformer") == other
    shutil.rmtree(folder / "vae")
    with pytest.raises(WanError, match=r"no file of the vae: name the one to take as vae=FILE"):
        ModelFolder.read(folder, {"transformer": other})
    vae = comfyui / "vae" / "wan2.2_vae.safetensors"
    text_encoder = next((folder / "text_encoders").iterdir())
    bare = {n: t for n, t in load_file(text_encoder).items() if n != "spiece_model"}
    save_file(bare, text_encoder)
    given = {"transformer": other, "vae": vae}
    with pytest.raises(WanError, match=r"no tokenizer in google/umt5-xxl .*tokenizer=FOLDER"):
        ModelFolder.read(folder, given)
    given["tokenizer"] = STUDENT / "tokenizer"
    assert ModelFolder.read(folder, given).tokenizer.vocab_size == 321


def test_a_gguf_transformer_among_comfyuis_files_is_refused_by_name(comfyui, tmp_path):
    folder = Path(shutil.copytree(comfyui, tmp_path / "models"))
    (file,) = (folder / "diffusion_models").iterdir()
    file.unlink()
    file.with_suffix(".gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(WanError, match=r"fp16\.gguf: not a safetensors file but a GGUF file"):
        ModelFolder.read(folder)


def test_a_folder_of_one_part_is_no_model(comfyui, tmp_path):
    assert find_parts(comfyui / "vae") == {}
    assert find_parts(TEACHER) == {}
    with pytest.raises(WanError, match=r"no model_index\.json; give the top folder"):
        ModelFolder.read(comfyui / "vae")


# --- the tokenizer in a file ----------------------------------------------------------------------


def test_the_tokenizer_in_a_file_gives_the_ids_of_the_folder(comfyui):
    file = next((comfyui / "text_encoders").iterdir())
    assert stored_tokenizer(open_checkpoint(file)) == SPIECE.read_bytes()
    inside = ModelFolder.read(comfyui).tokenizer
    folder = Tokenizer.from_folder(STUDENT / "tokenizer")
    assert inside.vocab_size == folder.vocab_size
    for text in (*PROMPTS, "</s><pad>", "<extra_id_0> x", "x" * 900):
        assert inside(text, 512) == folder(text, 512)


def test_a_released_folder_without_a_tokenizer_takes_the_one_in_its_text_encoder(
    comfyui, teacher, tmp_path
):
    folder = with_index(tmp_path)
    write_json(folder / "shared_parts.json", {"vae": str(STUDENT / "vae")})
    (folder / "text_encoder").mkdir()
    file = next((comfyui / "text_encoders").iterdir())
    shutil.copy(file, folder / "text_encoder/model.safetensors")
    shutil.copy(STUDENT / "text_encoder/config.json", folder / "text_encoder")
    assert_same(WanPipeline.from_pretrained(folder, dtype=torch.float32), teacher)
    convert(ConvertConfig(str(folder), str(tmp_path / "out"), "diffusers"))
    assert (tmp_path / "out/tokenizer/spiece.model").read_bytes() == SPIECE.read_bytes()


# --- settings from shapes -------------------------------------------------------------------------


def test_the_parts_of_the_miniature_are_known_by_their_shapes(comfyui):
    for part, place in find_parts(comfyui).items():
        if part != "tokenizer":
            checkpoint = open_checkpoint(place)
            assert component_of(checkpoint) == part
            own = (TEACHER if part == "transformer" else STUDENT) / part / "config.json"
            assert known_config(part, checkpoint) == read_json(own)


@pytest.mark.parametrize(
    ("part", "config"),
    [
        ("transformer", DiTConfig(12, 128, 30, 8960, 16, 16)),  # Wan2.1 1.3B
        ("transformer", DiTConfig(40, 128, 40, 13824, 16, 16)),  # Wan2.1 14B, each A14B expert
        ("transformer", DiTConfig()),  # Wan2.2 TI2V-5B
        ("vae", VAE_2_1),
        ("vae", VAE_2_2),
        ("text_encoder", UMT5Config()),
    ],
)
def test_released_parts_are_known_by_their_shapes(part, config):
    values = config.to_json()
    assert config_of_shapes(part, shapes_with(part, values)) == values


def test_weights_of_no_known_model_are_asked_for_their_settings(tmp_path):
    tiny = DiTConfig(2, 16, 1, 48, in_channels=4, out_channels=4, text_dim=24, freq_dim=16)
    save_component(WanDiT(tiny).state_dict(), tmp_path, "transformer")
    with pytest.raises(WanError, match=r"not those of a known model: put its config\.json beside"):
        known_config("transformer", open_checkpoint(tmp_path))
    write_json(tmp_path / "config.json", tiny.to_json())
    assert known_config("transformer", open_checkpoint(tmp_path)) == tiny.to_json()
    write_json(tmp_path / "config.json", tiny.to_json() | {"quantization_config": {}})
    known_config("transformer", open_checkpoint(tmp_path))
    write_json(tmp_path / "config.json", tiny.to_json() | {"quantization_config": {"a": 1}})
    with pytest.raises(WanError, match="a quantised model"):
        known_config("transformer", open_checkpoint(tmp_path))


def test_a_file_for_a_part_keeps_the_settings_of_the_folder_if_its_shapes_are_theirs(
    comfyui, tmp_path
):
    """Widths don't say the number of heads, so that the folder's word counts before a guess."""
    folder = with_index(tmp_path)
    config = read_json(folder / "transformer/config.json")
    heads = {"num_attention_heads": 3, "attention_head_dim": 64}
    write_json(folder / "transformer/config.json", config | heads)
    given = {"transformer": find_parts(comfyui)["transformer"]}
    assert ModelFolder.read(folder, given).config.transformer.num_attention_heads == 3
    write_json(folder / "transformer/config.json", config | {"num_layers": 5})
    assert ModelFolder.read(folder, given).config.transformer.num_layers == 6
    shutil.rmtree(folder / "transformer")
    assert ModelFolder.read(folder, given).config.transformer.num_layers == 6


# --- on the command line --------------------------------------------------------------------------


def test_the_commands_take_parts_and_record_them(comfyui, tmp_path):
    parts = find_parts(comfyui)
    command = [sys.executable, "-m", "infer.sample", "model=mini-teacher", "steps=1"]
    command += ["prompt=a red circle", f"output_dir={tmp_path}", "contact_sheet=false"]
    command += [f"{part}={parts[part]}" for part in ("transformer", "vae", "text_encoder")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    record = read_json(file)
    assert record["settings"]["vae"] == {"value": parts["vae"].name, "from": "command line"}
    assert set(record["weights_sha256"]) >= {
        "vae/wan2.2_vae.safetensors",
        "text_encoder/umt5_xxl_fp16.safetensors",
        "tokenizer/spiece.model",
    }
    assert not any(
        name.endswith("diffusion_pytorch_model.safetensors") for name in record["weights_sha256"]
    )
    video = next(tmp_path.glob("*.mp4")).read_bytes()
    assert str(comfyui).encode() not in video
    again = [*command[:5], "prompt=a red circle", f"output_dir={tmp_path / 'b'}"]
    subprocess.run(again, capture_output=True, check=True)
    other = read_json(next((tmp_path / "b").glob("*.json")))
    assert other["latents_sha256"] == record["latents_sha256"]  # the same weights as its own


def test_evaluation_takes_parts_and_other_layouts(comfyui):
    file = find_parts(comfyui)["vae"]
    own = EvaluateConfig(checkpoint=str(TEACHER))
    config = replace(own, vae=str(file))
    digests = digests_of(config)
    assert digests["vae/wan2.2_vae.safetensors"] == sha256_file(file)
    assert "vae/diffusion_pytorch_model.safetensors" not in digests
    kept = "transformer/diffusion_pytorch_model.safetensors"
    assert digests[kept] == digests_of(own)[kept]
    assert config.question() == own.question()  # the digests tell them apart
    assert file.name in {
        Path(name).name for name in digests_of(replace(own, checkpoint=str(comfyui)))
    }
    other = replace(config, checkpoint=str(comfyui), vae=None, num_captions=2, source="vae")
    example = draw_examples(other)[:1]
    assert torch.equal(reconstruct_truth(config)(example), reconstruct_truth(other)(example))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["transformer=nowhere"], "transformer=nowhere: no such file or folder"),
        (["source=mini", "transformer_2=mini"], "transformer_2=mini: no such file"),
        (["vae=x.safetensors"], "source= is missing"),
        (["source=x.safetensors", "vae=x.safetensors"], "vae=: for a whole release; source=x.safe"),
        (["source=mini", "transformer_2=x.safetensors"], "this model has one network"),
        (["source=mini", "vae=x.safetensors"], "not a vae checkpoint"),
        (["source=mini", "base=mini-teacher", "rank=1", "vae=x.safetensors"], "not for a LoRA"),
    ],
)
def test_parts_that_convert_cannot_use_are_refused(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    shutil.copy(TEACHER / "transformer/diffusion_pytorch_model.safetensors", "x.safetensors")
    line = CommandLine(ConvertConfig, "convert", (), path_keys=LINE.path_keys)
    layout = [] if "rank=1" in arguments else ["layout=official"]
    code = execute(lambda run: convert(run.config), line, "", [*arguments, *layout, "output=out"])
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out").exists()

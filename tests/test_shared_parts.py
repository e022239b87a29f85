"""Two models that have parts in common: each whole to whoever loads it, stored once."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.conversion import ConvertConfig
from infer.convert.run import convert
from infer.loading import verify_files, weight_digests
from train.artefact import TrainedModel
from train.conditioning import component_digests
from wan.errors import WanError
from wan.pipeline.config import model_files, part_folder, read_index, read_pipeline_config
from wan.pipeline.folder import ModelFolder
from wan.pipeline.pipeline import PIPELINES
from wan.weights.digests import list_files, write_manifest
from wan.weights.hub import BUILTIN, BUILTIN_TEACHER, STUDENT, TEACHER, resolve_model


@pytest.fixture(scope="module")
def sharing(tmp_path_factory):
    """The shipped student's transformer as a model of its own, all else taken from the shipped."""
    folder = tmp_path_factory.mktemp("models") / "sharing"
    folder.mkdir()
    for name in ("model_index.json", "sampling_defaults.json"):
        shutil.copy(STUDENT / name, folder)
    for name in ("scheduler", "transformer"):
        shutil.copytree(STUDENT / name, folder / name)
    parts = {name: str(STUDENT / name) for name in ("vae", "text_encoder", "tokenizer")}
    (folder / "shared_parts.json").write_text(json.dumps(parts))
    return folder


def test_a_part_is_found_in_the_folder_or_where_it_is_shared(sharing):
    assert part_folder(sharing, "vae") == STUDENT / "vae"
    assert part_folder(sharing, "transformer") == sharing / "transformer"
    assert part_folder(STUDENT, "vae") == STUDENT / "vae"


def test_a_models_files_are_its_own_and_those_of_parts_from_elsewhere(sharing, tmp_path):
    whole, shared = model_files(STUDENT), model_files(sharing)
    assert set(whole) == set(list_files(STUDENT)) - {"README.md"}
    assert set(shared) == set(whole) - {"SHA256SUMS"} | {"shared_parts.json"}
    assert shared["vae/config.json"] == STUDENT / "vae" / "config.json"
    before = weight_digests(sharing)
    assert before["vae/config.json"] == weight_digests(STUDENT)["vae/config.json"]
    other = shutil.copytree(sharing, tmp_path / "other")
    shutil.copytree(STUDENT / "vae", other / "mine" / "vae")
    (other / "mine" / "vae" / "config.json").write_text("{}")
    shared_parts = json.loads((other / "shared_parts.json").read_text())
    (other / "shared_parts.json").write_text(json.dumps(shared_parts | {"vae": "mine/vae"}))
    changed = weight_digests(other)
    assert {name for name in before if before[name] != changed[name]} == {
        "vae/config.json",
        "shared_parts.json",
    }


def test_a_linked_part_counts_and_is_verified(tmp_path):
    linked = Path(shutil.copytree(STUDENT, tmp_path / "linked"))
    (linked / "vae").rename(linked / "first")
    (linked / "vae").symlink_to("first")
    write_manifest(linked)
    here = {name for name in model_files(linked) if not name.startswith("first/")}
    assert here == set(model_files(STUDENT))
    verify_files(linked)
    before = weight_digests(linked)
    weights = next((linked / "first").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weight_digests(linked) != before
    with pytest.raises(WanError, match=r"first/.*has other content"):
        verify_files(linked)


def video(folder):
    pipe = PIPELINES[read_index(folder)["_class_name"]].from_pretrained(folder, dtype=torch.float32)
    options = {"height": 64, "width": 64, "num_frames": 5, "seed": 0, "output_type": "latent"}
    return pipe("a red circle", **options).frames


def test_it_makes_what_the_whole_model_makes_and_is_made_whole_by_convert_and_export(
    sharing, tmp_path
):
    expected = video(STUDENT)
    assert torch.equal(video(sharing), expected)
    convert(ConvertConfig(source=str(sharing), output=str(tmp_path / "whole"), layout="diffusers"))
    assert not (tmp_path / "whole" / "shared_parts.json").exists()
    assert torch.equal(video(tmp_path / "whole"), expected)
    assert component_digests(sharing) == component_digests(STUDENT)
    pipe = PIPELINES[read_index(sharing)["_class_name"]].from_pretrained(sharing)
    made = TrainedModel(sharing, read_pipeline_config(sharing), pipe.transformer.attention.config)
    made.write(pipe.transformer.state_dict(), tmp_path / "model")
    written = {path.name for path in (tmp_path / "model").iterdir()}
    assert written >= {"vae", "text_encoder", "tokenizer"}


def test_shipped_models_have_names():
    assert resolve_model(BUILTIN) == STUDENT
    assert resolve_model(BUILTIN_TEACHER) == TEACHER
    assert read_index(TEACHER)["_class_name"] == "WanPipeline"


def test_a_folder_that_is_read_already_takes_no_other_parts():
    folder = ModelFolder.read(TEACHER)
    for options in ({"transformer": STUDENT / "transformer"}, {"revision": "main"}):
        with pytest.raises(WanError, match="settings are read already"):
            PIPELINES["WanDMDPipeline"].from_pretrained(folder, **options)

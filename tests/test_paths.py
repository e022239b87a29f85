"""Nothing leaves its folder: links and names in a model's folder lead only to what came with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.conversion import ConvertConfig
from infer.convert.run import convert
from infer.loading import weight_digests
from train.artefact import TrainedModel
from train.conditioning import component_digests
from wan.errors import WanError
from wan.lora.files import read_lora
from wan.paths import inside
from wan.pipeline.config import read_pipeline_config
from wan.pipeline.folder import ModelFolder, load_part
from wan.pipeline.parts import AutoencoderKLWan
from wan.pipeline.pipeline import WanDMDPipeline
from wan.pipeline.tokenizer_files import AutoTokenizer
from wan.weights.hub import STUDENT, TEACHER

SECRET = "the words of a private file"


@pytest.fixture
def model(tmp_path):
    """A copy of the shipped student, as if it had been downloaded."""
    return Path(shutil.copytree(STUDENT, tmp_path / "model"))


@pytest.fixture
def private(tmp_path):
    """What lies beside a download and is none of its business."""
    folder = Path(shutil.copytree(STUDENT, tmp_path / "private"))
    (folder / "secret.json").write_text(SECRET)
    return folder


WAYS = {
    "a pipeline": lambda model: WanDMDPipeline.from_pretrained(model, dtype=torch.float32),
    "the record's digests": weight_digests,
    "conversion": lambda model: convert(
        ConvertConfig(source=str(model), output=f"{model}-new", layout="diffusers")
    ),
}
TRAINING = {
    "the digests of frozen parts": component_digests,
    "one part": lambda model: load_part(model, "vae"),
    "an export": lambda model: export(model),
}


def export(model):
    dit = load_part(STUDENT, "transformer")
    target = model.with_name("exported")
    made = TrainedModel(model, read_pipeline_config(STUDENT), dit.attention.config)
    made.write(dit.state_dict(), target)


def link(path, target):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def refused(way, model, private, **match):
    with pytest.raises(WanError, match="leads to") as caught:
        way(model)
    assert SECRET not in str(caught.value)
    assert str(private) in str(caught.value)


LINKED = {
    "weights": ("vae/diffusion_pytorch_model.safetensors", "same"),
    "settings": ("vae/config.json", "secret.json"),
    "a part": ("vae", "same"),
    "a part's tokens": ("tokenizer/tokenizer.json", "secret.json"),
}


@pytest.mark.parametrize(("name", "target"), LINKED.values(), ids=LINKED.keys())
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_no_link_out_of_a_models_folder_is_followed(way, name, target, model, private):
    link(model / name, private / (name if target == "same" else target))
    refused(way, model, private)


@pytest.mark.parametrize(("name", "target"), list(LINKED.values())[:3], ids=list(LINKED)[:3])
@pytest.mark.parametrize("way", TRAINING.values(), ids=TRAINING.keys())
def test_nor_in_training(way, name, target, model, private):
    link(model / name, private / (name if target == "same" else target))
    refused(way, model, private)


@pytest.mark.parametrize(
    "name", ["model_index.json", "scheduler/scheduler_config.json", "sampling_defaults.json"]
)
def test_nor_one_to_another_json_file(name, model, private):
    link(model / name, private / "secret.json")
    refused(WAYS["a pipeline"], model, private)


def test_what_nothing_reads_but_a_record_would_list_is_refused_there(model, private):
    link(model / "notes.json", private / "secret.json")
    refused(weight_digests, model, private)


@pytest.mark.parametrize("place", ["../private/vae", "{private}/vae", "vae/../../private/vae"])
@pytest.mark.parametrize("way", [*WAYS.values(), *TRAINING.values()])
def test_shared_parts_lie_in_the_model_or_among_the_shipped(way, place, model, private):
    shutil.rmtree(model / "vae")
    shared = {"vae": place.format(private=private)}
    (model / "shared_parts.json").write_text(json.dumps(shared))
    refused(way, model, private)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vae": 3}, "a folder's name"),
        ({"../vae": "vae"}, "unknown"),
        ({"vae": ["a"]}, "name"),
        ({"vae": "va\0e"}, "no file can have this name"),
        ({"vae": "x" * 256}, "no file can have this name"),
    ],
)
def test_shared_parts_of_another_form(model, values, words):
    (model / "shared_parts.json").write_text(json.dumps(values))
    with pytest.raises(WanError, match=words):
        ModelFolder.read(model)


def test_a_link_around_dots_does_not_deceive(model, private):
    """`a/..` is the folder above what a links to, and not the folder that holds a."""
    (model / "a").symlink_to(private / "vae")
    with pytest.raises(WanError, match="leads to"):
        inside(model / "a" / ".." / "secret.json", model)
    up = "/".join([".."] * len(model.parts))
    with pytest.raises(WanError, match="leads to"):
        inside(Path(f"{model}/a/{up}{private}/secret.json"), model)


def test_a_person_may_name_the_real_place(model, private):
    """The way out: each part by its own path, whatever the model's folder links to."""
    link(model / "vae", private / "vae")
    link(model / "transformer" / "diffusion_pytorch_model.safetensors", private / "secret.json")
    parts = {name: private / name for name in ("vae", "transformer")}
    assert ModelFolder.read(model, parts).checkpoint("vae").tensors
    file = next((private / "vae").glob("*.safetensors"))
    link(model / "named.safetensors", file)  # a link that is named itself is the person's own
    parts |= {"vae": model / "named.safetensors"}
    assert ModelFolder.read(model, parts).checkpoint("vae").tensors
    (model.parent / "linked").symlink_to(private)
    WanDMDPipeline.from_pretrained(model.parent / "linked", dtype=torch.float32)


def test_links_inside_a_model_are_followed(model):
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    (model / "big").mkdir()
    weights.rename(model / "big" / weights.name)
    weights.symlink_to(f"../big/{weights.name}")
    for way in (*WAYS.values(), *TRAINING.values()):
        way(model)
    written = Path(f"{model.with_name('exported')}/vae/{weights.name}")
    assert not written.is_symlink()
    assert written.read_bytes() == weights.read_bytes()


def test_a_hub_snapshot_leads_to_its_repositorys_cache_and_nowhere_else(tmp_path, private):
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    blobs.mkdir(parents=True)
    files = [path for path in STUDENT.rglob("*") if path.is_file()]
    for number, file in enumerate(files):
        place = snapshot / file.relative_to(STUDENT)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / str(number))
        depth = len(place.relative_to(repository).parts) - 1
        place.symlink_to("../" * depth + f"blobs/{number}")
    for way in (*list(WAYS.values())[:2], *list(TRAINING.values())[:2]):
        way(snapshot)
    AutoencoderKLWan.from_pretrained(snapshot / "vae")
    AutoTokenizer.from_pretrained(snapshot / "tokenizer")
    link(snapshot / "vae" / "config.json", private / "secret.json")
    refused(WAYS["a pipeline"], snapshot, private)
    blobs.rename(private / "blobs")
    blobs.symlink_to(private / "blobs")  # a repository whose store of blobs is a link
    with pytest.raises(WanError, match="leads to"):
        WAYS["a pipeline"](snapshot)


def test_files_of_other_layouts_are_held_to_the_same(model, private, tmp_path):
    folder = tmp_path / "comfyui"
    names = {"transformer": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders"}
    shutil.copytree(model / "tokenizer", folder / "tokenizer")
    for part, name in names.items():
        (folder / name).mkdir()
        shutil.copy(next((model / part).glob("*.safetensors")), folder / name / "x.safetensors")
    assert set(ModelFolder.read(folder).places) == {*names, "tokenizer"}
    file = next((private / "vae").glob("*.safetensors"))
    link(folder / "vae" / "x.safetensors", file)
    refused(ModelFolder.read, folder, private)
    assert ModelFolder.read(folder, {"vae": file}).part("vae") == file


def test_the_shipped_models_share_parts_and_may_be_linked_by_an_installer():
    assert inside(TEACHER / "shared_parts.json", TEACHER)
    assert ModelFolder.read(TEACHER).part("vae") == STUDENT / "vae"


def test_files_beside_a_lora_are_not_looked_for_elsewhere(tmp_path, private):
    folder = tmp_path / "lora"
    folder.mkdir()
    shutil.copy(STUDENT / "vae" / "diffusion_pytorch_model.safetensors", folder / "x.safetensors")
    (folder / "x.safetensors").rename(folder / "adapter_model.safetensors")
    link(folder / "adapter_config.json", private / "secret.json")
    refused(read_lora, folder, private)
    link(folder / "adapter_model.safetensors", next((private / "vae").glob("*.safetensors")))
    refused(read_lora, folder, private)


@pytest.mark.parametrize("load", [AutoencoderKLWan.from_pretrained, AutoTokenizer.from_pretrained])
def test_one_parts_folder_is_held_to_the_same(load, model, private):
    part = model / ("vae" if load == AutoencoderKLWan.from_pretrained else "tokenizer")
    name = "config.json" if part.name == "vae" else "tokenizer.json"
    link(part / name, private / "secret.json")
    refused(load, part, private)

"""Models by name: folders first, then the hub's cache; never a silent guess."""

from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

import wan.weights.hub
from wan.errors import WanError
from wan.weights.hub import PATTERNS, resolve_model


def test_a_folder_wins(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name").samefile(tmp_path / "owner" / "name")
    assert resolve_model(tmp_path) == tmp_path
    with pytest.raises(WanError, match="revision=main is for models on the hub"):
        resolve_model("owner/name", revision="main")


def test_a_shipped_model_has_no_revision():
    with pytest.raises(WanError, match="shipped here; revision=main is for models on the hub"):
        resolve_model("builtin:miniature", revision="main")


def test_what_is_neither_folder_nor_id(tmp_path):
    for name in ("nonsense", "/no/such/folder", "./a/b", "a/b/c", "owner/name with space"):
        with pytest.raises(WanError, match="no such folder, and not a hub id"):
            resolve_model(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(WanError, match="give the folder that holds model_index"):
        resolve_model(tmp_path / "file")


@pytest.mark.parametrize("name", ["runs/mini", "outputs/mini"])
def test_a_folder_of_our_own_that_is_not_there_is_no_hub_id(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "student_3").mkdir(parents=True)
    there = "student_3" if name.startswith("runs") else "nothing"
    with pytest.raises(WanError, match=f"the hub is not asked. In it: {there}"):
        resolve_model(name)


def test_offline_and_not_in_the_cache_says_how_to_fetch(tmp_path, monkeypatch):
    real = wan.weights.hub.snapshot_download

    def in_empty_cache(name, **options):
        return real(name, cache_dir=tmp_path, **options)

    monkeypatch.setattr(wan.weights.hub, "snapshot_download", in_empty_cache)
    with pytest.raises(WanError) as caught:
        resolve_model("Wan-AI/Some-Model", revision="abc", offline=True)
    message = str(caught.value)
    assert "Wan-AI/Some-Model: no such folder, and offline, and not in the hub's cache" in message
    assert "hf download Wan-AI/Some-Model --revision abc --include '*.safetensors'" in message


def test_offline_finds_what_the_cache_has(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    real = wan.weights.hub.snapshot_download
    monkeypatch.setattr(
        wan.weights.hub,
        "snapshot_download",
        lambda name, **kw: real(name, cache_dir=tmp_path, **kw),
    )
    assert resolve_model("owner/name", offline=True).samefile(snapshot)


def test_the_hub_library_gets_the_arguments_that_were_given(monkeypatch):
    asked = {}

    def record(name, **options):
        asked.update(options)
        return "found"

    monkeypatch.setattr(wan.weights.hub, "snapshot_download", record)
    given = {"cache_dir": "here", "token": "secret", "force_download": True}
    resolve_model("owner/name", "main", True, **given)
    assert asked.items() >= {**given, "revision": "main", "local_files_only": True}.items()
    asked.clear()
    resolve_model("owner/name")
    assert not set(given) & set(asked)


REPOSITORY = (
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.bf16.safetensors",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00001.safetensors",
    "text_encoder/model.fp16-00001-of-00001.safetensors",
    "text_encoder/model.safetensors.index.json",
    "text_encoder/model.safetensors.index.fp16.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
)


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        (None, {"diffusion_pytorch_model", "model-00001-of-00001"}),
        ("fp16", {"diffusion_pytorch_model.fp16", "model.fp16-00001-of-00001"}),
    ],
)
def test_only_the_weights_that_are_read_are_fetched(tmp_path, monkeypatch, variant, weights):
    def download(name, allow_patterns, ignore_patterns, **_):
        for file in filter_repo_objects(
            REPOSITORY, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (tmp_path / file).parent.mkdir(exist_ok=True)
            (tmp_path / file).write_text("")
        return str(tmp_path)

    monkeypatch.setattr(wan.weights.hub, "snapshot_download", download)
    assert resolve_model("owner/name", variant=variant) == tmp_path
    fetched = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.safetensors")}
    vae = "vae/diffusion_pytorch_model.safetensors"  # has no variant
    assert vae in fetched
    assert {Path(name).stem for name in fetched - {vae}} == weights
    assert len(fetched) == 3
    assert (tmp_path / "text_encoder/model.safetensors.index.json").is_file()


def test_a_network_failure_is_one_clear_error_and_only_weights_are_asked_for(monkeypatch):
    asked = {}

    def no_network(name, **options):
        asked.update(options)
        raise ConnectionError("Name or service not known\nlong trace")

    monkeypatch.setattr(wan.weights.hub, "snapshot_download", no_network)
    with pytest.raises(WanError) as caught:
        resolve_model("owner/name")
    assert asked["allow_patterns"] == list(PATTERNS)
    assert "(ConnectionError: Name or service not known)" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(pattern.endswith((".bin", ".pth", ".py")) for pattern in PATTERNS)

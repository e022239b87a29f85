"""What a run leaves: exports on the way, at the end, and by `train.export` from checkpoints."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from test_distill import settings as distill_settings
from test_distill import teacher as teacher  # a fixture

from configs.cli import execute
from configs.data import DataConfig
from configs.distillation import DistillConfig, StudentConfig
from configs.export import ExportConfig
from configs.training import FinetuneConfig, LoopConfig, LoRAConfig
from train.artefact import Artefacts, put_in_place
from train.card import METHODS, Origin, model_card
from train.checkpoint import list_checkpoints, load_latest
from train.distill.run import distill
from train.export import LINE, main
from train.finetune.run import finetune
from train.kept import export_kept
from wan.errors import WanError
from wan.lora.files import read_lora
from wan.pipeline.config import read_pipeline_config
from wan.weights.hub import STUDENT, TEACHER

pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of zeros")  # a fresh transformer has

LOOP = LoopConfig(steps=4, log_every=1, save_every=3, export_every=2)
TINY_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "ffn_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 128,
    "freq_dim": 32,
}


def finetune_config(folder: Path, teacher: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(
        output_dir=str(folder),
        checkpoint=str(teacher),
        threads=1,
        batch_size=2,
        ema_decay=0.5,
        data=DataConfig(cache_dir=str(teacher.parent / "cache"), num_clips=4),
        loop=LOOP,
        **changes,
    )


def student_config(folder: Path, teacher: Path) -> DistillConfig:
    student = StudentConfig([1000.0, 600.0], start=str(teacher), lora=LoRAConfig(2, alpha=3.0))
    loop = replace(LOOP, save_every=4)
    return distill_settings(folder, teacher, output_dir=str(folder), loop=loop, student=student)


RUNS = {
    "a LoRA": (finetune, lambda *at: finetune_config(*at, lora=LoRAConfig(2, alpha=3.0))),
    "all weights": (finetune, finetune_config),
    "from scratch": (finetune, lambda *at: finetune_config(*at, from_scratch=True, dit=TINY_DIT)),
    "a student's LoRA": (distill, student_config),
}


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    """The files of artefacts by their names, without those of the artefacts themselves."""
    files = {}
    for name in names:
        place = folder / name
        if place.is_file():
            files["LoRA"] = place.read_bytes()
        elif place.is_dir():
            inside = (path for path in place.rglob("*") if path.is_file())
            files |= {path.relative_to(place).as_posix(): path.read_bytes() for path in inside}
    assert files
    return files


def end_of(run: Path) -> dict[str, bytes]:
    return contents(run, "pytorch_lora_weights.safetensors", "model")


def step_of(run: Path, step: int, folder: str = "exports/") -> dict[str, bytes]:
    return contents(run, f"{folder}step-000000{step}.safetensors", f"{folder}step-000000{step}")


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory) -> dict[str, Path]:
    """A finished run of every kind."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / name for name in RUNS}
    for name, (command, config) in RUNS.items():
        assert command(config(folders[name], teacher)) == 0
    return folders


@pytest.mark.parametrize("name", RUNS)
def test_the_export_of_the_last_step_is_what_the_end_leaves(runs, name):
    run = runs[name]
    assert step_of(run, 4) == end_of(run)
    assert step_of(run, 2) != end_of(run)
    assert ("LoRA" in end_of(run)) == ("LoRA" in name)
    assert ("transformer/config.json" in end_of(run)) == (name != "a LoRA")
    assert {path.name.split(".")[0] for path in (run / "exports").iterdir()} == {
        "step-0000002",
        "step-0000004",
    }


@pytest.mark.parametrize("name", RUNS)
def test_the_command_makes_the_same_of_a_checkpoint(runs, teacher, name, tmp_path, monkeypatch):
    monkeypatch.chdir(teacher.parent)  # where "model" is what the run started from
    monkeypatch.setattr("torch.distributed.init_process_group", None)
    export_kept(ExportConfig(str(runs[name]), step=4, output=str(tmp_path / "step-0000004")))
    with pytest.raises(WanError, match=r"output=\.: is there already"):
        export_kept(ExportConfig(str(runs[name]), step=4, output="."))
    assert step_of(tmp_path, 4, "") == end_of(runs[name])
    export_kept(ExportConfig(str(runs[name]), weights="current", output=str(tmp_path / "now")))
    now = contents(tmp_path, "now.safetensors", "now")
    assert now.keys() == end_of(runs[name]).keys()
    assert now != end_of(runs[name])


def test_current_weights_are_those_of_the_last_step(runs, tmp_path):
    export_kept(ExportConfig(str(runs["a LoRA"]), weights="current", output=str(tmp_path / "now")))
    lora = read_lora(tmp_path / "now.safetensors")
    weights = load_latest(runs["a LoRA"] / "checkpoints")["modules"]["dit"]
    name = "blocks.0.self_attention.query"
    assert torch.equal(lora.pairs[f"{name}.weight"].down, weights[f"{name}.lora_A"])
    assert torch.equal(lora.pairs[f"{name}.weight"].up, weights[f"{name}.lora_B"] * 1.5)


@pytest.mark.parametrize("place", ["export", "checkpoint"])
def test_a_run_that_is_killed_before_an_export_or_a_checkpoint_leaves_the_same(
    runs, teacher, tmp_path, monkeypatch, place
):
    """Steps 2 and 4 are exported, 3 and 4 are saved."""
    killed = {
        "export": ("train.artefact.Artefacts.write_step", 4),
        "checkpoint": ("train.loop.save_checkpoint", 3),
    }
    config = finetune_config(tmp_path / "run", teacher, lora=LoRAConfig(2, alpha=3.0))
    name, step = killed[place]
    with monkeypatch.context() as patch:
        own = Artefacts.write_step if place == "export" else None

        def stop(*given):
            at = given[1].step if place == "export" else given[1]
            if at == step:
                raise KeyboardInterrupt
            return own(*given)

        patch.setattr(name, stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(config)
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/exports").iterdir()}
    assert [path.name for path in there] == ["step-0000002.safetensors"]
    finetune(config)
    assert all(path.stat().st_mtime_ns == time for path, time in there.items())
    assert step_of(tmp_path / "run", 2) == step_of(runs["a LoRA"], 2)
    assert step_of(tmp_path / "run", 4) == step_of(runs["a LoRA"], 4)


def test_an_export_of_another_run_is_moved_aside_and_never_passes_for_a_new_one(
    runs, teacher, tmp_path, capsys
):
    run, name = tmp_path / "run", "step-0000002.safetensors"
    shutil.copytree(runs["a LoRA"], run)
    shutil.rmtree(run / "checkpoints")
    config = finetune_config(run, teacher, lora=LoRAConfig(2, alpha=3.0), seed=1)
    finetune(config)
    assert re.search(rf"{name} was not made of .* {name}-aside-1 now", capsys.readouterr().err)
    assert (run / f"exports/{name}-aside-1").read_bytes() == step_of(runs["a LoRA"], 2)["LoRA"]
    assert step_of(run, 2) != step_of(runs["a LoRA"], 2)
    assert step_of(run, 4) == end_of(run)
    (run / "exports.json").write_text("{")
    finetune(config)  # resumes at step 4, of which it cannot know any more
    assert "exports.json" in capsys.readouterr().err
    assert step_of(run, 4) == end_of(run)
    assert len(list((run / "exports").iterdir())) == 2 + 2 + 1


def test_a_folder_is_replaced_and_a_kill_in_between_leaves_the_old_one(tmp_path, monkeypatch):
    place, rename = tmp_path / "model", Path.rename

    def write(text: str) -> None:
        beside = tmp_path / f"new-{text}"
        beside.mkdir()
        (beside / "file").write_text(text)
        put_in_place(beside, place)

    def killed(path: Path, target: Path) -> Path:
        if target == place:
            raise KeyboardInterrupt
        return rename(path, target)

    write("1")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            write("2")
    assert (tmp_path / ".replaced-model/file").read_text() == "1"
    write("3")
    assert (place / "file").read_text() == "3"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "new-2"}


def refused(words: str, *arguments: str, capsys) -> str:
    """The one line of an error of the command."""
    assert execute(main, LINE, "", arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line), line
    return line


def test_a_trained_folder_has_a_card_that_hubs_read():
    settings = read_pipeline_config(STUDENT)
    card = model_card(Origin("train.distill", "Wan-AI/Wan2.2-TI2V-5B-Diffusers"), settings)
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    assert "few-step" in head["tags"]
    assert "3 steps, at t = 1000, 757, 522" in card
    where = SimpleNamespace(checkpoint="/home/somebody/own", output_dir="runs/a")
    card = model_card(Origin.of("train.finetune", where), read_pipeline_config(TEACHER))
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "The transformer of own, fine-tuned" in card
    assert "somebody" not in card
    assert all(importlib.util.find_spec(command) for command in METHODS)


def test_what_cannot_be_exported_is_one_error(runs, teacher, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(teacher.parent)
    lora, whole = (f"run={runs[name]}" for name in ("a LoRA", "all weights"))
    refused("step=2: no checkpoint .* 3, 4", lora, "step=2", capsys=capsys)
    refused(r"step-0000004\.safetensors: there already", lora, capsys=capsys)
    refused("run=.*: no checkpoint", f"run={tmp_path}", capsys=capsys)
    refused("without .safetensors", whole, f"output={tmp_path}/x.safetensors", capsys=capsys)
    refused("nothing is read from it", lora, "step=3", f"checkpoint={teacher}", capsys=capsys)
    assert not any(tmp_path.iterdir())


def test_a_model_that_has_moved_is_asked_for_and_told_from_another(
    runs, teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = f"output={tmp_path / 'out'}"
    for name, places in (("all weights", {}), ("a student's LoRA", {"start": "moved"})):
        shutil.copytree(runs[name], tmp_path / "run", dirs_exist_ok=True)
        words = r"started from model, which is not found .* checkpoint=FOLDER"
        refused(words, "run=run", output, capsys=capsys)
        other = tmp_path / "other"
        shutil.copytree(teacher, other, dirs_exist_ok=True)
        file = next((other / "transformer").glob("*.safetensors"))
        content = bytearray(file.read_bytes())
        content[-2] ^= 1
        file.write_bytes(content)
        words = "other: has other weights than the model"
        refused(words, "run=run", "checkpoint=other", output, capsys=capsys)
        assert not (tmp_path / "out").exists()
        moved = teacher.rename(tmp_path / "moved")
        try:
            export_kept(ExportConfig("run", checkpoint="moved", output="out", **places))
        finally:
            moved.rename(teacher)
        assert contents(tmp_path, "out.safetensors", "out") == end_of(runs[name])
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(tmp_path / "run")


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(runs, tmp_path, capsys):
    shutil.copytree(runs["a LoRA"], tmp_path / "run")
    newest = list_checkpoints(tmp_path / "run/checkpoints")[-1]
    (newest / "state.safetensors").write_bytes(b"")
    export_kept(ExportConfig(str(tmp_path / "run"), output=str(tmp_path / "x")))
    out, err = capsys.readouterr()
    assert "step 3" in out
    assert "trying the checkpoint before it" in err
    with pytest.raises(WanError, match="sha256"):
        export_kept(ExportConfig(str(tmp_path / "run"), step=4, output=str(tmp_path / "y")))


def test_help_and_a_mistyped_option_load_no_pytorch():
    script = "import train.export, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True)

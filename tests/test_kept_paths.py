"""What is kept or handed on tells nothing of the machine: no absolute path outside its folder."""

import importlib
import json
import os
import shutil

import pytest
import torch

import infer.ablate.__main__ as ablate
import infer.evaluate.__main__ as evaluate
import infer.sample.__main__ as sample
import train.finetune.__main__ as finetune
from configs.cli import execute
from configs.command_line import CommandLine
from configs.schema import PATH_OPTIONS, kept_settings
from wan.errors import WanError
from wan.lora.merge import add_lora, save_lora
from wan.paths import kept_path, kept_text
from wan.pipeline.folder import load_part
from wan.weights.hub import STUDENT

TINY = ("height=64", "width=64", "num_frames=9")


@pytest.fixture(params=["absolute", "home"])
def private(tmp_path, monkeypatch, request):
    """A folder whose name nobody is to learn, with a model, a LoRA and prompts in it."""
    folder = tmp_path / "alice's client"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(tmp_path if request.param == "home" else "/nowhere"))
    shutil.copytree(STUDENT, folder / "model")
    dit = load_part(STUDENT, "transformer", dtype=torch.float32)
    add_lora(dit, 2)
    save_lora(folder / "style.safetensors", dit)
    (folder / "prompts.txt").write_text("a red circle\n")
    return folder


def told(folder, output):
    """The files below `output` that hold a part of the private folder's name."""
    words = [b"alice's client", os.fsencode(folder)]
    files = [path for path in output.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if any(word in path.read_bytes() for word in words)]


def test_a_record_a_video_and_latents(private, tmp_path):
    arguments = [
        f"checkpoint={private / 'model'}",
        f"vae={private / 'model' / 'vae'}",
        f'lora="{private / "style.safetensors"}":0.5',
        f"prompt_file={private / 'prompts.txt'}",
        f"output_dir={tmp_path / 'out'}",
        *TINY,
    ]
    assert execute(sample.SampleCommand(), sample.LINE, "", arguments) == 0
    assert not told(private, tmp_path / "out")
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert record["config"]["checkpoint"] == record["model_folder"] == "model"
    assert record["config"]["lora"] == ["style.safetensors:0.5"]
    assert record["weights_sha256"]


def test_a_failure_in_a_record(private, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise WanError(f"{private / 'model' / 'vae'}: was written to; see {private}/model.")

    monkeypatch.setattr("wan.pipeline.stages.PipelineStages.decode_latents", fail)
    arguments = [f"checkpoint={private / 'model'}", "prompt=x", f"output_dir={tmp_path / 'out'}"]
    execute(sample.SampleCommand(), sample.LINE, "", [*arguments, *TINY])
    assert not told(private, tmp_path / "out")
    record = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert "was written to; see" in record["status"]


def test_what_measuring_keeps(private, tmp_path):
    out = tmp_path / "out"
    model = f"checkpoint={private / 'model'}"
    world = ("num_captions=2", model)
    assert execute(evaluate.main, evaluate.LINE, "", [*world, f"output={out / 'e.json'}"]) == 0
    grid = ["attention=[sdpa]", "steps=[3]", f"output_dir={out / 'a'}"]
    assert execute(ablate.main, ablate.LINE, "", [*world, *grid]) == 0
    prompts = [model, "prompt=a red circle", f"output_dir={out / 'b'}", *grid[:2], *TINY]
    assert execute(ablate.main, ablate.LINE, "", [*prompts, "reference.steps=3"]) == 0
    assert not told(private, out)


def test_what_training_keeps_and_that_it_goes_on(private, tmp_path, capsys):
    def run(model):
        """Make the last step anew, if there is one."""
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-0000002", ignore_errors=True)
        arguments = [
            f"checkpoint={model}",
            f"output_dir={tmp_path / 'out'}",
            f"data.cache_dir={private / 'cache'}",
            *(
                "data.num_clips=2",
                "batch_size=1",
                "lora.rank=2",
                "validation_captions=0",
                "few_step=true",
            ),
            *("loop.save_every=1", "loop.steps=2"),
        ]
        return execute(finetune.main, finetune.LINE, "", arguments)

    assert run(private / "model") == 0
    assert not told(private, tmp_path / "out")
    moved = (private / "model").rename(tmp_path / "model")
    assert run(moved) == 0  # the same weights in another place
    assert "continuing from step 1" in capsys.readouterr().err
    (moved / "SHA256SUMS").unlink()
    file = next((moved / "transformer").glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.write_bytes(content)
    assert run(moved) == 2  # other weights under the same name
    assert "model_digest" in capsys.readouterr().err


COMMANDS = [
    *(f"infer.{name}.__main__" for name in ("sample", "evaluate", "ablate", "study", "bench")),
    *(f"infer.{name}.__main__" for name in ("convert", "parity")),
    *(f"train.{name}.__main__" for name in ("finetune", "distill", "vae", "text_encoder")),
]


@pytest.mark.parametrize("module", COMMANDS)
def test_every_option_that_is_a_path_is_kept_as_one(module):
    line: CommandLine = importlib.import_module(module).LINE
    names = [key.rpartition(".")[2] for key in (*line.path_keys, *line.list_keys)]
    assert set(names) <= set(PATH_OPTIONS)


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("/data/models/x", "x"),
        ("~/models/x", "x"),
        ("~nosuchuser/models/x", "~nosuchuser/models/x"),
        ("../alice/x", "x"),
        ("models/x", "models/x"),
        ("owner/name", "owner/name"),
        ("builtin:miniature", "builtin:miniature"),
        ("/out/runs/x", "runs/x"),
        ("/out", "."),
        ("/outside/x", "x"),
        ("/out/../etc/x", "x"),
        ("/data/style.safetensors:0.8", "style.safetensors:0.8"),
        ("https://huggingface.co/a/b/blob/main/x", "https://huggingface.co/a/b/blob/main/x"),
    ],
)
def test_how_a_path_is_kept(path, kept, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert kept_path(path, "/out") == kept
    assert kept_path(kept, "/out") == kept  # once more changes nothing


def test_texts_are_no_paths():
    values = {"prompt": "/imagine a cat", "lora": None, "sampler": {"folder": "/a/b"}, "x": [1]}
    kept = kept_settings(values, "/out")
    assert kept == values | {"sampler": {"folder": "b"}}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("/a/b/c.json: not JSON", "c.json: not JSON"),
        ("see '/a/b c/d' and ~/x/y", "see 'd' and y"),
        ("16/9 and and/or, a/b", "16/9 and and/or, a/b"),
        ("get https://host/a/b", "get https://host/a/b"),
    ],
)
def test_messages_keep_their_words(text, kept):
    assert kept_text(text, "/out", "/a/b c") == kept

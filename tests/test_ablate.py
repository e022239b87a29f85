"""A grid is run once, resumed, survives failures, and is reported in every form it promises."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_pipeline import build, write_tokenizer

from configs.ablation import AblateConfig, GridConfig, ModelConfig, ReferenceConfig
from infer import ablate
from infer.ablate import LINE, MAX_PSNR, main
from infer.cli import Run, compose_runs, execute
from infer.command_line import preset_names
from wan.attention_config import AttentionConfig
from wan.errors import WanError
from wan.video import read_video

PROMPT = "a red circle, moving right"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model with random weights; clips of 32 x 32 and 9 frames."""
    folder = tmp_path_factory.mktemp("models")
    write_tokenizer(folder / "tokenizer")
    build(folder / "tokenizer").save_pretrained(folder / "model")
    return folder / "model"


def grid(output: Path, model: Path, **changes) -> AblateConfig:
    """Two attentions at two numbers of steps, compared with 4 exact steps."""
    config = AblateConfig(
        output_dir=str(output),
        checkpoint=str(model),
        prompt=PROMPT,
        grid=GridConfig(attention=["sdpa", "frame_causal"], steps=[1, 4]),
        reference=ReferenceConfig(steps=4),
        device="cpu",
    )
    return replace(config, **changes)


def run(config: AblateConfig) -> int:
    return main(Run(config, {}, {}, ""))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """What is made from now on, by attention and steps; nothing is drawn."""
    names: list[str] = []
    make = ablate.make_video

    def noting(runner, setting, seed, prompt):
        names.append(f"{setting.attention_name} {setting.sampler.steps} {seed}")
        return make(runner, setting, seed, prompt)

    monkeypatch.setattr(ablate, "make_video", noting)
    return names


@pytest.fixture(scope="module")
def done(tmp_path_factory, model) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    assert run(grid(folder, model)) == 0
    return folder


def rows(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["rows"]


def test_the_exact_setting_equals_its_reference_and_the_others_do_not(done):
    by_name = {row["setting"]: row for row in rows(done)}
    assert list(by_name) == [
        *("sdpa, 1 step", "sdpa, 4 steps", "frame_causal, 1 step", "frame_causal, 4 steps")
    ]
    exact = by_name.pop("sdpa, 4 steps")
    assert exact["PSNR, dB"] == MAX_PSNR
    assert exact["SSIM"] == pytest.approx(1)
    assert exact["flicker / reference's"] == pytest.approx(1)
    assert exact["density"] == 1
    for row in by_name.values():
        assert row["PSNR, dB"] < MAX_PSNR
        assert row["SSIM"] < 1
    assert 0.5 < by_name["frame_causal, 1 step"]["density"] < 1
    assert all(row["seconds per clip"] > 0 for row in rows(done))


def test_every_form_of_the_report_is_written(done):
    with (done / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["steps"] for line in lines] == ["1", "4", "1", "4"]
    assert float(lines[0]["SSIM"]) == pytest.approx(rows(done)[0]["SSIM"])
    text = (done / "report.md").read_text()
    assert text.count("\n| ") == 5
    assert "do not say which video is better" in text
    frames, info = read_video(done / "clips.mp4")
    assert info.decoded_frames == 9
    assert frames.shape[2] > 2 * 32  # side by side
    assert (done / "report.png").stat().st_size > 1000


def test_what_is_stored_is_not_made_again_and_a_longer_grid_adds_to_it(done, model, made):
    assert run(grid(done, model)) == 0
    assert made == []
    longer = GridConfig(attention=["sdpa", "frame_causal"], steps=[1, 4, 2])
    assert run(grid(done, model, grid=longer)) == 0
    assert made == ["sdpa 2 0", "frame_causal 2 0"]
    made.clear()
    assert run(grid(done, model, num_seeds=2, grid=GridConfig(steps=[1]))) == 0
    assert made == ["sdpa 4 1", "sdpa 1 1"]  # the second seed's reference first
    (row,) = rows(done)
    assert row["clips"] == 2
    assert row["SSIM, low"] < row["SSIM"] < row["SSIM, high"]
    assert run(grid(done, model)) == 0  # as it was for the other tests


def loaded(folder: Path) -> set[tuple[str, str, str]]:
    """How the models of the stored cells were loaded."""
    records = (json.loads(file.read_text()) for file in (folder / "cells").glob("*.json"))
    names = ("offload", "quantize", "compile")
    return {tuple(record["plan"][name] for name in names) for record in records}


def test_quantised_cells_are_made_anew_and_offloaded_ones_are_the_same(done, tmp_path, model, made):
    assert run(grid(done, model, offload="block")) == 0
    assert made == []  # it is stored
    assert run(grid(tmp_path / "offloaded", model, offload="block")) == 0
    assert len(made) == 5
    shutil.copytree(done, tmp_path / "int8")
    assert run(grid(tmp_path / "int8", model, quantize="int8")) == 0
    assert len(made) == 10  # the reference too
    compared = ("PSNR, dB", "SSIM", "flicker / reference's")
    plain, offloaded, quantised = (
        [[row[name] for name in compared] for row in rows(folder)]
        for folder in (done, tmp_path / "offloaded", tmp_path / "int8")
    )
    for a, b in zip(offloaded, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # a CPU rounds by where in memory a weight lies
    for a, b in zip(quantised[::2], plain[::2], strict=True):  # of 1 step
        assert a != pytest.approx(b, rel=1e-3)
    assert quantised[1][0] == MAX_PSNR  # 4 steps, against 4 of the same weights
    assert loaded(tmp_path / "offloaded") == {("block", "none", "none")}
    assert loaded(tmp_path / "int8") == {("none", "none", "none"), ("none", "int8", "none")}


def test_a_cell_that_fails_is_named_and_the_others_are_made(tmp_path, model, made, capsys):
    # A window of even length is refused when the attention is built.
    bad = AttentionConfig("sliding_tile", window=[2, 1, 1])
    models = {"here": ModelConfig(str(model)), "nowhere": ModelConfig(str(tmp_path / "none"))}
    attention = GridConfig(attention=["bad", "sdpa"], steps=[1])
    config = grid(tmp_path, model, grid=attention, variants={"bad": bad}, models=models)
    assert run(config) == 1
    assert made == ["sdpa 4 0", "bad 1 0", "sdpa 1 0"]
    (row,) = rows(tmp_path)
    assert row["attention"] == "sdpa"
    printed = capsys.readouterr()
    assert "odd numbers only" in printed.err
    last = printed.err.splitlines()[-1]
    assert last.startswith("3 cells failed: nowhere, bad")
    assert "Failed, and not in here" in printed.out


def test_without_a_reference_nothing_is_compared(tmp_path, model, capsys):
    other = ReferenceConfig(steps=4, sampler="few_steps")
    assert run(grid(tmp_path, model, reference=other, grid=GridConfig(steps=[1]))) == 1
    printed = capsys.readouterr().err
    assert "reference.checkpoint=" in printed
    assert "nothing to compare with" in printed
    assert "no stored results" in printed


def test_prompts_of_a_file_are_cells_of_their_own(tmp_path, model, made):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na blue, small square\n")
    config = grid(tmp_path / "out", model, prompt=None, prompt_file=str(file), grid=GridConfig())
    assert run(replace(config, reference=ReferenceConfig(steps=None))) == 0
    assert len(made) == 4
    (row,) = rows(tmp_path / "out")
    assert row["clips"] == 2
    assert row["steps"] == 3  # the model's own
    file.write_text("twice\ntwice\n")
    with pytest.raises(WanError, match="twice"):
        run(config)


def test_the_world_is_read_by_its_detectors(tmp_path, model, monkeypatch):
    config = grid(tmp_path, model, prompt=None, num_captions=2, num_frames=9)
    config = replace(config, height=64, width=64, grid=GridConfig(attention=["sdpa", "spatial"]))
    assert run(config) == 0
    first, second = rows(tmp_path)
    assert (first["attention"], second["attention"]) == ("sdpa", "spatial")
    assert first["text adherence"] == 0  # of random weights
    assert first["text adherence, high"] > 0.5  # two clips say little
    assert first["clips"] == 2
    assert "read by its detectors" in (tmp_path / "report.md").read_text()
    monkeypatch.setattr(ablate, "make_captions", lambda *_: pytest.fail("it is stored"))
    assert run(config) == 0


@pytest.mark.parametrize("name", preset_names("experiment"))
def test_every_experiment_composes_and_its_first_cell_runs(name, tmp_path, model):
    (composed,) = compose_runs(LINE, [f"experiment={name}", "num_captions=1", "device=cpu"])
    config = composed.config
    settings = config.settings()
    assert len(settings) == {"none": 1, "attention": 16, "steps": 15}[name]
    for setting in settings:
        assert config.evaluation(setting, 0).attention == setting.attention
    tiny = replace(
        config,
        output_dir=str(tmp_path),
        checkpoint=str(model),
        models={},
        grid=GridConfig(attention=config.grid.attention[-1:], steps=[1]),
        **dict.fromkeys(("height", "width"), 64),
        num_frames=9,
    )
    assert run(tiny) == 0
    assert len(rows(tmp_path)) == 1


def test_typed_lists_become_the_grid():
    words = ["attention=[sdpa,top_k]", "steps=[null,3]", "grid.guidance_scale=[1,3]", "shift=[2]"]
    (composed,) = compose_runs(LINE, [*words, "prompt=a cat, ${running}"])
    config = composed.config
    assert config.prompt == "a cat, ${running}"
    assert len(config.settings()) == 8
    assert {setting.sampler.shift for setting in config.settings()} == {2.0}
    assert [s.sampler.steps for s in config.settings()[:2]] == [None, 3]


def test_a_preset_sets_what_the_grid_leaves_open():
    (composed,) = compose_runs(LINE, ["model=fastwan_ti2v_5b", "prompt=a fox", "steps=[null,4]"])
    own, four = composed.config.settings()
    assert own.sampler.timesteps == [1000, 757, 522]
    assert (four.sampler.steps, four.sampler.timesteps) == (4, None)
    reference = composed.config.reference_of(own)
    assert reference.sampler.steps == 50
    assert reference.attention == AttentionConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=wan22_ti2v_5b"], "give prompt= or prompt_file="),
        (["steps=[3,3]"], "twice"),
        (["steps=[0]"], "between 1 and 1000"),
        (["num_seeds=0"], "at least 1"),
        (["grid.guidance_scale=[0.5]"], "at least 1"),
        (["prompt=a", "prompt_file=b"], "only one"),
        (["prompt=a", "quantize=int4"], "quantize=int4: choose one of none, int8, fp8"),
        (["prompt=a", "offload=disk"], "offload=disk: choose one of none, stage, block"),
    ],
)
def test_bad_grids_are_refused_before_anything_is_made(words, message, capsys):
    assert execute(main, LINE, "", words) == 2
    assert message in capsys.readouterr().err


def test_equal_clips_are_as_near_as_eight_bits_tell():
    video = torch.zeros(3, 2, 16, 16)
    other = video.clone()
    other[0, 0, 0, 0] = 1 / 255
    assert ablate.psnr(other, video) > MAX_PSNR

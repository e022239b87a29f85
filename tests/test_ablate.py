"""A grid is run once, resumed, survives failures, and is reported in every form it promises."""

import csv
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pipeline import build, write_tokenizer

from configs.ablation import AblateConfig, GridConfig, ModelConfig, ReferenceConfig
from configs.cli import Run, execute
from configs.command_line import preset_names
from configs.compose import compose_runs
from infer.ablate import run as ablate
from infer.ablate.__main__ import LINE, main
from infer.ablate.run import MAX_PSNR
from infer.evaluate import parts
from infer.evaluate.report import Report
from infer.sample.__main__ import LINE as SAMPLE
from infer.sample.__main__ import SampleCommand
from wan.errors import WanError
from wan.files import read_sealed, write_sealed
from wan.media.video import read_video
from wan.models.attention import network_attention
from wan.models.attention.choice import SELF_TEST_GRID
from wan.models.attention.top_k import FLEX_BLOCK, tiling
from wan.models.attention_config import AttentionConfig
from wan.sampling.schedule import FEW_STEP_TABLE_SHIFT

PROMPT = "a red circle, moving right"
GRID_5B = (31, 22, 40)  # tokens of 121x704x1280


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


def composed(*words: str) -> AblateConfig:
    (one,) = compose_runs(LINE, words)
    return one.config


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


def rows(folder: Path, report: str = "results.json") -> list[dict]:
    return json.loads((folder / report).read_text())["rows"]


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


def test_what_is_stored_is_not_made_again_and_a_longer_grid_adds_to_it(
    done, model, made, tmp_path, capsys
):
    folder = Path(shutil.copytree(done, tmp_path / "ablation"))
    assert run(grid(folder, model)) == 0
    assert made == []
    longer = GridConfig(attention=["sdpa", "frame_causal"], steps=[1, 4, 2])
    assert run(grid(folder, model, grid=longer)) == 0
    assert made == ["sdpa 2 0", "frame_causal 2 0"]
    assert len(rows(folder)) == 6  # in place of the report of four
    assert not (folder / "results-2.json").exists()
    made.clear()
    for _ in range(2):  # the second time in place of its own
        assert run(grid(folder, model, num_seeds=2, grid=GridConfig(steps=[1]))) == 0
    assert made == ["sdpa 4 1", "sdpa 1 1"]  # the second seed's reference first
    (row,) = rows(folder, "results-2.json")
    assert row["clips"] == 2
    assert row["SSIM, low"] < row["SSIM"] < row["SSIM, high"]
    assert len(rows(folder)) == 6  # nothing that was reported is lost
    assert (
        "index-2.html, report-2.md, results-2.csv, results-2.json, report-2.png, clips-2.mp4"
        in (capsys.readouterr().out)
    )
    assert not (folder / "results-3.json").exists()


def test_a_grid_of_steps_is_drawn_over_steps_and_another_says_them(
    done, model, tmp_path, monkeypatch
):
    drawn = []
    shutil.copytree(done, tmp_path / "copy")
    monkeypatch.setattr(
        Report, "draw", lambda self, file, label, *_, **more: drawn.append((label, more))
    )
    assert run(grid(tmp_path / "copy", model, grid=GridConfig(steps=[1, 4]))) == 0
    assert run(grid(tmp_path / "copy", model)) == 0
    assert drawn == [
        ("steps", {"ticks": [1, 4]}),
        ("seconds per clip", {"names": ["1 step", "4 steps"] * 2}),
    ]


def flip(content: bytes) -> bytes:
    """Another digit where a measured number begins, or another last byte of a tensor."""
    place = content.rfind(b'"seconds": 0.') + 14 if content.startswith(b"{") else len(content) - 1
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [flip, cut, lambda content: b"", lambda content: b"[]"])
@pytest.mark.parametrize("kind", ["record", "reference", "clip"])
def test_what_is_damaged_is_made_again_or_left_out_with_a_line(
    done, model, tmp_path, made, capsys, damage, kind
):
    folder = tmp_path / "ablation"
    shutil.copytree(done, folder)
    before = rows(folder)
    cell = ablate.list_cells(grid(folder, model), folder)[0][0]
    files = {
        "record": cell.file,
        "reference": cell.reference,
        "clip": cell.file.with_suffix(".mp4"),
    }
    file = files[kind]
    if kind == "reference":  # which is read where a cell is to be made
        cell.file.unlink()
    file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    assert run(grid(folder, model)) == 0
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert len(made) == {"record": 1, "reference": 2, "clip": 0}[kind]
    if not (kind == "clip" and damage is flip):  # a picture that plays is a picture
        (line,) = [line for line in said.splitlines() if file.name in line]
        assert ("left out" if kind == "clip" else "made again") in line
    for row, other in zip(rows(folder), before, strict=True):
        assert row["SSIM"] == other["SSIM"]


@pytest.mark.parametrize("world", [False, True])
def test_what_was_made_on_another_device_or_in_another_dtype_is_made_again(
    done, model, monkeypatch, world
):
    config = grid(done, model, prompt=None, num_captions=2) if world else grid(done, model)
    before = [cell.key for cell in ablate.list_cells(config, done)[0]]
    assert before

    def keys(**changes) -> list[str]:
        return [cell.key for cell in ablate.list_cells(replace(config, **changes), done)[0]]

    if not world:  # there the words are in the key too
        assert keys(device="auto") == keys(dtype="float32") == before  # without a GPU
    assert not set(keys(dtype="bfloat16")) & set(before)
    monkeypatch.setattr(ablate, "resolve_device", lambda name: torch.device("cuda"))
    assert not set(keys(device="auto")) & set(before)


def test_only_the_first_clip_of_an_attention_is_warmed_up_for(done, model):
    cells, _ = ablate.list_cells(grid(done, model), done)
    seconds = [json.loads(cell.file.read_text())["warmup_seconds"] for cell in cells]
    sdpa_1, sdpa_4, causal_1, causal_4 = seconds
    assert causal_1 > 0
    assert sdpa_1 == sdpa_4 == causal_4 == 0  # the reference was of sdpa


def loaded(folder: Path) -> set[str]:
    """How the models of the stored cells were loaded."""
    names = ("offload", "quantize", "compile")
    plans = [json.loads(file.read_text())["plan"] for file in (folder / "cells").glob("*.json")]
    return {" ".join(plan[name] for name in names) for plan in plans}


def test_quantised_cells_are_made_anew_and_offloaded_ones_are_the_same(done, tmp_path, model, made):
    assert run(grid(done, model, offload="block")) == 0
    assert made == []  # it is stored
    assert run(grid(tmp_path / "offloaded", model, offload="block")) == 0
    assert len(made) == 5
    made.clear()
    shutil.copytree(done, tmp_path / "int8")
    assert run(grid(tmp_path / "int8", model, quantize="int8")) == 0
    assert len(made) == 4  # the reference is stored: it is never quantised
    assert run(grid(tmp_path / "anew", model, quantize="int8", grid=GridConfig(steps=[4]))) == 0
    assert len(made) == 4 + 2
    assert loaded(tmp_path / "anew") == {"none int8 none"}
    compared = ("PSNR, dB", "SSIM", "flicker / reference's")
    plain, offloaded, quantised = (
        [[row[name] for name in compared] for row in rows(folder, report)]
        for folder, report in (
            (done, "results.json"),
            (tmp_path / "offloaded", "results.json"),
            (tmp_path / "int8", "results-2.json"),  # beside that of the plain cells
        )
    )
    for a, b in zip(offloaded, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # a CPU rounds by where in memory a weight lies
    for a, b in zip(quantised[::2], plain[::2], strict=True):  # of 1 step
        assert a != pytest.approx(b, rel=1e-3)
    assert quantised[1][0] < MAX_PSNR  # 4 steps, against 4 of the weights as they are
    assert rows(tmp_path / "anew")[0]["PSNR, dB"] == pytest.approx(quantised[1][0], rel=1e-4)
    assert loaded(tmp_path / "offloaded") == {"block none none"}
    assert loaded(tmp_path / "int8") == {"none int8 none", "none none none"}


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


def test_a_failure_of_any_kind_stops_only_its_cell(tmp_path, model, monkeypatch, capsys):
    make = ablate.make_video

    def failing(runner, setting, seed, prompt):
        if setting.attention_name == "frame_causal":
            raise RuntimeError("inductor: no kernel")
        return make(runner, setting, seed, prompt)

    monkeypatch.setattr(ablate, "make_video", failing)
    both = GridConfig(attention=["frame_causal", "sdpa"], steps=[1])
    assert run(grid(tmp_path, model, grid=both)) == 1
    assert [row["attention"] for row in rows(tmp_path)] == ["sdpa"]
    printed = capsys.readouterr().err
    assert "seed 0 failed (RuntimeError):\nTraceback" in printed
    assert "in failing" in printed
    assert "RuntimeError: inductor: no kernel" in printed
    assert printed.splitlines()[-1].startswith("1 cells failed: model, frame_causal")


def test_a_failure_that_all_cells_share_is_told_once(tmp_path, model, monkeypatch, capsys):
    def failing(runner, setting, seed, prompt):
        raise WanError("the disk under the weights is gone")

    monkeypatch.setattr(ablate, "make_video", failing)
    prompts = [f"a fox, number {number}" for number in range(3)]
    config = grid(tmp_path, model, prompt=None, prompts=prompts, num_seeds=4)
    assert run(config) == 1
    said = capsys.readouterr().err
    assert said.count("the disk under the weights is gone") == 1
    assert said.count("nothing to compare with") == 1
    last = said.splitlines()[-2:]
    assert "48 cells failed, all for the same reason: model, sdpa" in " ".join(last)
    assert last[-1].endswith("; and 45 more")
    assert len(said) < 2500


def test_ctrl_c_stops_the_grid(tmp_path, model, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablate, "make_compared", stop)
    with pytest.raises(KeyboardInterrupt):
        run(grid(tmp_path, model))


def test_without_a_reference_nothing_is_compared(tmp_path, model, monkeypatch, capsys):
    def failing(*_):
        raise WanError("it takes other steps")

    monkeypatch.setattr(ablate, "make_video", failing)
    assert run(grid(tmp_path, model, grid=GridConfig(steps=[1]))) == 1
    printed = capsys.readouterr().err
    assert "the reference: it takes other steps; reference.checkpoint=" in printed
    assert "nothing to compare with" in printed
    assert "no stored results" in printed


def test_prompts_of_a_file_are_cells_of_their_own(tmp_path, model, made):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\na blue, small square\n")
    config = grid(tmp_path / "out", model, prompt=None, prompt_file=str(file), grid=GridConfig())
    config = replace(config, reference=ReferenceConfig(steps=None), measures=["motion"])
    assert run(config) == 0
    assert len(made) == 4
    (row,) = rows(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "measures.json").read_text())["videos"]
    moved = [video["motion"]["value"] for video in stored.values()]
    assert row["motion, %/s"] == pytest.approx(sum(moved) / 2)
    assert "Motion is the mean optical flow" in (tmp_path / "out" / "report.md").read_text()
    assert '"motion, %/s"' in (tmp_path / "out" / "index.html").read_text()
    assert row["clips"] == 2
    assert row["steps"] == 3  # the model's own
    file.write_text("twice\ntwice\n")
    with pytest.raises(WanError, match="twice"):
        run(config)


def test_seconds_say_what_they_were_taken_on(tmp_path, model):
    config = grid(
        tmp_path, model, grid=GridConfig(steps=[1, 2]), reference=ReferenceConfig(steps=2)
    )
    assert run(config) == 0
    here = f"cpu, float32, {torch.get_num_threads()} threads"
    assert f"They were taken on: {here}. Density" in (tmp_path / "report.md").read_text()
    record = next((tmp_path / "cells").glob("*.json"))
    write_sealed(record, read_sealed(record) | {"threads": 99})
    assert run(config) == 0
    text = (tmp_path / "report.md").read_text()
    assert here in text
    assert "cpu, float32, 99 threads" in text
    assert "Cells of different ones do not compare in seconds." in text


def test_the_world_is_read_by_its_detectors(tmp_path, model, monkeypatch, capsys):
    config = grid(tmp_path, model, prompt=None, num_captions=2, num_frames=9, keep_clips=2)
    config = replace(config, height=64, width=64, grid=GridConfig(attention=["sdpa", "spatial"]))
    assert run(config) == 0
    assert "keep_clips=" not in capsys.readouterr().err
    first, second = rows(tmp_path)
    assert (first["attention"], second["attention"]) == ("sdpa", "spatial")
    assert first["text adherence"] == 0  # of random weights
    assert first["text adherence, high"] > 0.5  # two clips say little
    assert first["clips"] == 2
    assert "read by its detectors" in (tmp_path / "report.md").read_text()
    page = page_data(tmp_path / "index.html")
    assert [axis["name"] for axis in page["axes"]] == ["prompt", "attention"]
    assert [clip["at"] for clip in page["clips"]] == [[0, 0], [1, 0], [0, 1], [1, 1]]
    for clip in page["clips"]:
        assert read_video(tmp_path / clip["video"])[1].decoded_frames == 9
        assert not clip["right"]
        assert set(clip["failed"]) <= {"count", "background", "shape", "colour", "size", "motion"}
        assert clip["facts"][0][0] == "seen"
    made: list[int] = []
    evaluate = parts.evaluate
    monkeypatch.setattr(
        parts, "evaluate", lambda clips, *more: made.append(len(clips)) or evaluate(clips, *more)
    )
    assert run(config) == 0
    assert made == []
    assert run(replace(config, num_captions=3)) == 0  # one clip more of each attention
    assert made == [1, 1]
    assert [row["clips"] for row in rows(tmp_path)] == [3, 3]
    assert "keep_clips=" not in capsys.readouterr().err  # no third one was asked for
    assert run(replace(config, num_captions=3, keep_clips=3)) == 0
    assert "keep_clips=3: 2 of these clips were measured before" in capsys.readouterr().err
    assert run(config) == 0
    assert [row["clips"] for row in rows(tmp_path, "results-2.json")] == [2, 2]
    assert made == [1, 1]


def page_data(file: Path) -> dict:
    text = file.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


def test_the_page_has_every_cell_and_the_command_that_makes_it_again(
    done, model, tmp_path, monkeypatch
):
    page = page_data(done / "index.html")
    assert [axis["name"] for axis in page["axes"]] == ["attention", "steps"]
    assert [point["label"] for point in page["points"]] == [row["setting"] for row in rows(done)]
    assert page["points"][1]["y"][0][0] == MAX_PSNR
    assert [clip["point"] for clip in page["clips"]] == [0, 1, 2, 3]
    assert all((done / clip["video"]).is_file() for clip in page["clips"])
    # A path is kept as its last name; that is where the command is started.
    monkeypatch.chdir(model.parent)
    words = shlex.split(page["clips"][2]["command"])
    assert words[:3] == ["python", "-m", "infer.sample"]
    again = tmp_path / "again"
    more = [f"output_dir={again}", "save_latents=false"]
    assert execute(SampleCommand(), SAMPLE, "", [*words[3:], *more]) == 0
    (made,) = again.glob("*.mp4")
    frames, _ = read_video(made)
    shown, _ = read_video(done / page["clips"][2]["video"])
    assert np.abs(frames.astype(int) - shown).mean() < 2  # of 255, both compressed


@pytest.mark.parametrize("name", preset_names("experiment"))
def test_every_experiment_composes_and_its_first_cell_runs(name, tmp_path, model):
    config = composed(f"experiment={name}", "num_captions=1", "device=cpu")
    settings = config.settings()
    assert len(settings) == {"none": 1, "attention": 16, "steps": 15}[name.removesuffix("_5b")]
    for setting in settings:
        assert config.evaluation(setting, 0).attention == setting.attention
    tiny = replace(
        config,
        output_dir=str(tmp_path),
        checkpoint=str(model),
        models={},
        grid=GridConfig(attention=config.grid.attention[-1:], steps=[1]),
        prompts=config.prompts[:1],
        reference=replace(config.reference, checkpoint=None, steps=1),
        **dict.fromkeys(("height", "width"), 64),
        num_frames=9,
    )
    assert run(tiny) == 0
    assert len(rows(tmp_path)) == 1


def test_an_experiment_chooses_its_model_and_a_typed_one_wins():
    own = composed("experiment=attention")
    assert (own.checkpoint, own.device) == ("builtin:miniature-teacher", "cpu")
    typed = composed("experiment=attention", "model=mini", "device=cuda:1")
    assert (typed.checkpoint, typed.device) == ("builtin:miniature", "cuda:1")
    assert typed.grid == own.grid
    folder = composed("experiment=attention_5b", "checkpoint=models/5b", "prompt=a fox")
    assert folder.checkpoint == "models/5b"
    assert ablate.read_prompts(folder) == ["a fox"]


@pytest.mark.parametrize("name", ["attention_5b", "steps_5b"])
def test_the_experiments_of_the_5b_are_of_its_size_and_recipe(name):
    config, preset = composed(f"experiment={name}"), composed("model=wan22_ti2v_5b", "prompt=a")
    for same in ("checkpoint", "sampler", "guidance_scale", "negative_prompt", "dtype"):
        assert getattr(config, same) == getattr(preset, same)
    size = (config.num_frames, config.height, config.width)
    assert ((size[0] - 1) // 4 + 1, size[1] // 32, size[2] // 32) == GRID_5B
    assert len(ablate.read_prompts(config)) == 3
    assert not config.in_world


def test_every_attention_of_the_5b_fits_its_grid():
    config = composed("experiment=attention_5b")
    assert {setting.sampler.steps for setting in config.settings()} == {3, 50}
    for setting in config.settings():
        density = network_attention(setting.attention, 2).density(GRID_5B, setting.sampler.steps)
        assert density == 1 if setting.attention_name == "sdpa" else 0 < density < 0.6
        if setting.attention.name == "top_k":  # what its GPU path asks for, in the self-test too
            for tokens in (GRID_5B, SELF_TEST_GRID):
                tiles = tiling(tokens, tuple(setting.attention.tile), torch.device("cpu"))
                assert tiles.tokens.shape[1] % FLEX_BLOCK == 0


def test_the_student_of_the_5b_runs_as_its_preset_does():
    config = composed("experiment=steps_5b")
    teacher, student = ([s for s in config.settings() if s.model == n] for n in config.models)
    assert [s.sampler.steps for s in student] == [3, 1, 2, 4, 8]
    assert config.models["teacher"].checkpoint == config.reference.checkpoint == config.checkpoint
    fast = composed("model=fastwan_ti2v_5b", "prompt=a")
    assert {s.checkpoint for s in student} == {fast.checkpoint}
    assert {(s.sampler.name, s.guidance_scale) for s in student} == {("few_step", 1.0)}
    assert {s.sampler.shift for s in student} == {FEW_STEP_TABLE_SHIFT}
    reference, most = config.reference_of(student[0]), teacher[-1]
    assert (reference.sampler, reference.guidance_scale) == (most.sampler, most.guidance_scale)


def test_typed_lists_become_the_grid():
    words = ["attention=[sdpa,top_k]", "steps=[null,3]", "grid.guidance_scale=[1,3]", "shift=[2]"]
    config = composed(*words, "prompt=a cat, ${running}")
    assert config.prompt == "a cat, ${running}"
    assert len(config.settings()) == 8
    assert {setting.sampler.shift for setting in config.settings()} == {2.0}
    assert [s.sampler.steps for s in config.settings()[:2]] == [None, 3]


def test_a_preset_sets_what_the_grid_leaves_open():
    config = composed("model=fastwan_ti2v_5b", "prompt=a fox", "steps=[null,4]")
    own, four = config.settings()
    assert own.sampler.timesteps == [1000, 757, 522]
    assert (four.sampler.steps, four.sampler.timesteps) == (4, None)
    reference = config.reference_of(own)
    assert reference.sampler.steps == 50
    assert reference.attention == AttentionConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=wan22_ti2v_5b"], "give prompt= or prompt_file="),
        (["experiment=attention", "model=wan22_ti2v_5b", "prompt=a"], "made for model=mini-teach"),
        (["experiment=steps", "model=wan22_ti2v_5b", "prompt=a"], "made for model=mini-teacher;"),
        (["experiment=steps", "model=mini"], "leave model= out"),
        (["experiment=steps", "checkpoint=models/mine"], "models.teacher.checkpoint="),
        (["prompts=[a,a]"], "twice"),
        (["steps=[3,3]"], "grid.steps=[3, 3]: name each value once"),
        (["steps=[null,3]", "sampler.steps=3"], "3 steps twice"),
        (["steps=[0]"], "steps=0: must be between 1 and 1000"),
        (["num_seeds=0"], "at least 1"),
        (["seed=0,1"], "seed=0,1: one value only; num_seeds=2 takes"),
        (["split=heldout", "prompt=a"], "split=heldout: for captions of the miniature's world"),
        (["attention=[sdpa,spatal]"], "did you mean 'spatial'"),
        (["grid.guidance_scale=[0.5]"], "at least 1"),
        (["prompt=a", "prompt_file=b"], "only one"),
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

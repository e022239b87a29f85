"""An evaluation counts what it should, and its ceilings are where they are known to be."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import build, write_tokenizer

from configs.cli import execute
from configs.compose import compose_runs
from configs.evaluation import EvaluateConfig
from infer.evaluate.__main__ import LINE, main
from infer.evaluate.measure import draw_examples, evaluate, summarise, table, wilson_interval
from infer.evaluate.queue import question_key, weights_of
from infer.evaluate.sources import generate, open_pipeline, reconstruct_truth, render_truth
from wan.errors import WanError
from wan.media.labels import BACKGROUND, LINE_HEIGHT
from wan.miniature.world import HELD_OUT


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def settings(*tokens: str) -> EvaluateConfig:
    (run,) = compose_runs(LINE, tokens)
    return run.config


READ = "max_sequence_length=48"
SMALL = ("source=renders", "num_captions=6", "batch_size=4")


def test_captions_are_held_out_fixed_and_do_not_depend_on_their_number():
    few = draw_examples(settings("num_captions=5"))
    many = draw_examples(settings("num_captions=9"))
    assert many[:5] == few
    assert [example.seed for example in few] == [0, 1, 2, 3, 4]
    assert all(example.scene.objects[0].triple in HELD_OUT for example in many)
    assert draw_examples(settings("num_captions=5", "seed=1")) != few
    for example in draw_examples(settings("num_captions=5", "split=train", "num_objects=2")):
        assert len(example.caption.objects) == 2
        assert not {one.triple for one in example.scene.objects} & HELD_OUT


def test_every_attribute_is_stated_unless_omission_is_asked_for():
    full = draw_examples(settings("num_captions=30"))
    assert all(None not in vars(example.caption.objects[0]).values() for example in full)
    sparse = draw_examples(settings("num_captions=30", "omit=1"))
    assert all(example.caption.objects[0].motion is None for example in sparse)


def test_the_truth_scores_full_marks_and_a_shifted_truth_does_not():
    examples = draw_examples(settings(*SMALL))
    config = settings(*SMALL)
    truth = [result for result, _ in evaluate(examples, render_truth(config), 4)]
    summary = summarise(truth)
    assert summary["joint"]["right"] == summary["joint"]["total"] == 6
    assert {name: share["total"] for name, share in summary["attributes"].items()} == dict.fromkeys(
        ("count", "background", "shape", "colour", "size", "motion"), 6
    )
    assert summary["measures"]["motion_ratio"] == pytest.approx(1, abs=0.12)

    scenes = [example.scene for example in examples]
    shifted = [
        replace(example, scene=scene)
        for example, scene in zip(examples, scenes[1:] + scenes[:1], strict=True)
    ]
    wrong = summarise([result for result, _ in evaluate(shifted, render_truth(config), 4)])
    assert wrong["joint"]["accuracy"] < 0.5
    assert wrong["joint"]["accuracy"] <= min(
        share["accuracy"] for share in wrong["attributes"].values()
    )


def test_failed_clips_count_as_failures():
    examples = draw_examples(settings(*SMALL))

    def black(batch):
        return torch.full((len(batch), 3, 17, 128, 128), -1.0)

    def broken(batch):
        video = render_truth(settings(*SMALL))(batch)
        video[:, 0, 3, 5, 5] = float("nan")
        return video

    for source in (black, broken):
        summary = summarise([result for result, _ in evaluate(examples, source, 4)])
        assert summary["joint"]["right"] == 0
        assert summary["attributes"]["shape"] == {
            "accuracy": 0.0,
            "right": 0,
            "total": 6,
            "interval": wilson_interval(0, 6),
        }
        stated = [row for row in summary["confusion"]["shape"].values() if sum(row.values())]
        assert sum(row["none"] for row in stated) == 6
        assert summary["measures"]["shape_iou"] is None
        assert "all that was stated" in table(summary)


def test_the_truth_is_as_diverse_as_the_truth_and_one_clip_for_all_seeds_is_not():
    config = settings(
        *("source=renders", "num_captions=2", "seeds_per_caption=4", "omit=1", "split=train")
    )
    examples = draw_examples(config)
    assert [example.number for example in examples] == [0] * 4 + [1] * 4
    assert [example.seed for example in examples] == list(range(8))
    assert len({example.caption for example in examples}) == 2
    assert len({example.scene for example in examples}) == 8
    true = render_truth(config)
    summary = summarise([result for result, _ in evaluate(examples, true, 4)])
    clips, truth = summary["diversity"]["clips"], summary["diversity"]["truth"]
    assert 0.5 < clips["entropy"] < 1
    assert clips["spread"] > 5
    assert truth["entropy"] == pytest.approx(clips["entropy"], abs=0.4)

    def always_the_same(batch):
        return true([examples[0]]).expand(len(batch), -1, -1, -1, -1)

    summary = summarise([result for result, _ in evaluate(examples, always_the_same, 4)])
    assert summary["diversity"]["clips"] == {"entropy": 0, "cells": 1, "spread": 0}
    assert summary["diversity"]["truth"] == truth
    assert "entropy over seeds, truth" in table(summary)


def test_the_distance_to_the_truth_is_small_for_truth_and_large_for_stills():
    config = settings("source=renders", "num_captions=8")
    examples, true = draw_examples(config), render_truth(config)

    def still(batch):
        return true(batch)[:, :, :1].expand(-1, -1, 17, -1, -1)

    for source, low, high in ((true, -0.5, 0.5), (still, 0.7, 1e6)):
        results = [result for result, _ in evaluate(examples, source, 4)]
        assert low < summarise(results)["distance"]["all"]["kernel"] < high


def test_clips_whose_latents_blow_up_are_wrong_alone(model, monkeypatch):
    config = settings(*tiny(model))
    examples = draw_examples(config)
    pipeline = open_pipeline(config)
    whole = generate(config, pipeline)(examples)
    call = type(pipeline).__call__

    def fragile(self, prompt, *args, seed, **options):
        if 1 in seed:
            raise FloatingPointError("step 1: latents are not finite")
        return call(self, prompt, *args, seed=seed, **options)

    monkeypatch.setattr(type(pipeline), "__call__", fragile)
    videos = generate(config, pipeline)(examples)
    assert videos[1].isnan().all()
    assert torch.equal(videos[::2], whole[::2])


def test_confusions_add_up_to_the_accuracies():
    examples = draw_examples(settings(*SMALL, "num_objects=2"))
    results = [r for r, _ in evaluate(examples, render_truth(settings(*SMALL)), 4)]
    summary = summarise(results)
    for name in ("shape", "colour", "size", "motion"):
        rows = summary["confusion"][name]
        assert sum(sum(row.values()) for row in rows.values()) == 12
        diagonal = sum(row[value] for value, row in rows.items())
        assert diagonal == summary["attributes"][name]["right"]


@pytest.mark.parametrize(("right", "total"), [(435, 512), (1, 3), (9, 10), (511, 512)])
def test_the_bounds_of_a_wilson_interval_are_196_of_their_own_deviations_away(right, total):
    for bound in wilson_interval(right, total):
        z = abs(right / total - bound) / (bound * (1 - bound) / total) ** 0.5
        assert z == pytest.approx(1.959964, rel=1e-6)


def test_wilson_intervals_stay_within_0_and_1():
    z2 = 1.959964**2
    assert wilson_interval(0, 10) == pytest.approx((0, z2 / (10 + z2)))
    assert wilson_interval(10, 10) == pytest.approx((10 / (10 + z2), 1))


def test_the_command_writes_its_record(tmp_path, capsys):
    output, sheet = tmp_path / "new" / "numbers.json", tmp_path / "sheet.png"
    arguments = [*SMALL, f"output={output}", f"sheet={sheet}"]
    assert execute(main, LINE, "", arguments) == 0
    printed = capsys.readouterr().out
    assert "all that was stated" in printed
    record = json.loads(output.read_text())
    assert record["summary"]["joint"]["total"] == 6
    assert record["config"]["source"] == "renders"
    assert len(record["clips"]) == 6
    clip = record["clips"][0]
    assert clip["joint"] is True
    assert clip["seen"]["objects"][0]["shape"] == clip["stated"]["objects"][0]["shape"]
    assert clip["measures"]["motion_ratio"] == pytest.approx(1, abs=0.2)
    assert record["summary"]["distance"].keys() == {"all", "appearance", "motion"}
    features = load_file(output.with_suffix(".safetensors"))
    assert features["clips"].shape == features["truth"].shape == (6, 128)
    assert not sheet.exists()  # nothing failed
    clips = output.with_suffix(".clips")
    assert f"page: {clips / 'index.html'}" in printed
    assert len(list(clips.glob("*.mp4"))) == 6
    text = (clips / "index.html").read_text(encoding="utf-8")
    page = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [clip["video"] for clip in page["clips"]] == [f"00000{i}.mp4" for i in range(6)]
    assert all(clip["right"] for clip in page["clips"])
    again = [*arguments, "keep_clips=2", "offload=stage"]
    assert execute(main, LINE, "", again) == 0  # the same question
    assert execute(main, LINE, "", [*arguments, "split=train"]) == 2
    assert "an evaluation that differs in split" in capsys.readouterr().err
    assert json.loads(output.read_text())["config"]["split"] == "heldout"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with random weights."""
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder / "tokenizer")
    build(folder / "tokenizer").save_pretrained(folder / "whole")
    return folder / "whole"


def tiny(model, *tokens: str) -> list[str]:
    size = ("height=64", "width=64", "num_frames=9")
    return [f"checkpoint={model}", "steps=2", "num_captions=3", READ, *size, *tokens]


def test_a_model_gets_every_caption_with_its_own_seed(model):
    config = settings(*tiny(model))
    examples = draw_examples(config)
    make = generate(config)
    videos = make(examples)
    assert videos.shape == (3, 3, 9, 64, 64)
    assert videos.min() >= -1
    assert videos.max() <= 1
    assert torch.equal(make(examples[1:2]), videos[1:2])
    assert not torch.equal(make([replace(examples[1], seed=9)]), videos[1:2])
    assert not torch.equal(make([replace(examples[1], caption=examples[0].caption)]), videos[1:2])


@pytest.mark.parametrize(
    ("option", "same_clips", "same_key"),
    [
        ("offload=block", True, True),
        ("offload=stage", True, True),
        ("quantize=int8", False, False),
        ("quantize=fp8", False, False),
    ],
)
def test_quantised_weights_are_another_question_and_offloaded_ones_are_not(
    model, option, same_clips, same_key
):
    plain, other = settings(*tiny(model)), settings(*tiny(model, option))
    examples = draw_examples(plain)
    distance = float((generate(other)(examples) - generate(plain)(examples)).abs().max())
    # A CPU's products round by where in memory a weight lies, and blocks are copied.
    assert (distance < 1e-4) == same_clips, distance
    keys = [question_key(config, examples, weights_of(config)) for config in (plain, other)]
    assert (keys[0] == keys[1]) == same_key
    assert question_key(plain, examples[1:], weights_of(plain)) != keys[0]


def test_a_question_names_what_differs_from_loading_as_ever():
    plain = settings("offload=stage").question()
    assert {"device", "dtype"} < plain.keys()
    assert not {"offload", "quantize", "compile"} & plain.keys()
    chosen = settings("quantize=fp8", "compile=dit").question()
    assert chosen == plain | {"quantize": "fp8", "compile": "dit"}
    for source in ("renders", "vae"):  # nothing that could be quantised makes these
        truth = settings(f"source={source}")
        assert settings(f"source={source}", "quantize=fp8").question() == truth.question()


def test_reconstructions_need_only_the_autoencoder(model, tmp_path):
    shutil.copytree(model / "vae", tmp_path / "vae")
    config = settings(*tiny(tmp_path, "source=vae"))
    videos = reconstruct_truth(config)(draw_examples(config))
    assert videos.shape == (3, 3, 9, 64, 64)


def test_the_command_scores_an_untrained_model_and_shows_its_clips(model, tmp_path, capsys):
    output, sheet = tmp_path / "numbers.json", tmp_path / "sheet.png"
    assert execute(main, LINE, "", tiny(model, f"output={output}", f"sheet={sheet}")) == 0
    assert json.loads(output.read_text())["summary"]["joint"]["right"] == 0
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    assert pixels.shape[1] == 5 * 64
    is_heading = (pixels == BACKGROUND).all(-1).any(1).nonzero()[0]  # rows of lines of text
    assert pixels.shape[0] - len(is_heading) == pytest.approx(3 * 64, abs=8)
    assert len(is_heading) >= 3 * LINE_HEIGHT - 8  # what was asked and seen of each clip


def test_a_missing_model_is_one_line(tmp_path, capsys):
    for source in ("model", "vae"):
        arguments = tiny(tmp_path / "none", f"source={source}")
        assert execute(main, LINE, "", arguments) == 2
        assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("source=groundtruth", "model, renders, vae"),
        ("split=test", "heldout, train, any"),
        ("num_objects=3", "num_objects=3: must be between 1 and 2"),
        ("omit=2.0", "omit=2.0: must be between 0 and 1"),
        ("height=96", "square"),
        ("num_frames=5", "at least 9"),
        ("num_captions=0", "at least 1"),
        ("seeds_per_caption=0", "at least 1"),
        ("offload=disk", "offload=disk: choose one of none, stage, block"),
        ("quantize=int4", "quantize=int4: choose one of none, int8, fp8"),
        ("compile=vae", "compile=vae: choose one of none, dit, all"),
        ("output=shift1.3", r"output=shift1\.3: the name must end in \.json"),
        ("sheet=clips", r"sheet=clips: the name must end in \.png or"),
    ],
)
def test_bad_settings_are_refused(token, message):
    with pytest.raises(WanError, match=message):
        settings(token)


def test_the_truths_places_are_those_of_clips_as_long():
    few = settings(
        *("source=renders", "num_captions=2", "seeds_per_caption=2", "omit=1", "split=train"),
        "num_frames=9",
    )
    examples = [replace(one, scene=one.truth) for one in draw_examples(few)]
    results = [result for result, _ in evaluate(examples, render_truth(few), 8)]
    assert [result.num_frames for result in results] == [9] * 4
    diversity = summarise(results)["diversity"]
    assert diversity["clips"]["spread"] == pytest.approx(diversity["truth"]["spread"], rel=0.02)
    twice_as_long = summarise([replace(result, num_frames=17) for result in results])["diversity"]
    assert twice_as_long["truth"]["spread"] != pytest.approx(diversity["truth"]["spread"], rel=0.02)


def test_diversity_takes_captions_of_one_object():
    with pytest.raises(WanError, match="set num_objects=1"):
        settings("seeds_per_caption=2", "num_objects=2")


def test_one_caption_has_no_other():
    config = settings("source=renders", "num_captions=1")
    results = [result for result, _ in evaluate(draw_examples(config), render_truth(config), 1)]
    assert "another caption's" not in table(summarise(results))


def test_a_bad_output_is_refused_before_anything_runs(tmp_path, capsys):
    (tmp_path / "folder.json").mkdir()
    assert execute(main, LINE, "", [*SMALL, f"output={tmp_path}/folder.json"]) == 2
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "files"), [("output", "a.json,b.json"), ("sheet", "a.png,b.png")]
)
def test_points_of_a_sweep_do_not_write_over_each_other(option, files):
    one, _ = files.split(",")
    with pytest.raises(WanError, match=f"{option}={one}: every point of the sweep would write it"):
        compose_runs(LINE, [*SMALL, "seed=0,5", f"{option}={one}"], sweep=True)
    assert len(compose_runs(LINE, [*SMALL, f"{option}={files}"], sweep=True)) == 2

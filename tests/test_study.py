"""A study makes what is missing, goes on past failures, and reports from what is stored."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import build, write_tokenizer

from configs.cli import Run, execute
from configs.compose import compose_runs
from configs.evaluation import (
    CAPTION_SETS,
    CaptionSetConfig,
    EvaluateConfig,
    MatchConfig,
    SettingConfig,
    StudyConfig,
)
from configs.schema import SamplerConfig
from infer.evaluate import parts, queue, report
from infer.evaluate.measure import read_features
from infer.evaluate.queue import LastPipeline, open_source
from infer.processes import Team
from infer.study import run as study
from infer.study.__main__ import LINE, main
from infer.study.report import read_settings
from wan.errors import WanError
from wan.files import read_sealed, write_json, write_sealed
from wan.models.attention_config import AttentionConfig
from wan.weights.safetensors_file import write_tensors


def ceilings(folder: Path, **changes) -> StudyConfig:
    """A study that needs no model: the truth, and the same with fewer captions."""
    renders = SettingConfig(source="renders", line="truth")
    config = StudyConfig(
        output_dir=str(folder),
        checkpoint=str(folder / "none"),
        settings={"renders": renders, "again": replace(renders, share=0.6)},
        match=MatchConfig(student="again", teacher="renders"),
        single=CaptionSetConfig(num_captions=5),
        pair=CaptionSetConfig(num_captions=2, num_objects=2),
        seeds=CaptionSetConfig(2, seeds_per_caption=2, split="train", omit=1.0),
    )
    return replace(config, **changes)


def run(config: StudyConfig) -> int:
    return main(Run(config, {}, {}, ""))


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a study that was run to its end."""
    folder = tmp_path_factory.mktemp("study")
    assert run(ceilings(folder)) == 0
    return folder


@pytest.fixture
def folder(done, tmp_path) -> Path:
    """The same, to change."""
    return Path(shutil.copytree(done, tmp_path / "study"))


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The number of clips of each evaluation that is made from now on. No report is written."""
    monkeypatch.setattr(study, "write_report", lambda *_: "reported")
    numbers: list[int] = []
    evaluate = parts.evaluate

    def counting(examples, source, batch_size):
        numbers.append(len(examples))
        return evaluate(examples, source, batch_size)

    monkeypatch.setattr(parts, "evaluate", counting)
    return numbers


@pytest.mark.parametrize("option", ["only=[other]", "match.repeats=[other]", "match.floor=other"])
def test_a_setting_that_does_not_exist_is_refused_by_the_option_that_names_it(option):
    with pytest.raises(WanError, match=rf"{option.partition('=')[0]}=other: choose one of rend"):
        compose_runs(LINE, [option])


def test_the_shipped_study_composes_and_its_settings_can_be_changed():
    words = ["settings.teacher_unipc_50.share=0.25", "only=[renders]", "quantize=int8"]
    (one,) = compose_runs(LINE, [*words, "offload=block", "compile=dit"])
    config = one.config
    assert config.match.student == "student_3"
    teacher = config.evaluation("teacher_unipc_50", "single")
    assert teacher.num_captions == config.single.num_captions // 4
    assert teacher.sampler == SamplerConfig("unipc", 50)
    assert (teacher.quantize, teacher.offload, teacher.compile) == ("int8", "block", "dit")
    student = config.evaluation("student_3", "pair")
    assert student.sampler == SamplerConfig()  # as its folder says
    assert student.num_objects == 2
    steps = {s.sampler.steps for s in config.settings.values() if s.line == "teacher (UniPC)"}
    assert steps == {50, 25, 10, 8, 4, 3, 2, 1}


def test_every_setting_is_stored_whole(done):
    for name, single in (("renders", 5), ("again", 3)):
        clips = [
            len(json.loads((done / name / f"{captions}.json").read_text())["clips"])
            for captions in CAPTION_SETS
        ]
        assert clips == [single, 2, 4]
    stored = read_settings(ceilings(done), done)
    assert [row.label for row in stored] == ["renders", "again"]
    values, fewer = (row.values for row in stored)
    assert values["joint"].tolist() == [1.0] * 5
    assert values["entropy"].shape == (2,)
    assert values["clips"].shape == values["truth"].shape == (5, 128)
    assert torch.equal(fewer["clips"], values["clips"][:3])


def test_the_report_has_a_row_per_setting_a_picture_and_the_rule(done, capsys):
    assert run(ceilings(done, report_only=True)) == 0
    printed = capsys.readouterr().out
    assert "again against renders: open" in printed  # three captions show nothing
    twice = replace(ceilings(done), match=MatchConfig("again", ["renders"], "renders"))
    assert run(replace(twice, report_only=True)) == 0
    assert "again (mean of 2 trainings) against renders: open" in capsys.readouterr().out
    assert "motion ratio: ratio" in printed
    rows = [line for line in (done / "report.md").read_text().splitlines() if line[:1] == "|"]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| renders", "| again"]
    assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert "100.0% (" in rows[2]
    assert rows[2].endswith("| 5 + 2 + 2 |")
    with Image.open(done / "report.png") as picture:
        assert len(picture.getcolors(2**20) or range(2**20)) > 10


def test_what_is_stored_is_not_made_again_and_what_changed_is(folder, made, capsys):
    config = ceilings(folder)
    assert run(config) == 0
    assert made == []
    config.settings["again"] = replace(config.settings["again"], share=0.8)
    assert run(config) == 0
    assert made == [1]  # of one object there were three; the other sets keep their two captions
    (folder / "renders" / "pair.json").unlink()
    assert run(config) == 0
    assert made == [1, 2]
    config.settings["again"] = replace(config.settings["again"], sampler=SamplerConfig(steps=7))
    assert "made again" not in capsys.readouterr().err
    assert run(config) == 0
    assert made == [1, 2, 4, 2, 4]
    said = "again, single: the 4 clips that are stored had other settings, captions or weights"
    assert said in capsys.readouterr().err
    (aside,) = (folder / "again").glob("single-*.json")
    assert len(read_sealed(aside)["clips"]) == 4  # nothing that was measured is lost
    assert read_features(aside)["clips"].shape[0] == 4


def test_the_page_has_clips_of_every_setting_and_points_over_seconds(done):
    text = (done / "index.html").read_text(encoding="utf-8")
    page = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert {axis["name"] for axis in page["axes"]} == {"prompt", "setting", "captions", "seed"}
    assert len(page["clips"]) == (5 + 2 + 4) + (3 + 2 + 4)
    assert all((done / clip["video"]).is_file() for clip in page["clips"])
    assert page["clips"][0]["command"].startswith("python -m infer.evaluate source=renders")
    assert [point["label"] for point in page["points"]] == ["renders", "again"]
    assert page["points"][0]["y"][0] == [1.0, pytest.approx(0.565, abs=0.01), 1.0]


@pytest.mark.parametrize("name", ["single.json", "single.safetensors"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-20] + bytes([content[-20] ^ 1]) + content[-19:],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        None,
    ],
    ids=["flipped", "cut", "empty", "gone"],
)
def test_damaged_results_are_made_again_and_a_report_leaves_them_out(
    folder, made, capsys, name, damage
):
    file = folder / "renders" / name
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    assert run(ceilings(folder, report_only=True)) == 0
    said = capsys.readouterr().err
    assert f"renders: {file}" in said or (name, damage) == ("single.json", None)
    assert [row.label for row in read_settings(ceilings(folder), folder)] == ["again"]
    assert made == []
    capsys.readouterr()
    assert run(ceilings(folder)) == 0
    assert made == [5]
    assert ("made again" in capsys.readouterr().err) == ((name, damage) != ("single.json", None))
    assert len(read_settings(ceilings(folder), folder)) == 2


def test_records_of_an_older_release_without_digests_are_read(folder, made):
    for file in folder.glob("*/*.json"):
        write_json(file, read_sealed(file))
    for file in folder.glob("*/*.safetensors"):
        write_tensors(file, load_file(file))
    assert run(ceilings(folder)) == 0
    assert made == []
    assert len(read_settings(ceilings(folder), folder)) == 2


def test_what_grew_is_what_would_have_been_made_at_once(folder, made, tmp_path):
    more = {"single": CaptionSetConfig(8), "only": ["renders"]}
    more["seeds"] = CaptionSetConfig(5, seeds_per_caption=2, split="train", omit=1.0)
    assert run(ceilings(folder, **more)) == 0
    assert run(ceilings(tmp_path / "once", **more)) == 0
    assert made == [3, 6, 8, 2, 8, 2]

    def without_seconds(value):
        """Numbers to nine places: least squares differ in the last bits from call to call."""
        if isinstance(value, dict):
            kept = {name: part for name, part in value.items() if "seconds" not in name}
            return {name: without_seconds(part) for name, part in kept.items()}
        if isinstance(value, list):
            return [without_seconds(part) for part in value]
        return round(value, 9) if isinstance(value, float) else value

    def record(folder: Path, captions: str) -> dict:
        return without_seconds(read_sealed(folder / "renders" / f"{captions}.json"))

    for captions in CAPTION_SETS:
        assert record(folder, captions) == record(tmp_path / "once", captions)
        grown, once = (
            load_file(where / "renders" / f"{captions}.safetensors")
            for where in (folder, tmp_path / "once")
        )
        assert all(torch.equal(grown[name], once[name]) for name in once)


def test_more_than_is_asked_for_is_kept_and_reported(folder, made):
    config = ceilings(folder, single=CaptionSetConfig(4))
    assert run(config) == 0
    assert made == []
    stored = read_settings(config, folder)
    assert [len(row.values["joint"]) for row in stored] == [4, 2]  # all the same captions
    assert [len(row.values["clips"]) for row in stored] == [4, 2]


def test_clips_of_another_machine_are_not_added_to(folder, made, capsys):
    file = folder / "renders" / "single.json"
    record = read_sealed(file)
    write_sealed(file, record | {"threads": record["threads"] + 1})
    assert run(ceilings(folder, single=CaptionSetConfig(6), only=["renders"])) == 1
    assert made == []
    assert "the 5 clips there were made with" in capsys.readouterr().err


def test_results_of_an_earlier_format_are_made_again(folder, made, monkeypatch):
    monkeypatch.setattr(queue, "FORMAT", queue.FORMAT + 1)
    assert run(ceilings(folder, only=["renders"])) == 0
    assert made == [5, 2, 4]


def test_clips_are_of_the_weights_that_were_there_when_they_were_begun(
    tmp_path, models, made, monkeypatch
):
    """A model that is replaced meanwhile gets clips of its own."""
    copy = Path(shutil.copytree(models / "teacher", tmp_path / "copy"))
    weights = next((copy / "transformer").glob("*.safetensors"))
    few = {"single": CaptionSetConfig(2), "pair": CaptionSetConfig(2, num_objects=2)}
    config = ceilings(
        tmp_path,
        settings={"model": SettingConfig(sampler=SamplerConfig(steps=1))},
        match=MatchConfig("model", teacher="model", floor="model"),
        checkpoint=str(copy),
        **few,
    )
    evaluate = parts.evaluate

    def replacing(*args):
        yield from evaluate(*args)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(parts, "evaluate", replacing)
        patch.setattr(study, "CAPTION_SETS", ("single",))
        run(config)
    assert made == [2]
    assert run(config) == 0
    assert made == [2, 2, 2, 4]  # those of one object too
    assert run(config) == 0
    assert made == [2, 2, 2, 4]


def test_an_interruption_costs_the_part_at_hand(tmp_path, made, monkeypatch):
    evaluate = parts.evaluate

    def stop_in_the_second_part(examples, source, batch_size):
        for index, one in enumerate(evaluate(examples, source, batch_size)):
            if index == 2 and made[-1] == 4:
                raise KeyboardInterrupt
            yield one

    seeds = CaptionSetConfig(6, seeds_per_caption=2, split="train", omit=1.0)
    config = ceilings(tmp_path, only=["renders"], seeds=seeds)
    with monkeypatch.context() as patch:
        patch.setattr(parts, "evaluate", stop_in_the_second_part)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert made == [5, 2, 8, 4]
    (part,) = (tmp_path / "renders" / "seeds.parts").glob("*.json")
    assert run(config) == 0
    assert made == [5, 2, 8, 4, 4]
    assert not part.parent.exists()
    assert len(read_sealed(tmp_path / "renders" / "seeds.json")["clips"]) == 12


def test_a_setting_that_fails_is_named_and_the_others_are_made(folder, made, capsys):
    broken = SettingConfig(checkpoint=str(folder / "nowhere"))
    config = ceilings(folder)
    config.settings = {"broken": broken, **config.settings}
    shutil.rmtree(folder / "again")
    assert run(config) == 1
    assert made == [3, 2, 4]
    printed = capsys.readouterr()
    assert "no such folder" in printed.err
    assert "1 settings failed: broken" in printed.err
    assert "reported" in printed.out


def test_results_of_other_settings_are_left_out_of_the_report(folder, capsys, monkeypatch):
    monkeypatch.setattr(report.Report, "draw", lambda *_: None)
    config = ceilings(folder, report_only=True)
    config.settings["again"] = replace(config.settings["again"], share=1.0)
    assert run(config) == 0
    printed = capsys.readouterr()
    assert "again: not all captions are stored" in printed.err
    assert "no verdict, as there are no results of again" in printed.out
    assert "again" not in (folder / "report-2.md").read_text().split("Captions:")[0]
    assert "| again |" in (folder / "report.md").read_text()  # what it held stays
    config.settings["again"] = SettingConfig(source="renders", share=0.6)
    assert run(replace(config, single=CaptionSetConfig(5, seed=1))) == 1
    assert "again: stored with other settings" in capsys.readouterr().err


def test_results_of_two_models_are_left_out_of_the_report(folder, capsys):
    for captions, digest in (("single", "old"), ("pair", "new"), ("seeds", "new")):
        file = folder / f"again/{captions}.json"
        record = read_sealed(file)
        assert record["weights"] is None  # the world itself
        write_sealed(file, record | {"weights": {"transformer": digest}})
    assert run(ceilings(folder, report_only=True)) == 0
    printed = capsys.readouterr()
    assert "again: stored of two models, left out" in printed.err
    assert "no verdict, as there are no results of again" in printed.out


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    assert run(ceilings(tmp_path, report_only=True)) == 1
    assert "no stored results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": ["teacher"]}, "choose one of renders, again"),
        ({"match": MatchConfig(student="again", teacher="teacher")}, "choose one of"),
        ({"match": MatchConfig("again", ["third"], "renders")}, "choose one of"),
        ({"settings": {}}, "at least one setting"),
        (
            {
                "settings": {"../up": SettingConfig()},
                "match": MatchConfig("../up", teacher="../up"),
            },
            "letters",
        ),
    ],
)
def test_bad_studies_are_refused(tmp_path, changes, message):
    with pytest.raises(WanError, match=message):
        ceilings(tmp_path, **changes)


def test_bad_shares_are_refused():
    assert execute(main, LINE, "", ["settings.renders.share=0"]) == 2
    with pytest.raises(WanError, match=r"share=1.5: must lie in \(0, 1\]"):
        SettingConfig(share=1.5)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A tiny teacher and student with random weights."""
    folder = tmp_path_factory.mktemp("models")
    write_tokenizer(folder / "tokenizer")
    teacher = build(folder / "tokenizer")
    teacher.save_pretrained(folder / "teacher")
    shutil.copytree(folder / "teacher", folder / "student")
    index = folder / "student" / "model_index.json"
    content = json.loads(index.read_text()) | {"_class_name": "WanDMDPipeline"}
    index.write_text(json.dumps(content))
    return folder


def test_settings_of_one_model_share_it_and_students_run_as_trained(tmp_path, models):
    teacher = SettingConfig(checkpoint=str(models / "teacher"), sampler=SamplerConfig(steps=4))
    student = SettingConfig(checkpoint=str(models / "student"))
    settings = {
        "many": teacher,
        "few": replace(teacher, sampler=SamplerConfig("euler", 2), guidance_scale=1.0),
        "student": student,
        "one": replace(student, sampler=SamplerConfig(timesteps=[1000.0]), allow_untrained=True),
        "untrained": replace(student, sampler=SamplerConfig(steps=7)),
        "renders": SettingConfig(source="renders"),
    }
    match = MatchConfig("student", teacher="many")
    config = ceilings(tmp_path, settings=settings, match=match)
    loaded = LastPipeline()
    plans, pipelines = {}, {}
    for name in ("many", "few", "student", "one"):
        question = config.evaluation(name, "single")
        _, plans[name] = open_source(question, loaded)
        pipelines[name] = loaded.get(question)
    assert pipelines["many"] is pipelines["few"]
    assert pipelines["student"] is pipelines["one"] is not pipelines["few"]
    assert {name: plan["steps"] for name, plan in plans.items()} == {
        **{"many": 4, "few": 2},
        **{"student": 3, "one": 1},
    }
    assert plans["few"]["sampler"] == "euler"
    again = loaded.get(replace(question, quantize="int8"))
    assert again is not pipelines["student"]
    assert loaded.get(replace(question, quantize="int8")) is again
    causal = replace(config.settings["few"], attention=AttentionConfig("frame_causal"))
    config.settings["causal"] = causal
    same = loaded.get(config.evaluation("many", "single"))
    assert loaded.get(config.evaluation("causal", "single")) is same
    assert same.transformer.attention.config.name == "frame_causal"
    loaded.get(config.evaluation("many", "single"))
    assert same.transformer.attention.config.name == "sdpa"
    assert plans["one"]["untrained"]
    with pytest.raises(WanError, match="allow_untrained"):
        open_source(config.evaluation("untrained", "single"), loaded)


def test_a_first_clip_is_begun_once_per_model_attention_and_size(models):
    plain = EvaluateConfig(
        checkpoint=str(models / "teacher"),
        sampler=SamplerConfig(steps=4),
        guidance_scale=1.0,
        device="cpu",
    )
    loaded, evaluations = LastPipeline(), []
    loaded.get(plain).transformer.register_forward_hook(lambda *_: evaluations.append(1))

    def warm_up(size: int = 32, **changes) -> tuple[bool, int]:
        """Whether it took time, and how many evaluations."""
        evaluations.clear()
        call = {"height": size, "width": size, "num_frames": 9, "negative_prompt": None}
        seconds = loaded.warm_up(replace(plain, **changes), "a circle", **call)
        return seconds > 0, len(evaluations)

    new, known = (True, 1), (False, 0)
    assert [warm_up(), warm_up(), warm_up(sampler=SamplerConfig(steps=7))] == [new, known, known]
    assert [warm_up(size=64), warm_up(size=32)] == [new, known]
    causal = AttentionConfig("frame_causal")
    assert [warm_up(attention=causal), warm_up(attention=causal)] == [new, known]
    late = AttentionConfig("frame_causal", steps="2-")  # the first two steps leave it out
    assert warm_up(attention=late) == (True, 3)
    with pytest.raises(WanError, match="none of the 1 steps"):
        warm_up(size=64, attention=late, sampler=SamplerConfig(steps=1))


def test_the_seconds_of_a_setting_are_without_its_warm_up(tmp_path, models, monkeypatch):
    asked = []
    warm_up = LastPipeline.warm_up

    def noting(self, config, prompt, **call):
        asked.append((len(made), warm_up(self, config, prompt, **call)))
        return asked[-1][1]

    made: list[int] = []
    evaluate = parts.evaluate
    monkeypatch.setattr(parts, "evaluate", lambda *a: made.append(1) or evaluate(*a))
    monkeypatch.setattr(LastPipeline, "warm_up", noting)
    monkeypatch.setattr(study, "CAPTION_SETS", ("single", "pair"))
    config = ceilings(
        tmp_path,
        settings={"few": SettingConfig(sampler=SamplerConfig(steps=1))},
        match=MatchConfig("few", teacher="few", floor="few"),
        checkpoint=str(models / "teacher"),
        single=CaptionSetConfig(num_captions=2),
    )
    assert study.run_settings(config, tmp_path, Team()) == {}
    stored = [json.loads((tmp_path / "few" / f"{c}.json").read_text()) for c in study.CAPTION_SETS]
    assert [record["warmup_seconds"] for record in stored] == [seconds for _, seconds in asked]
    assert [count for count, _ in asked] == [0, 1]  # before the clips
    assert asked[0][1] > 0
    assert asked[1][1] == 0  # the same model, attention and size

"""A page shows clips of any folder: found from their records, linked, quoted, and never trusted."""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.cli import execute
from configs.compose import compose_runs
from configs.evaluation import EvaluateConfig
from configs.schema import SamplerConfig
from infer.gallery.__main__ import LINE, main
from infer.gallery.command import command, sample_command
from infer.gallery.page import MARK, Clip, Measure, Page, Point, layout, page_data, write_page
from infer.gallery.records import write_sweep
from infer.rerun.__main__ import LINE as RERUN
from infer.sample.__main__ import LINE as SAMPLE
from wan.files import expanded, write_sealed
from wan.media.video import write_video
from wan.models.attention_config import AttentionConfig

HOSTILE = """</script><script>document.title="hit"</script>"'&<b>&lt;\u202e % # ${x}"""


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A video of 9 frames in which a square moves."""
    frames = np.full((9, 32, 32, 3), 30, dtype=np.uint8)
    for number, frame in enumerate(frames):
        frame[8:16, 2 * number : 2 * number + 8] = (220, 40, 40)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, frames, 8)
    return path


def record(folder: Path, stem: str, prompt: str = "a fox", seed: int = 0, **settings) -> Path:
    """The record of a video as `infer.sample` writes it, as far as it is read here."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"checkpoint": "builtin:miniature", "sampler.steps": 3} | settings
    path = folder / f"{stem}.json"
    write_sealed(
        path,
        {
            "record_version": 1,
            "status": "done",
            "prompt": prompt,
            "seed": seed,
            "settings": {n: {"value": v, "from": "command line"} for n, v in values.items()},
            "video": {"file": "../elsewhere.mp4", "frames": 9, "height": 32, "width": 32, "fps": 8},
            "seconds": {"load": 1.0, "denoise": 0.5, "total": 0.5},
        },
    )
    return path


def page_of(folder: Path, capsys, *words: str) -> dict:
    """The data of the page that the command writes."""
    assert execute(main, LINE, "", [str(folder), *words]) == 0
    page = folder / "gallery.html"
    assert capsys.readouterr().out.splitlines() == [str(page)]
    text = page.read_text(encoding="utf-8")
    assert text.count("<script") == 2
    return json.loads(text.split('type="application/json" id="data">')[1].split("</script>")[0])


def test_the_command_finds_the_videos_of_a_sweep_and_what_varies(tmp_path, clip, capsys):
    for number, steps in enumerate((3, 8)):
        for seed in (0, 1):
            stem = f"0000{2 * number + seed}_x_s{seed}"
            where = record(
                tmp_path / "a b" / str(number), stem, seed=seed, **{"sampler.steps": steps}
            )
            shutil.copy(clip, where.with_suffix(".mp4"))
    record(tmp_path / ".hidden", "00000_y_s0")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "broken.json").write_text('{"record_version": 1')
    page = page_of(tmp_path, capsys, "title=Three steps, and eight")
    assert page["title"] == "Three steps, and eight"
    assert [(axis["name"], axis["values"]) for axis in page["axes"]] == [
        ("steps", ["3", "8"]),
        ("seed", ["0", "1"]),
    ]
    assert dict(page["common"]) == {"prompt": "a fox", "model": "builtin:miniature"}
    assert [one["at"] for one in page["clips"]] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert page["clips"][3]["video"] == "a%20b/1/00003_x_s1.mp4"
    assert page["clips"][3]["seconds"] == 0.5
    assert shlex.split(page["clips"][3]["command"])[3] == "./a b/1/00003_x_s1.json"


def test_what_a_record_says_is_shown_and_not_followed(tmp_path, clip, capsys):
    where = record(tmp_path, "00000_#%?_s0", HOSTILE)
    shutil.copy(clip, where.with_suffix(".mp4"))
    failed = record(tmp_path, "00001_x_s0")
    (one, two) = page_of(tmp_path, capsys)["clips"]
    assert one["video"] == "00000_%23%25%3F_s0.mp4"
    assert two["video"] is None
    assert two["why"] == "the video is not there"
    assert shlex.split(one["command"])[-1] == f"./{where.name}"
    shutil.copy(clip, failed.with_suffix(".mp4"))
    failed.write_text(failed.read_text().replace('"a fox"', '"another"'))  # not what was sealed
    assert execute(main, LINE, "", [str(tmp_path)]) == 0
    assert "does not match its digest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chosen", "other"),
    [
        (("checkpoint", "one", "two"), ("sampler.shift", 3.0, 8.0)),
        (("sampler.steps", 3, 4), ("sampler.grid", None, "uniform")),
    ],
)
def test_settings_that_follow_from_others_are_no_axis(chosen, other, tmp_path, capsys):
    """Unless somebody typed them, or the machine decided them."""
    follows, machine = other[0], "device"
    for number in (0, 1):
        path = record(tmp_path, f"0000{number}_x_s0", **{chosen[0]: chosen[1 + number]})
        values = json.loads(path.read_text())
        del values["digest"]
        values["settings"][follows] = {"value": other[1 + number], "from": "checkpoint"}
        values["settings"][machine] = {"value": ("cpu", "cuda")[number], "from": "default"}
        write_sealed(path, values)
    (name, *more) = [axis["name"] for axis in page_of(tmp_path, capsys)["axes"]]
    assert (name, more) == ({"checkpoint": "model"}.get(chosen[0], "steps"), [machine])
    values["settings"][follows]["from"] = "command line"
    write_sealed(path, values)
    assert len(page_of(tmp_path, capsys)["axes"]) == 3


def measured(folder: Path, **videos: dict) -> None:
    """measures.json as `infer.measure` writes it: numbers by the name of each video."""
    of = {name: {n: {"value": v} for n, v in numbers.items()} for name, numbers in videos.items()}
    write_sealed(folder / "measures.json", {"networks": {}, "videos": of})


def test_the_numbers_of_infer_measure_are_on_the_page(tmp_path, capsys):
    """From the page's folder, else from one nearer to the video; what is no number is none."""
    for folder, stem in (("a", "one"), ("a", "two"), ("b", "three")):
        record(tmp_path / folder, stem)
    measured(tmp_path, **{"a/one.mp4": {"text": 21.5, "motion": None, "other": 1}})
    measured(tmp_path / "a", **{"one.mp4": {"text": 1}, "two.mp4": {"motion": 3, "text": "<b>"}})
    (tmp_path / "b" / "measures.json").write_text("{")
    assert execute(main, LINE, "", [str(tmp_path)]) == 0
    assert "no measures are shown from it" in capsys.readouterr().err
    page = page_of(tmp_path, capsys)
    assert page["measures"] == [
        {"name": "text agreement", "format": ".2f"},
        {"name": "motion, %/s", "format": ".2f"},
    ]
    assert [one["measures"] for one in page["clips"]] == [[21.5, None], [None, 3], [None, None]]


def test_numbers_are_written_as_exactly_as_they_differ(tmp_path, capsys):
    for number, guidance in enumerate([1.0000001, 1.0000002, 3.0, 4]):
        record(tmp_path, f"0000{number}_x_s0", guidance_scale=guidance)
    (axis,) = page_of(tmp_path, capsys)["axes"]
    assert axis["values"] == ["1.0000001", "1.0000002", "3", "4"]


@pytest.mark.parametrize("folder", ["r=1", "-x", "record=1"])
def test_the_command_of_a_page_names_a_file_and_no_option(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / folder, "00000_x_s0")
    for place in (".", f"./{folder}"):
        assert execute(main, LINE, "", [place]) == 0
        page = Path(capsys.readouterr().out.strip()).read_text(encoding="utf-8")
        words = shlex.split(
            json.loads(page.split('id="data">')[1].split("<")[0])["clips"][0]["command"]
        )
        (run,) = compose_runs(RERUN, words[3:])
        assert expanded(run.config.record).is_file()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "no such folder"),
        ("x.md", "x.md: a file, not a folder"),
        (".", "no record of infer.sample"),
    ],
)
def test_a_folder_without_videos_is_one_line(folder, message, tmp_path, capsys):
    (tmp_path / "x.md").touch()
    assert execute(main, LINE, "", [str(tmp_path / folder)]) == 2
    assert message in capsys.readouterr().err


def test_another_programs_page_is_not_replaced(tmp_path, capsys):
    record(tmp_path, "00000_x_s0")
    (tmp_path / "index.html").write_text(MARK)  # a report's
    (tmp_path / "gallery.html").write_text("<h1>mine</h1>")
    assert execute(main, LINE, "", [str(tmp_path)]) == 2
    assert "another program's file" in capsys.readouterr().err
    (tmp_path / "gallery.html").write_text(MARK)
    assert execute(main, LINE, "", [str(tmp_path)]) == 0
    assert (tmp_path / "index.html").read_text() == MARK


def test_a_sweep_replaces_no_older_ones_table_or_page(tmp_path, capsys):
    paths = [record(tmp_path, f"0000{number}_x_s{number}", seed=number) for number in range(3)]
    write_sweep(paths)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"00000_sweep.md", "00000_sweep.html"} <= before.keys()
    (tmp_path / "00000_sweep-2.html").write_text("mine")
    write_sweep(paths[:2])
    assert "00000_sweep-3.md" in capsys.readouterr().err
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    assert len((tmp_path / "00000_sweep-3.md").read_text().splitlines()) == 4
    assert "Sweep 00000-3" in (tmp_path / "00000_sweep-3.html").read_text()


def test_numbers_that_json_lacks_are_none(tmp_path):
    clip = Clip("a", {}, None, seconds=float("inf"), measures=[float("nan"), 1.0])
    (one,) = page_data(Page("x", [clip]), tmp_path)["clips"]
    assert (one["seconds"], one["measures"]) == (None, [None, 1.0])


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        ([], "", ""),
        (["prompt"], "", ""),
        (["steps"], "", "0"),
        (["prompt", "steps"], "0", "1"),
        (["prompt", "attention", "steps"], "0", "setting"),
        (["attention", "steps"], "0", "1"),
        (["prompt", "seed"], "0", "1"),
        (["steps", "seed"], "1", "0"),
    ],
)
def test_a_page_begins_with_prompts_down_and_settings_across(names, rows, columns):
    assert layout(names) == (rows, columns)


@pytest.mark.parametrize("prompt", [HOSTILE, 'it\'s "a" fox\nand $HOME, `x`', "  a, b=c "])
def test_the_command_of_a_clip_is_read_as_what_made_it(prompt, tmp_path):
    question = EvaluateConfig(
        checkpoint="runs/a b",
        sampler=SamplerConfig("unipc", timesteps=[999.5, 500.0], shift=5.0),
        guidance_scale=3.5,
        attention=AttentionConfig("sliding_tile", layers="0-2 8-", tile=[1, 2, 2]),
        allow_untrained=True,
        dtype="bfloat16",
        negative_prompt="a 'square'",
    )
    words = shlex.split(sample_command(question, prompt, 7, tmp_path))
    assert words[:3] == ["python", "-m", "infer.sample"]
    (run,) = compose_runs(SAMPLE, words[3:])
    config = run.config
    for name in ("checkpoint", "sampler", "guidance_scale", "attention", "dtype", "height"):
        assert getattr(config, name) == getattr(question, name)
    assert (config.prompt, config.seed, config.negative_prompt) == (prompt, 7, "a 'square'")
    absolute = command("infer.sample", replace(config, checkpoint="/home/me/model"), tmp_path)
    assert "checkpoint=model" in absolute  # as in all that is kept


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory, clip) -> Path:
    """A page of 1,000 clips: 25 prompts, 8 attentions, 5 numbers of steps; two files are shared."""
    folder = tmp_path_factory.mktemp("grid") / "a #1 100% 'x'"
    folder.mkdir()
    # the second name is no UTF-8
    videos = [folder / "one #?.mp4", folder / os.fsdecode(b"two%20 \xe9.mp4")]
    for video in videos:
        shutil.copy(clip, video)
    prompts = [HOSTILE, *(f"a fox, number {number}" for number in range(24))]
    names = ("sdpa", "spatial", "temporal", "top_k", "math", "sliced", "flash", "cudnn")
    clips, points = [], []
    for steps in (1, 2, 4, 8, 50):
        for name in names:
            for number, prompt in enumerate(prompts):
                right = number < steps
                clips.append(
                    Clip(
                        prompt,
                        {"attention": name, "steps": str(steps)},
                        videos[number % 2],
                        seconds=steps / 10,
                        measures=[number / steps],
                        right=right,
                        failed=() if right else ("colour",),
                        facts=[("seen", f"a fox, {HOSTILE}", right)],
                        command=f"python -m infer.sample steps={steps}",
                        point=len(points),
                    )
                )
            x, y = steps / 10 * 1.15 ** names.index(name), min(1.0, steps / 25)
            points.append(Point(f"{name}, {steps}", name, [(x, x, x)], [(y, y - 0.1, y + 0.1)]))
    measures = [Measure("share", ".1%")]
    write_page(folder / "index.html", Page(HOSTILE, clips, ["a note"], {}, measures, points=points))
    return folder / "index.html"


def wait_for(browser, script: str, seconds: float = 10):
    """The first true value of a script's expression."""
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, seconds, 0.05)
    return wait.until(lambda driver: driver.execute_script(f"return {script}"), script)


@pytest.fixture
def page(browser, grid):
    """The page of 1,000 clips, opened anew from the disk."""
    browser.set_window_size(1280, 900)
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(grid.as_uri())
    yield browser
    assert not browser.get_log("browser")


def click(browser, selector: str, script: str = "[0]") -> None:
    browser.execute_script(f"document.querySelectorAll({selector!r}){script}.click()")


CLIPS = "document.querySelectorAll('main .clip').length"
VIDEO = "document.querySelector('main video')"


@pytest.mark.browser
def test_a_thousand_clips_are_there_at_once_and_those_in_view_play_in_step(page):
    loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert wait_for(page, f"{loaded} > 0 && {loaded}") < 3000  # milliseconds
    assert page.execute_script(f"return {CLIPS}") == 1000
    wait_for(page, f"{VIDEO} && {VIDEO}.currentTime > 0.2")
    players = "[...document.querySelectorAll('main video')]"
    assert 0 < page.execute_script(f"return {players}.length") < 200
    wait_for(page, f"{players}.every(v => Math.abs(v.currentTime - {VIDEO}.currentTime) < 0.25)")
    click(page, "#play")
    assert wait_for(page, f"{players}.every(v => v.paused)")
    page.execute_script("document.querySelector('.scroll').scrollTop = 1e6")
    wait_for(page, f"{VIDEO} && {VIDEO}.closest('tr').rowIndex > 5")  # the first ones are gone


@pytest.mark.browser
def test_filters_and_rows_and_sorting_leave_what_they_say(page):
    click(page, "#filters details:nth-child(3) input")  # of steps: 1
    assert page.execute_script(f"return {CLIPS}") == 800
    page.execute_script(
        "const v = document.getElementById('verdict'); v.value = 'right'; v.onchange({target: v});"
    )
    assert page.execute_script(f"return {CLIPS}") == 8 * (2 + 4 + 8 + 25)
    page.execute_script(
        "const s = document.getElementById('search'); s.value = 'NUMBER 7'; s.oninput({target: s});"
    )
    assert page.execute_script(f"return {CLIPS}") == 8 * 2  # 7 and 17, at 50 steps
    assert "16 of 1,000 clips" in page.find_element("id", "count").text
    click(page, "#reset")
    assert page.execute_script(f"return {CLIPS}") == 1000
    choose = (
        "const s = document.getElementById('{}'); s.value = '{}'; s.onchange({{target: s}}); "
        "return [...document.querySelectorAll('tbody th')].map(th => th.textContent)"
    )
    assert page.execute_script(choose.format("rows", "2"))[0] == "steps 1"
    page.execute_script("document.getElementById('down').click()")
    assert page.execute_script(choose.format("sort", "seconds"))[0] == "steps 50"
    heads = "return document.querySelectorAll('thead th').length"
    page.execute_script(choose.format("columns", "1"))
    assert page.execute_script(heads) == 1 + 8
    assert page.execute_script(f"return {CLIPS}") == 1000


@pytest.mark.browser
def test_a_point_shows_its_clip_and_can_be_kept_alone(page):
    from selenium.webdriver import ActionChains

    dots = "document.querySelectorAll('.plot circle')"
    assert page.execute_script(f"return {dots}.length") == 40
    dot = page.find_elements("css selector", ".plot circle")[9]
    ActionChains(page).move_to_element(dot).perform()
    assert page.find_element("css selector", "#preview p").text == "spatial, 2"
    wait_for(page, "document.querySelector('#preview video').currentTime > 0.1")
    click(page, "#preview button:last-child")
    assert page.execute_script(f"return {CLIPS}") == 25


@pytest.mark.browser
def test_hostile_texts_are_texts_and_the_details_say_all(page):
    shown = "return document.querySelector('{}').textContent"
    assert page.title == " ".join(HOSTILE.replace("\u202e", "\\u202e").split())
    assert page.execute_script(shown.format("tbody th")) == HOSTILE
    assert (
        page.execute_script("return document.querySelectorAll('main b, main script').length") == 0
    )
    click(page, "tbody .frame")
    assert page.execute_script(shown.format("#caption")) == HOSTILE
    text = page.execute_script(shown.format("dialog"))
    for part in ("verdict", "right", f"a fox, {HOSTILE}", "one #?.mp4", "infer.sample steps=1"):
        assert part in text
    wait_for(page, "document.querySelector('dialog video').currentTime > 0.1")
    click(page, "dialog button", "[1]")  # the next one
    assert "a fox, number 0" in page.execute_script(shown.format("#caption"))
    assert "two%20 \\udce9.mp4" in page.execute_script(shown.format("dialog"))
    wait_for(page, "document.querySelector('dialog video').currentTime > 0.1")


@pytest.mark.browser
def test_a_phone_scrolls_down_only(page):
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        wait_for(page, "innerWidth === 390")
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        click(page, "tbody .frame")
        width = "document.querySelector('dialog').getBoundingClientRect().width"
        assert page.execute_script(f"return {width}") <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

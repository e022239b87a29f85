"""The page for experiments: what its form does, without the page, and the page in a browser."""

import importlib.util
import json
import socket
import time
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from configs.app import AppConfig
from configs.compose import compose_runs
from infer.app.__main__ import LINE, main
from infer.app.cards import history_cards, side_cards
from infer.app.studio import Shared, Side, State, Studio, options_of
from infer.sample.line import LINE as SAMPLE
from wan.errors import WanError
from wan.files import write_sealed

PROMPT = "a large red circle moving right on a gray background"
GRADIO = importlib.util.find_spec("gradio") is not None


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio(AppConfig(output_dir=str(tmp_path_factory.mktemp("app"))))


def last(states):
    return list(states)[-1]


def test_a_form_is_the_command_that_it_stands_for():
    shared = Shared("a, [b]", "7", "64", "", "5", allow_untrained=True)
    side = Side("mini-teacher", " 1000, 500", "spatial", "3")
    (run,) = compose_runs(SAMPLE, options_of(shared, side, AppConfig(offload="stage")))
    config = run.config
    assert (config.prompt, config.seed, config.height, config.num_frames) == ("a, [b]", 7, 64, 5)
    assert config.width is None  # the model's own
    assert config.sampler.timesteps == [1000, 500]
    assert (config.attention.name, config.guidance_scale) == ("spatial", 3.0)
    assert config.allow_untrained
    assert config.offload == "stage"
    (run,) = compose_runs(SAMPLE, options_of(Shared("a"), Side(steps="4"), AppConfig()))
    assert (run.config.sampler.steps, run.config.sampler.timesteps) == (4, None)


def test_two_sides_start_from_the_same_noise_on_one_loaded_model(studio):
    states = list(studio.generate(Shared(PROMPT, "3"), [Side(), Side(attention="spatial")]))
    first, second = states[-1]
    assert first.text.startswith("done in")
    assert (first.over, first.failed) == (True, False)
    assert first.video.is_file()
    records = [json.loads(one.record.read_text()) for one in (first, second)]
    assert records[0]["noise_sha256"] == records[1]["noise_sha256"]
    assert records[0]["pixels_sha256"] != records[1]["pixels_sha256"]
    of_first = [one for one, _ in states if "denoising" in one.text]
    assert {one.step for one in of_first} == {0, 1, 2, 3}
    assert all(one.preview.is_file() for one in of_first if one.step)
    assert any(one.left for one in of_first)
    (cache,) = studio._models.values()
    loaded = cache._model
    assert last(studio.generate(Shared(PROMPT), [Side()]))[0].video is not None
    assert cache._model is loaded
    listed = studio.history()
    assert [one.seed for one in listed] == [0, 3, 3]
    assert listed[0].about == "builtin:miniature, 3 steps, sdpa"
    (studio.output / "00009_00000000_s0.json").write_text("{")  # damaged: left out
    assert studio.history() == listed


def test_two_sides_share_a_random_seed(studio):
    sides = [Side(), Side(attention="spatial")]
    records = [one.record for one in last(studio.generate(Shared(PROMPT, " -1"), sides))]
    first, second = (json.loads(record.read_text()) for record in records)
    assert first["noise_sha256"] == second["noise_sha256"]
    assert first["settings"]["seed"] == second["settings"]["seed"]
    assert first["settings"]["seed"]["from"] == "random (seed=-1)"


@pytest.mark.parametrize(
    "place",
    [
        *(("seed",), ("settings", "guidance_scale", "value"), ("seconds", "total")),
        *(("seconds",), ("settings",), ("settings", "sampler.steps"), ("video",)),
    ],
)
@pytest.mark.parametrize("odd", ["x", [1], True])
def test_an_odd_record_is_left_out_of_the_history(place, odd, tmp_path):
    studio = Studio(AppConfig(output_dir=str(tmp_path)))
    settings = {"checkpoint": "m", "sampler.steps": 4, "attention": "sdpa", "guidance_scale": 3.0}
    values = {
        "record_version": 1,
        "prompt": "a fox",
        "seed": 7,
        "settings": {name: {"value": value} for name, value in settings.items()},
        "seconds": {"total": 1},
    }
    write_sealed(tmp_path / "00000_x_s7.json", values)
    inside = values
    for name in place[:-1]:
        inside = inside[name]
    inside[place[-1]] = odd
    write_sealed(tmp_path / "00001_x_s7.json", values)
    (made,) = studio.history()
    assert (made.record.name, made.seed) == ("00000_x_s7.json", 7)
    assert made.about == "m, 4 steps, sdpa, guidance 3"
    assert "1.0 s" in history_cards([made], str)


def test_stopping_keeps_what_there_is(studio):
    states = []
    sides = [Side("mini-teacher", "20"), Side()]
    for now in studio.generate(Shared(PROMPT), sides):
        states = now
        if now[0].step == 2:
            studio.cancel()
    first, second = states
    assert first.text.startswith("stopped after")
    assert (first.video, first.failed) == (None, False)
    assert first.latents.is_file()
    assert json.loads(first.record.read_text())["status"] == "interrupted"
    assert second.text == "stopped before it began"


@pytest.mark.parametrize(
    ("shared", "side", "message"),
    [
        (Shared(" "), Side(), "prompt= is empty"),
        (Shared(PROMPT, "x"), Side(), "seed=x"),
        (Shared(PROMPT, height="100"), Side(), "height=100"),
        (Shared(PROMPT), Side(steps="1000,522"), "was trained for the 3 timesteps"),
        (Shared(PROMPT), Side("none"), "none"),
    ],
)
def test_errors_are_one_line_beside_the_form(studio, shared, side, message):
    before = sorted(studio.output.iterdir())
    (state,) = last(studio.generate(shared, [side]))
    assert (state.over, state.failed) == (True, True)
    assert message in state.text
    assert "\n" not in state.text
    assert sorted(studio.output.iterdir()) == before


def test_what_cannot_fit_is_refused_before_weights_are_read(studio, monkeypatch):
    def refuse(*_):
        raise WanError("not enough memory on cpu: denoise would take 1 TiB")

    monkeypatch.setattr("infer.sample.prepare.check_memory", refuse)
    monkeypatch.setattr("infer.loading.LoadedModel", None)  # would fail if it were reached
    studio._models.clear()
    (state,) = last(studio.generate(Shared(PROMPT), [Side()]))
    assert state.failed
    assert state.text.startswith("not enough memory on cpu")


def test_one_run_at_a_time(studio):
    running = studio.generate(Shared(PROMPT), [Side()])
    next(running)
    (state,) = last(studio.generate(Shared(PROMPT), [Side()]))
    assert state.text == "another run is still at work"
    running.close()  # as by a page that was closed
    assert last(studio.generate(Shared(PROMPT), [Side()]))[0].video is not None


def test_typed_text_is_no_html(studio):
    state = State(text="<b>&", failed=True, over=True)
    assert "<b>&<" not in side_cards([state], ["A"], str)
    last(studio.generate(Shared("<script>alert(1)</script>"), [Side()]))
    html = history_cards(studio.history(), str)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_missing_gradio_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (run,) = compose_runs(LINE, [])
    with pytest.raises(WanError, match=r'pip install -e "\.\[app\]"'):
        main(run)


# --- in a browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(studio):
    if not GRADIO:
        pytest.skip('no gradio: pip install -e ".[app]"')
    from infer.app.page import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = AppConfig(output_dir=str(studio.output), port=port)
    page = serve(studio, config, wait=False)
    with pytest.raises(WanError, match="give another port="):
        serve(studio, config, wait=False)
    with pytest.raises(WanError, match="or as host= an address of this machine"):
        serve(studio, replace(config, host="nonsense.invalid"), wait=False)
    yield f"http://127.0.0.1:{port}"
    page.close()


@pytest.mark.browser
def test_type_generate_and_see_the_video(browser, address, studio):
    def wait(found, seconds=60):
        until = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < until, browser.page_source[-2000:]
            time.sleep(0.1)
        return value

    def all_of(selector):
        return browser.find_elements("css selector", selector)

    browser.get(address)
    (prompt,) = wait(lambda: all_of("#prompt textarea"))
    prompt.clear()
    prompt.send_keys("a small blue star moving up")
    all_of("#compare input")[0].click()
    all_of("#generate")[0].click()
    wait(lambda: all_of("#result img") or all_of("#result video"))
    wait(lambda: len(all_of("#result video")) == 2)
    play = (
        "return [...document.querySelectorAll('#result video')]"
        ".every(v => v.readyState > 1 && v.videoWidth === 128)"
    )
    wait(lambda: browser.execute_script(play))
    wait(lambda: "a small blue star moving up" in all_of("#history")[0].text)
    assert studio.history()[0].prompt == "a small blue star moving up"
    hosts = "return performance.getEntriesByType('resource').map(e => new URL(e.name).host)"
    assert set(browser.execute_script(hosts)) == {address.removeprefix("http://")}
    severe = [one for one in browser.get_log("browser") if one["level"] == "SEVERE"]
    assert not severe
    browser.set_window_size(390, 844)
    wait(lambda: browser.execute_script("return document.documentElement.scrollWidth") <= 500)
    browser.set_window_size(1280, 900)


@pytest.mark.browser
def test_only_the_output_folder_is_served(browser, address, studio):
    def status(path):
        try:
            return urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=20).status
        except urllib.error.HTTPError as error:
            return error.code

    inside = next(studio.output.glob("*.mp4"))
    assert status(inside) == 200
    for path in (__file__, f"{studio.output}/../{inside.parent.parent.name}", "/etc/hostname"):
        assert status(path) in (403, 404), path

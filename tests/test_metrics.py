"""The log of a run: lines of JSON that nothing of wandb can stop."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.training import LoopConfig
from train.metrics import MetricsLog, check_mirrors, media_files, read_metrics
from wan.errors import WanError
from wan.media.images import write_image
from wan.media.video import write_video


class FakeWandb:
    """What of wandb is used: the module and its run in one. `fails` names calls that raise."""

    def __init__(self, *fails: str) -> None:
        self.fails = fails
        self.sent: list[dict] = []
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fails:
            raise RuntimeError(f"{name}: the network is down")

    def init(self, **settings):
        self._call("init")
        self.settings = settings
        return self

    def define_metric(self, *_, **__):
        self._call("define_metric")

    def log(self, values: dict) -> None:
        self._call("log")
        self.sent.append(values)

    def finish(self) -> None:
        self._call("finish")

    def Image(self, path: str):
        self._call("Image")
        return ("image", path)

    def Video(self, path: str, format: str):
        self._call("Video")
        return (format, path)


@pytest.fixture
def use(monkeypatch):
    def install(*fails: str) -> FakeWandb:
        fake = FakeWandb(*fails)
        monkeypatch.setitem(sys.modules, "wandb", fake)
        return fake

    return install


def test_numbers_that_json_has_no_name_for_become_null(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(0, loss=float("inf"), rate=1.0)
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    assert line == {"step": 0, "loss": None, "rate": 1.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line.replace(b"1.5", b"2.5"),
        lambda line: line[:9] + b"\n",
        lambda line: b"[1]\n",
        lambda line: b'{"loss": 1.5}\n',
        lambda line: b"\0" * len(line[:-1]) + b"\n",
    ],
    ids=["flipped", "cut", "no object", "no step", "zeros"],
)
def test_a_damaged_line_is_named_with_what_to_do_and_the_rest_is_kept(tmp_path, damage):
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.write(step, loss=1.5)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage(lines[1]) + lines[2])
    damaged = path.read_bytes()
    with pytest.raises(WanError, match=r"metrics.jsonl, line 2: damaged.* take the line out"):
        MetricsLog(tmp_path, 3)
    assert path.read_bytes() == damaged
    path.write_bytes(lines[0] + lines[2])
    assert [row["step"] for row in read_metrics(path)] == [0, 2]


def test_half_a_line_is_no_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 1.5}\n{"step": 1, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.5}]


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    log = MetricsLog(tmp_path)
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        log.write(0, loss=1.0)


def test_wandb_is_a_mirror_that_is_only_asked_for_by_name(tmp_path, use):
    wandb = use()
    MetricsLog(tmp_path).write(0, loss=1.0)
    assert wandb.calls == []
    MetricsLog(tmp_path, wandb_project="x").write(1, loss=2.0)
    assert wandb.sent == [{"trainer/step": 1, "loss": 2.0}]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, use):
    ids = []
    for _ in range(2):
        wandb = use()
        MetricsLog(tmp_path, wandb_project="x").close()
        ids.append(wandb.settings["id"])
    assert ids[0] == ids[1] != ""


def test_wandb_gets_pictures_and_clips_as_the_files_they_are(tmp_path, use):
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in ("0000020-triptych.png", "0000020-0.mp4", "0000020-note.txt", "0000010-0.mp4"):
        (folder / name).touch()
    wandb = use()
    log = MetricsLog(tmp_path, wandb_project="x")
    log.show(19, media_files(tmp_path, 20))
    log.show(29, media_files(tmp_path, 30))  # nothing was written then
    assert wandb.sent == [
        {
            "trainer/step": 19,
            "samples/triptych": ("image", str(folder / "0000020-triptych.png")),
            "samples/0": ("mp4", str(folder / "0000020-0.mp4")),
        }
    ]


@pytest.mark.parametrize("fails", ["init", "define_metric", "log", "finish", "Image"])
def test_an_error_of_wandb_is_told_once_and_the_lines_go_on(tmp_path, use, capsys, fails):
    use(fails)
    log = MetricsLog(tmp_path, wandb_project="x")
    for step in range(3):
        log.write(step, loss=1.0)
        log.show(step, [tmp_path / f"samples/{step:07d}-a.png"])
    log.close()
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1, 2]
    told = capsys.readouterr().err
    assert told.count("warning: wandb:") == 1
    assert f"{fails}: the network is down" in told


def test_asking_for_wandb_without_it_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(WanError, match="pip install"):
        MetricsLog(tmp_path, wandb_project="x")


def test_asking_for_tensorboard_without_it_says_so_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(WanError, match=r"loop\.tensorboard=true: .* pip install"):
        check_mirrors(LoopConfig(tensorboard=True))


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each number that tensorboard shows."""
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        name: [(one.step, pytest.approx(one.value)) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_the_lines_once_whatever_a_run_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    log = MetricsLog(tmp_path, tensorboard=True)
    for step in range(4):
        log.write(step, loss=1.0 + step, note="text")
    log.close()
    log = MetricsLog(tmp_path, 2, tensorboard=True)  # its last checkpoint was after two steps
    log.write(2, loss=9.0, rate=0.5)
    log.close()
    assert points(tmp_path) == {"loss": [(1, 1.0), (2, 2.0), (3, 9.0)], "rate": [(3, 0.5)]}


def test_tensorboard_that_is_asked_for_late_has_the_earlier_lines(tmp_path):
    pytest.importorskip("tensorboard")
    MetricsLog(tmp_path).write(0, loss=1.0)
    log = MetricsLog(tmp_path, 1, tensorboard=True)
    log.write(1, loss=2.0)
    log.close()
    assert points(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}


def test_tensorboard_shows_pictures_and_clips(tmp_path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = tmp_path / "samples"
    folder.mkdir()
    write_image(folder / "0000020-triptych.png", Image.new("RGB", (8, 6)))
    frames = np.random.default_rng(0).integers(0, 255, (3, 32, 640, 3), dtype=np.uint8)
    write_video(folder / "0000020-ema-1-a-cat.mp4", frames, 8)
    log = MetricsLog(tmp_path, tensorboard=True)
    log.show(19, media_files(tmp_path, 20))
    log.close()
    events = module.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (clip,), (picture,) = (events.Images(f"samples/{n}") for n in ("ema-1-a-cat", "triptych"))
    assert (clip.step, clip.width, clip.height) == (20, 320, 16)
    shown = Image.open(io.BytesIO(clip.encoded_image_string))
    assert (shown.format, shown.n_frames, shown.info["duration"]) == ("GIF", 3, 120)
    assert Image.open(io.BytesIO(picture.encoded_image_string)).size == (8, 6)


def test_an_error_of_tensorboard_is_told_once_and_the_lines_go_on(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").touch()  # no folder can be made there
    log = MetricsLog(tmp_path, tensorboard=True)
    for step in range(2):
        log.write(step, loss=1.0)
    log.close()
    assert [row["step"] for row in read_metrics(log.path)] == [0, 1]
    assert capsys.readouterr().err.count("warning: tensorboard:") == 1

"""A picture of a run."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from configs.compose import compose_runs
from train.plot import LINE, PlotConfig, draw, family, plot, read_series
from wan.errors import WanError

LINES = [
    {"step": 0, "loss": 2.0, "critic_loss_sigma_0.2": 1.0, "note": "text"},
    {"step": 1, "loss": None, "critic_loss_sigma_0.4": 3.0},
    {"step": 1, "health": 0.5},
]


def write(folder, lines, end="\n"):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + end)


def test_a_series_counts_finished_steps_and_leaves_out_what_is_no_number(tmp_path):
    write(tmp_path, LINES)
    assert read_series(tmp_path / "metrics.jsonl") == {
        "loss": [(1, 2.0)],
        "critic_loss_sigma_0.2": [(1, 1.0)],
        "critic_loss_sigma_0.4": [(2, 3.0)],
        "health": [(2, 0.5)],
    }


def test_a_run_that_is_writing_its_next_line_can_be_drawn(tmp_path):
    write(tmp_path, LINES, end='\n{"step": 2, "lo')
    assert read_series(tmp_path / "metrics.jsonl")["loss"] == [(1, 2.0)]


def test_numbers_that_belong_together_share_a_panel():
    together = [
        ("critic_loss_sigma_0.0", "critic_loss_sigma_0.8"),
        ("exits_0", "exits_2"),
        ("student_grad_norm", "critic_grad_norm"),
        ("lr", "critic_lr"),
        ("student_saturated", "teacher_saturated"),
        ("motion_ratio", "spread_ratio"),
        ("motion_ratio", "diversity_ratio"),
        ("psnr", "val_psnr"),
        ("val_psnr", "val_psnr_foreground"),
        ("clip_spread", "clip_spread_low"),
        ("val_loss", "val_loss_ema"),
        ("val_loss_sigma_0.1", "val_loss_ema_sigma_0.9"),
    ]
    for one, other in together:
        assert family(one) == family(other)
    assert family("val_joint") == family("health") != family("val_shape")
    assert family("val_psnr") != family("val_shape")
    assert len({family(name) for name in ("val_loss", "val_loss_sigma_0.1", "val_shape")}) == 3
    assert family("something_new") == "something_new"


@pytest.mark.parametrize("lines", [None, [{"step": 0, "loss": None}]])
def test_a_run_without_numbers_is_told(tmp_path, lines):
    if lines is not None:
        write(tmp_path, lines)
    with pytest.raises(WanError, match=r"no metrics there|no numbers yet"):
        read_series(tmp_path / "metrics.jsonl")


def test_there_is_a_panel_for_each_family_and_a_line_for_each_number(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    figures = []
    original = figure_module.Figure

    def remember(*args, **kwargs):
        figures.append(original(*args, **kwargs))
        return figures[-1]

    monkeypatch.setattr(figure_module, "Figure", remember)
    series = {"loss": [(1, 2.0), (2, 1.0)], "exits_0": [(1, 3.0)], "exits_1": [(2, 4.0)]}
    draw({"a run": series}, tmp_path / "plot.png")
    loss, exits = figures[0].axes
    assert [axes.get_title() for axes in (loss, exits)] == ["loss", "exits"]
    assert [line.get_xydata().tolist() for line in loss.lines] == [[[1, 2], [2, 1]]]
    assert [line.get_label() for line in exits.lines] == ["0", "1"]


def test_the_picture_lies_beside_the_metrics_or_where_it_is_asked_for(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    write(tmp_path / "run", LINES)
    plot(PlotConfig([str(tmp_path / "run")]))
    plot(PlotConfig([str(tmp_path / "run")], str(tmp_path / "elsewhere.png")))
    sizes = {Image.open(p).size for p in (tmp_path / "run/plot.png", tmp_path / "elsewhere.png")}
    assert len(sizes) == 1
    assert capsys.readouterr().out.splitlines()[0] == f"wrote {tmp_path / 'run/plot.png'}"


@pytest.mark.parametrize("name", ["pic", "run1.3"])
def test_a_picture_has_the_ending_of_one(name):
    with pytest.raises(WanError, match=rf"output={name}: the name must end in \.png or "):
        PlotConfig(output=name)


def test_the_command_refuses_a_folder_without_a_run_in_one_line(tmp_path):
    command = [sys.executable, "-m", "train.plot", f"run={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "no metrics there" in done.stderr


def test_several_runs_are_one_picture_in_which_each_has_a_colour(tmp_path):
    for name, loss in (("a", 2.0), ("b", 3.0)):
        (tmp_path / name).mkdir()
        rows = [{"step": step, "loss": loss, "lr": 0.1} for step in range(3)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    runs = f"run={tmp_path / 'a'},{tmp_path / 'b'}"
    (found,) = compose_runs(LINE, [runs, f"output={tmp_path / 'both.svg'}"])
    plot(found.config)
    drawn = (tmp_path / "both.svg").read_text()
    for colour in ("#1f77b4", "#ff7f0e"):
        assert f"stroke: {colour}" in drawn
    (found,) = compose_runs(LINE, [runs])
    with pytest.raises(WanError, match=r"name their picture too, as in output=both\.png"):
        plot(found.config)

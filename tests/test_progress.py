"""What a command is doing is said at once on a terminal, and every ten seconds elsewhere."""

import sys

import pytest

from configs import progress
from configs.progress import Steps, doing, duration


@pytest.fixture
def on_terminal(monkeypatch):
    return lambda: monkeypatch.setattr(sys.stderr, "isatty", lambda: True)


def test_on_a_terminal_it_is_said_at_once_and_erased(on_terminal, capsys):
    on_terminal()
    with doing("loading PyTorch"):
        assert capsys.readouterr().err == "loading PyTorch\r"
    assert capsys.readouterr().err == progress.ERASE


def test_elsewhere_only_what_lasts_has_a_line(monkeypatch, capsys):
    with doing("encoding"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with doing("encoding"):
        while "encoding: 0 s\n" not in capsys.readouterr().err:  # from another thread
            pass


def test_a_loop_has_a_bar_on_a_terminal(on_terminal, capsys):
    on_terminal()
    with Steps("steps", 4, done=1) as steps:
        assert "1/4" in capsys.readouterr().err
        steps.add(2)
        steps.print("a line")
    assert capsys.readouterr().out == "a line\n"


def test_elsewhere_a_loop_has_a_line_every_ten_seconds(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Steps("steps", 10, done=2) as steps, Steps("steps", 10, quiet=True) as quiet:
        for now in (4.0, 8.0, 12.0):  # noqa: B007
            steps.add()
            quiet.add()
        assert capsys.readouterr().err == "5 of 10 steps, 20 s left\n"
        now = 16.0
        steps.print("step 5, loss 1")  # tells as much
        now = 24.0
        steps.add()
        assert capsys.readouterr() == ("step 5, loss 1\n", "")
        now = 26.0
        steps.add()
        assert capsys.readouterr().err == "7 of 10 steps, 16 s left\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (7000, "117 min"), (7500, "2 h 05 min")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text

"""What a command is doing is said at once on a terminal, and every ten seconds elsewhere."""

import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import progress
from configs.command_line import CommandLine
from configs.compose import compose_runs
from configs.parity import ParityConfig
from configs.progress import STATUS, Steps, doing, duration, fitting, progress_shown
from wan.errors import WanError

ROOT = Path(__file__).parents[1]
LINE = CommandLine(ParityConfig, "parity")


@pytest.fixture
def on_terminal(monkeypatch):
    def begin():
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda: True)

    return begin


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set, and no thread that looks at it."""
    times = {"now": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: times["now"])
    monkeypatch.setattr(progress, "REDRAWN", 1000)
    monkeypatch.setattr(progress, "SECONDS", 10.0)

    def set_to(now):
        times["now"] = now
        STATUS.draw()
        STATUS.tell()

    return set_to


def test_on_a_terminal_it_is_said_at_once_and_erased(on_terminal, capsys):
    on_terminal()
    with doing("loading PyTorch"):
        assert capsys.readouterr().err == "\rloading PyTorch\x1b[K\r"
    assert capsys.readouterr().err == progress.ERASE


def test_elsewhere_only_what_lasts_has_a_line(monkeypatch, capsys):
    with doing("encoding"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "SECONDS", 0.01)
    with doing("encoding"):
        while "encoding\n" not in capsys.readouterr().err:  # from another thread
            pass


def test_what_goes_on_inside_of_something_else_stands_behind_it(on_terminal, clock, capsys):
    on_terminal()
    with Steps("steps", 10, done=2) as steps:
        clock(4)
        steps.add(2)
        with doing("validation"):
            clock(10)
            line = "\r4 of 10 steps, 6 s left | validation: 6 s\x1b[K\r"
            assert capsys.readouterr().err.endswith(line)
        assert capsys.readouterr().err == "\r[########------------] 4 of 10 steps, 6 s left\x1b[K\r"
        clock(10)
        assert capsys.readouterr().err == ""  # nothing new


def test_a_line_that_is_too_long_keeps_what_was_begun_last():
    assert fitting(["steps", "validation", "clips"], 20) == "validation | clips"
    assert fitting(["steps", "validation"], 4) == "vali"


def test_what_is_printed_stands_above_the_line(on_terminal, capsys):
    on_terminal()
    with progress_shown(True), doing("validation"):
        capsys.readouterr()
        print("one", "two")
        out, err = capsys.readouterr()
        print("warning", file=sys.stderr)
    assert out == "one two\n"
    assert err == f"{progress.ERASE}\rvalidation\x1b[K\r"  # not between a text and its line end
    assert "\r\x1b[Kwarning\n\rvalidation\x1b[K\r" in capsys.readouterr().err
    assert not isinstance(sys.stderr, progress.AboveLine)


def test_elsewhere_a_loop_has_a_line_every_ten_seconds(clock, capsys):
    with Steps("steps", 10, done=2) as steps, Steps("steps", 10, quiet=True) as quiet:
        for now in (4.0, 8.0, 12.0):
            clock(now)
            steps.add()
            quiet.add()
        clock(12)
        assert capsys.readouterr().err == "4 of 10 steps, 20 s left\n"
        clock(16)
        steps.print("step 5, loss 1")  # tells as much
        clock(24)
        steps.add()
        assert capsys.readouterr() == ("step 5, loss 1\n", "")
        clock(26)
        assert capsys.readouterr().err == "6 of 10 steps, 22 s left\n"
        steps.add(2)
        clock(80)
        assert capsys.readouterr().err == "8 of 10 steps, 54 s since the last\n"  # not 0 s left
        steps.add(2)
        assert steps.left() == "0 s left"


def test_bytes_are_told_in_megabytes(clock):
    with Steps("MB written", 3_000_000, quiet=True, unit=10**6) as steps:
        clock(1)
        steps.add(1_500_000)
        assert steps.text(1) == "1 of 3 MB written, 1 s left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (7000, "117 min"), (7500, "2 h 05 min")],
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_every_command_takes_progress(on_terminal, capsys):
    (run,) = compose_runs(LINE, ["progress=false", "steps=3"])
    assert (run.progress, run.config.steps) == (False, 3)
    on_terminal()
    with progress_shown(run.progress), doing("comparing"), progress_shown(True), doing("a row"):
        pass
    assert capsys.readouterr().err == ""
    for tokens, words in {
        ("progress=maybe",): "progress=maybe: must be true or false",
        ("progress=true", "progress=true"): "given twice",
        ("progres=false",): "did you mean progress=",
    }.items():
        with pytest.raises(WanError, match=words):
            compose_runs(LINE, tokens)


SCRIPT = """
import sys, time
from configs.cli import Run, run
from configs.command_line import CommandLine
from configs.parity import ParityConfig
from configs.progress import Steps, doing

def main(run):
    with Steps("comparisons", 3) as steps, doing("loading"):
        for number in range(2):
            time.sleep(0.3)
            steps.add()
            print("row", number)

run(main, CommandLine(ParityConfig, "parity"), "")
"""


def test_a_whole_command_on_a_terminal_leaves_only_what_it_printed(tmp_path):
    (tmp_path / "command.py").write_text(SCRIPT)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, str(tmp_path / "command.py")]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown, ends = b"", time.monotonic() + 60
    while time.monotonic() < ends:
        try:
            shown += os.read(ours, 65536)
        except OSError:  # its end
            break
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "0 of 3 comparisons | loading" in text
    kept = [re.sub(r".*\x1b\[K\r?", "", line.rstrip("\r")) for line in text.split("\n")]
    assert kept == ["row 0", "row 1", ""]

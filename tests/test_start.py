"""Commands in odd places: no home, closed streams, files of other people; signals at the start."""

import io
import os
import runpy
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest

from configs.start import lasting
from wan.files import read_sealed

ROOT = Path(__file__).parents[1]
SAMPLE = ("infer.sample", "prompt=a red circle", "output_dir=out")


def command(*words, cwd, before=(), environment=None, **options) -> subprocess.Popen:
    """`python -m ...` of these sources in another folder.

    Args:
        before: folders of modules that are found before ours.
        environment: variables to set; None takes one away.
    """
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [*before, ROOT])),
        **(environment or {}),
    }
    variables = {name: value for name, value in variables.items() if value is not None}
    # Where the tests run in the background, Ctrl-C is ignored, and a child inherits that.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": heeded, **options}
    return subprocess.Popen([sys.executable, "-m", *words], cwd=cwd, env=variables, **pipes)


def run(*words, cwd, **options) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = command(*words, cwd=cwd, **options)
    out, err = ((text or b"").decode() for text in process.communicate(timeout=120))
    return process.returncode, out, err


def record(folder: Path) -> dict:
    (path,) = (folder / "out").glob("*.json")
    return read_sealed(path)


# --- signals --------------------------------------------------------------------------------------


@pytest.fixture
def slow_import(tmp_path) -> Path:
    """A folder with a module that the commands import, and that takes for ever to load."""
    (tmp_path / "modules").mkdir()
    module = tmp_path / "modules" / "hydra.py"
    module.write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    return module.parent


@pytest.mark.parametrize("words", [SAMPLE, ("infer.study",), ("train.finetune",)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_loads_ends_it_in_silence(tmp_path, slow_import, words, number):
    process = command(*words, cwd=tmp_path, before=[slow_import])
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (128 + number, b"", b"")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path, slow_import):
    """`nohup` and `&` start commands in this way."""
    process = command(
        "infer.study",
        cwd=tmp_path,
        before=[slow_import],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.terminate()
    process.communicate()
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_work_ends_the_command_in_order(tmp_path, number):
    (tmp_path / "work.py").write_text(
        "import time\n"
        "from configs.cli import run\n"
        "from configs.command_line import CommandLine\n"
        "from configs.schema import SampleConfig\n"
        "def main(run):\n"
        "    try:\n"
        "        print('working', flush=True)\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        print('tidy')\n"
        "run(main, CommandLine(SampleConfig, 'sample'), '')\n"
    )
    process = command("work", cwd=tmp_path)
    process.stdout.readline()
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"tidy\n", b"stopped\n")


def test_as_a_library_the_packages_change_nothing():
    script = (
        "import signal, sys; before = (sys.stdout, sys.path[:])\n"
        "import infer, train\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
        "assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
        "assert (sys.stdout, sys.path) == before\n"
    )
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, preexec_fn=heeded)


# --- streams --------------------------------------------------------------------------------------


def test_closed_streams_cost_nothing_and_nothing_is_printed_into_files(tmp_path):
    code, _, _ = run(
        *SAMPLE,
        cwd=tmp_path,
        stdout=None,
        stderr=None,
        preexec_fn=lambda: [os.close(number) for number in range(3)],
    )
    assert code == 0
    assert record(tmp_path)["status"] == "done"


def test_a_reader_that_has_gone_costs_no_video(tmp_path):
    there, here = os.pipe()
    os.close(there)
    try:
        code, _, _ = run(*SAMPLE, cwd=tmp_path, stdout=here, stderr=here)
    finally:
        os.close(here)
    assert code == 0
    assert record(tmp_path)["status"] == "done"


@pytest.mark.parametrize("write_through", [True, False])
def test_a_stream_keeps_its_way_of_buffering(write_through):
    """With `python -u` each text arrives at once, also through a pipe."""
    arrived = io.BytesIO()
    stream = io.TextIOWrapper(arrived, encoding="utf-8", write_through=write_through)
    kept = lasting(stream, 1)
    kept.write("x")
    assert arrived.getvalue() == (b"x" if write_through else b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_does_not_fit_on_the_disk_is_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        code, _, err = run("infer.sample", "--cfg", cwd=tmp_path, stdout=full)
    assert (code, err) == (2, "error: the output: No space left on device\n")


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_a_prompt_of_any_script_passes_where_the_locale_knows_ascii_only(tmp_path, locale):
    ascii_only = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code, out, err = run(
        "infer.sample",
        "prompt=一只猫 🐈 قطة",
        "output_dir=ö",
        "--cfg",
        cwd=tmp_path,
        environment=ascii_only,
    )
    assert code == 0, err
    assert "prompt: 一只猫 🐈 قطة\n" in out
    assert "output_dir: ö\n" in out


# --- places ---------------------------------------------------------------------------------------

NO_HOME = {
    "XDG_CACHE_HOME": None,
    "HOME": None,
    "USER": None,
    "LOGNAME": None,
    "LNAME": None,
    "USERNAME": None,
}


@pytest.fixture
def no_entry(tmp_path) -> Path:
    """A folder with a module that makes the system know no user."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sitecustomize.py").write_text(
        "import pwd\n"
        "def unknown(*_):\n"
        "    raise KeyError('getpwuid(): uid not found')\n"
        "pwd.getpwuid = pwd.getpwnam = unknown\n"
    )
    return tmp_path / "modules"


def test_without_a_home_folder_and_an_entry_of_the_user(tmp_path, no_entry):
    options = {"cwd": tmp_path, "before": [no_entry], "environment": NO_HOME}
    code, _, err = run(*SAMPLE, **options)
    assert code == 0, err
    assert record(tmp_path)["status"] == "done"
    code, _, err = run("infer.sample", "prompt=x", "output_dir=~/x", **options)
    assert code == 2
    assert err.startswith("error: output_dir=~/x: ~ stands for a home folder, which is not known")
    code, _, err = run("infer.sample", "prompt=x", "checkpoint=nobody/nothing", **options)
    assert code == 2
    assert "HF_HOME=FOLDER" in err
    assert err.count("\n") == 1


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("configs.cli.interrupt_from_now_on", lambda: None)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *words])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the module may have been imported by other tests
            with pytest.raises(SystemExit) as ended:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        return (ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "words",
    [
        *(f"infer.sample prompt=x {option}" for option in ("output_dir", "checkpoint", "image")),
        *(f"infer.sample {option}" for option in ("prompt_file", "prompt=x vae", "prompt=x lora")),
        "infer.convert output=x layout=diffusers source",
        "infer.study report_only=true output_dir",
        "train.finetune output_dir",
        "train.preprocess clips",
        "train.plot run",
    ],
)
def test_the_home_of_nobody_is_one_line(tmp_path, here, words):
    code, out, err = here(*f"{words}=~nosuchuser/x".split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "~nosuchuser stands for a home folder, which is not known" in err
    assert not (tmp_path / "~nosuchuser").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("infer.sample prompt=x output_dir", "x"),
        ("infer.evaluate num_captions=1 source=renders output", "x.json"),
        ("infer.ablate experiment=steps output_dir", "x"),
        ("infer.bench output_dir", "x"),
        ("infer.convert source=mini layout=diffusers output", "x"),
        ("train.finetune output_dir", "x"),
        ("train.vae output_dir", "x"),
    ],
)
@pytest.mark.parametrize("place", ["file", "/proc"])
def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path, here, words, name, place):
    (tmp_path / "file").write_text("not a folder")
    code, out, err = here(*f"{words}={place}/{name}".split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert place in err


def test_files_where_the_user_stands_are_not_taken_for_ours(tmp_path):
    for name in ("wan", "train", "torch", "yaml", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the module that was meant')")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "__init__.py").write_text("")
    code, out, err = run("infer.sample", "prompt=x", "--cfg", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "prompt: x\n" in out

"""`python -m infer` and `python -m train` name every command, without loading PyTorch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs.command_list import commands_of, list_commands

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "infer": {
        *("ablate", "app", "bench", "convert", "diff", "evaluate", "gallery", "measure"),
        *("parity", "rehearse", "rerun", "sample", "study"),
    },
    "train": {"distill", "export", "finetune", "plot", "preprocess", "text_encoder", "vae"},
}


@pytest.mark.parametrize("package", COMMANDS)
def test_every_command_has_a_line_that_is_a_sentence(package, capsys):
    assert list_commands(ROOT / package, []) == 0
    lines = dict(
        re.findall(rf"^  python -m {package}\.(\S+) +(.+)$", capsys.readouterr().out, re.M)
    )
    assert set(lines) == COMMANDS[package]
    for sentence in lines.values():
        assert re.fullmatch(r"[A-Z].{15,80}\.", sentence)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["sampel"], "did you mean python -m infer.sample?"),
        (["sample", "prompt=x"], "typed with a dot, python -m infer.sample"),
        (["infer.sample"], "typed with a dot, python -m infer.sample"),
        (["steps=4"], "ablate, app, bench, convert"),
    ],
)
def test_a_word_that_is_no_command_is_one_line_and_exit_code_2(words, advice, capsys):
    assert list_commands(ROOT / "infer", words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert advice in err


@pytest.mark.parametrize("package", COMMANDS)
def test_listing_loads_no_pytorch(package):
    script = (
        "import runpy, sys\n"
        f"sys.argv = ['{package}']\n"
        "try:\n"
        f"    runpy.run_module('{package}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules and 'hydra' not in sys.modules\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"python -m {package}." in shown.stdout


@pytest.mark.parametrize(
    "command", [f"{package}.{name}" for package in COMMANDS for name in commands_of(ROOT / package)]
)
def test_help_and_mistyped_options_load_no_pytorch(command):
    script = (
        "import runpy, sys\n"
        "for word, code in (('--help', 0), ('nonsense=1', 2)):\n"
        f"    sys.argv = ['{command}', word]\n"
        "    try:\n"
        f"        runpy.run_module('{command}', run_name='__main__')\n"
        "    except SystemExit as end:\n"
        "        assert end.code == code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)

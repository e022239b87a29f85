"""What the README says must work as written."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from configs.benchmark import BenchConfig
from configs.cli import compose_runs
from configs.command_line import ATTENTION, CommandLine
from configs.conversion import ConvertConfig
from configs.data import PreprocessConfig
from configs.distillation import DistillConfig
from configs.parity import ParityConfig
from configs.training import FinetuneConfig, TextEncoderTrainConfig, VAETrainConfig
from infer.ablate.__main__ import LINE as ABLATE
from infer.evaluate.__main__ import LINE as EVALUATE
from infer.sample.__main__ import LINE as SAMPLE
from infer.study.__main__ import LINE as STUDY
from train.plot import PlotConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CARDS = "".join(
    (ROOT / f"wan/miniature/{model}/README.md").read_text(encoding="utf-8")
    for model in ("student", "teacher")
)
CONVERT_PATHS = ("source", "base", "output", "config")
PATHS = ("output_dir", "checkpoint", "data.folder", "data.cache_dir")
LINES = {
    "infer.sample": SAMPLE,
    "infer.evaluate": EVALUATE,
    "infer.convert": CommandLine(ConvertConfig, "convert", (), CONVERT_PATHS),
    "infer.parity": CommandLine(ParityConfig, "parity", (), ("checkpoint",)),
    "train.vae": CommandLine(VAETrainConfig, "vae", (), PATHS[:1]),
    "train.text_encoder": CommandLine(TextEncoderTrainConfig, "text_encoder", (), PATHS[:1]),
    "train.finetune": CommandLine(FinetuneConfig, "finetune", (), PATHS, ATTENTION),
    "train.distill": CommandLine(DistillConfig, "distill", (), PATHS, ATTENTION),
    "train.preprocess": CommandLine(
        PreprocessConfig, "preprocess", ("negative_prompt",), ("clips", "prompts", *PATHS[:2])
    ),
    "train.plot": CommandLine(PlotConfig, "plot", (), ("run", "output")),
    "infer.study": STUDY,
    "infer.bench": CommandLine(BenchConfig, "bench", (), ("checkpoint", "output_dir"), ATTENTION),
    "infer.ablate": ABLATE,
}


def commands(text: str) -> list[str]:
    """Every `-m infer.x ...` and `-m train.x ...` of fenced blocks and between backticks."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = [one.replace("\n", " ") for one in re.findall(r"`(python -m [^`]*)`", prose)]
    joined = "\n".join([*blocks, *inline]).replace("\\\n", " ")
    found = re.findall(r"-m (?:infer|train)\.\w+[^\n]*", joined)
    # Not help, and not what a reader would write first
    return [one for one in found if not re.search("--help|=mine", one)]


@pytest.mark.parametrize("command", commands(README) + commands(CARDS))
def test_commands_name_options_that_exist(command):
    _, module, *options = shlex.split(command, comments=True)
    (run,) = compose_runs(LINES[module], options)
    assert run.config is not None


def test_the_readme_has_commands_of_every_kind():
    assert {c.split()[1] for c in commands(README)} == set(LINES)


def test_links_and_pictures_are_there():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert missing == []


def test_every_file_of_the_tree_exists():
    tree = README.split("```\nwan/ ")[1].split("```")[0]
    names = re.findall(r"\b\w+\.py\b", tree)
    assert len(names) > 20
    missing = [name for name in names if not list(ROOT.glob(f"*/{name}"))]
    assert missing == []


def test_ci_finds_both_setup_commands():
    script = (ROOT / ".ci/run").read_text()
    assert "for name in video tests" in script
    for name in ("video", "tests"):
        assert README.count(f"\n# setup: {name}\n") == 1
    subprocess.run(["bash", "-n", str(ROOT / ".ci/run")], check=True)


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README + CARDS

"""From own clips to a student: the ten commands of train/README.md, as they stand there."""

import importlib
import random
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.cli import execute
from configs.compose import compose_runs
from wan.errors import WanError
from wan.media.video import read_video, to_uint8, write_video
from wan.miniature.captions import caption
from wan.miniature.world import render, sample_scene, scene_rng

PAGE = (Path(__file__).parents[1] / "train/README.md").read_text(encoding="utf-8")
COMMANDS = re.search(r"<!-- ten commands -->\n```bash\n(.*?)```", PAGE, re.S)[1].splitlines()


def write_clips(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        scene = sample_scene(scene_rng(5, number), split="train")
        write_video(folder / f"{number}.mp4", to_uint8(render([scene])[0]), fps=8)
        text = caption(scene, random.Random(number)).text
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")


def run(command: str) -> None:
    """Run a command as its module does, in this process."""
    python, flag, name, *words = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    found = importlib.util.find_spec(f"{name}.__main__" if is_folder(name) else name)
    module = importlib.import_module(found.name)
    main = module.SampleCommand() if name == "infer.sample" else module.main
    assert execute(main, module.LINE, "", words) == 0, command


def is_folder(name: str) -> bool:
    return importlib.util.find_spec(name).submodule_search_locations is not None


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """The folder in which the ten commands ran."""
    folder = tmp_path_factory.mktemp("ten")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_clips(folder / "clips", 6)
        for command in COMMANDS:
            run(command)
    torch.set_num_threads(threads)
    return folder


def test_there_are_ten_and_each_is_explained():
    assert len(COMMANDS) == 10
    assert re.findall(r"^\| (\d+) \|", PAGE, re.M) == [str(n) for n in range(1, 11)]


def test_they_leave_what_the_page_says(there):
    runs = there / "runs"
    for name in (
        "clips/check.jsonl",
        "clips/report.jsonl",
        "lora/metrics.jsonl",
        "lora/plot.png",
        "lora/pytorch_lora_weights.safetensors",
        "lora/exports/step-0000010.safetensors",
        "lora/exports/step-0000010-current.safetensors",
        "teacher/model/model_index.json",
        "student/model/model_index.json",
        "look/wrong.png",
    ):
        assert (runs / name).is_file(), name
    assert len(list((runs / "lora/samples").glob("*.mp4"))) == 4  # two saves, of both weights
    videos = list((runs / "look").glob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        frames = read_video(video)[0]
        assert frames.shape == (17, 128, 128, 3)
        assert np.std(frames) > 5


# --- options of other trainers --------------------------------------------------------------------


def foreign_rows() -> list[tuple[str, str]]:
    """(an option of another trainer, the cell with ours) of the page's table."""
    table = PAGE.split("### Coming from another trainer\n")[1].split("\n\n")[1]
    rows = []
    for line in table.splitlines()[2:]:
        *theirs, ours = line.strip("| ").split("|")
        for cell in theirs:
            rows += [(name, ours) for name in re.findall(r"`(?:--)?([a-z_]+)`", cell)]
    return rows


@pytest.mark.parametrize(("theirs", "ours"), foreign_rows())
def test_an_option_of_another_trainer_is_answered_with_ours(theirs, ours):
    """By the command that has it; `num_repeats` is no option here, but a field of the clips."""
    commands = [importlib.import_module(f"train.{n}.__main__") for n in ("finetune", "preprocess")]
    messages = []
    for module in commands:
        with pytest.raises(WanError) as refused:
            compose_runs(module.LINE, [f"{theirs}=1"])
        messages.append(str(refused.value))
    named = re.findall(r"here it is called ([a-z_.]+)=", " ".join(messages))
    assert named or "read from the same file" in ours, messages
    assert all(f"`{name}=" in ours for name in named)

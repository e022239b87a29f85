"""Scripts written for diffusers run with one line changed, and give diffusers' numbers."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan import WanPipeline
from wan.lora.merge import add_lora, save_lora

diffusers = pytest.importorskip("diffusers", reason="needs the extra parity")

SCRIPTS = sorted((Path(__file__).parent / "scripts").glob("*.py"))
MODEL = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
# diffusers offloads to an accelerator only.
OURS_ALONE = {"less_memory"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped base model in a folder of its own, which both libraries load."""
    folder = tmp_path_factory.mktemp("scripts") / "model"
    WanPipeline.from_pretrained("builtin:miniature-teacher", dtype=torch.float32).save_pretrained(
        folder
    )
    return folder


def write_inputs(folder: Path, model: Path) -> None:
    """What the scripts find in their working folder: a picture and two LoRA files."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (48, 64, 3), generator=generator, dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).resize((160, 120)).save(folder / "cat.png")
    for name, rank in (("style", 4), ("motion", 2)):
        network = WanPipeline.from_pretrained(
            model, vae=None, text_encoder=None, dtype=torch.float32
        ).transformer
        add_lora(network, rank, generator=generator)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.05, generator=generator)
        save_lora(folder / f"{name}.safetensors", network)


def run_script(script: Path, folder: Path, model: Path, monkeypatch, theirs: bool = False):
    """The `result` of a script, run in a folder, with this project or with diffusers."""
    text = script.read_text().replace(MODEL, str(model))
    if theirs:
        text = text.replace("from wan import load_image", "from diffusers.utils import load_image")
        text = text.replace("from wan import export_to", "from diffusers.utils import export_to")
        text = text.replace(
            "from wan import AutoTokenizer", "from transformers import AutoTokenizer"
        )
        text = text.replace("from wan import", "from diffusers import")
        monkeypatch.setattr(diffusers.utils, "export_to_video", lambda *_, **__: None)
    copy = folder / script.name
    copy.write_text(text)
    monkeypatch.chdir(folder)
    with torch.no_grad():
        return np.asarray(runpy.run_path(str(copy))["result"])


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.stem for script in SCRIPTS])
def test_a_script_runs_and_gives_the_numbers_of_diffusers(script, model, tmp_path, monkeypatch):
    assert "diffusers" not in script.read_text().replace(MODEL, ""), "a script of this project"
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        write_inputs(tmp_path / name, model)
    ours = run_script(script, tmp_path / "ours", model, monkeypatch)
    assert np.isfinite(ours).all()
    if script.stem in OURS_ALONE:
        return
    theirs = run_script(script, tmp_path / "theirs", model, monkeypatch, theirs=True)
    assert ours.shape == theirs.shape
    error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
    assert error < 1e-4, f"relative rms error {error:.1e}"


def test_there_are_ten_scripts():
    assert len(SCRIPTS) >= 10

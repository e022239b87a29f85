"""The released recipes at full width: one block of the 5B, two processes, two iterations.

Run with `--full-width`: it takes about 12 GB of memory, 1 GB of disk and minutes. As released are
every width of the block, its hooks and shards, and the recipe's options. Small are the number of
blocks, the clips, and the autoencoder and text encoder, all but the sizes by which they meet the
transformer.
"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import test_pipeline
import torch
import yaml
from test_ten_commands import write_clips

from wan import WanPipeline
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.models.tokenizer import Tokenizer
from wan.models.umt5 import UMT5Encoder
from wan.models.vae import WanVAE
from wan.models.vae_config import VAEConfig
from wan.pipeline.config import PipelineConfig

ROOT = Path(__file__).parents[1]
RECIPE = yaml.safe_load((ROOT / "configs/method/fastwan3.yaml").read_text(encoding="utf-8"))
NEGATIVE = RECIPE["scores"]["negative_prompt"]
TWO = ("loop.steps=2", "loop.save_every=2", "loop.log_every=1", "warmup=0", "device=cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory, pytestconfig):
    """A folder with model/, clips/, and data/ of them and of a prompt."""
    if not pytestconfig.getoption("--full-width"):
        pytest.skip("only with --full-width")
    place = tmp_path_factory.mktemp("full")
    test_pipeline.write_tokenizer(place / "tokenizer")
    text = replace(test_pipeline.TEXT, d_model=DiTConfig().text_dim)
    config = PipelineConfig(
        WanPipeline.CLASS_NAME,
        replace(DiTConfig(), num_layers=1),
        replace(VAEConfig(), base_dim=8, decoder_base_dim=8),
        text,
        expand_timesteps=True,
        defaults=replace(test_pipeline.DEFAULTS, height=64, width=64, num_frames=5),
    )
    generator = torch.Generator().manual_seed(0)
    dit = WanDiT(config.transformer)
    with torch.no_grad():  # no zeros, which a released file does not end in
        for weight in dit.parameters():
            weight.uniform_(-1, 1, generator=generator).mul_(weight[0].numel() ** -0.5 / 3)
    WanPipeline(
        config=config,
        tokenizer=Tokenizer.from_folder(place / "tokenizer"),
        text_encoder=test_pipeline.random_weights(UMT5Encoder(text), 1),
        transformer=dit,
        vae=test_pipeline.random_weights(WanVAE(config.vae), 3),
    ).save_pretrained(place / "model")
    write_clips(place / "clips", 2)
    run(
        place,
        *("train.preprocess", "checkpoint=model", "clips=clips", "sizes=[5x64x64]"),
        *(f"negative_prompt={NEGATIVE}", "output_dir=data"),
    )
    return place


def run(place: Path, *words: str, processes: int = 1) -> None:
    """Run a command in that folder; the output stands in the failure."""
    torchrun = ("torch.distributed.run", f"--nproc-per-node={processes}", "-m")
    start = [sys.executable, "-m", *(torchrun if processes > 1 else ())]
    done = subprocess.run(
        [*start, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def check_metrics(folder: Path, names: set[str]) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    numbers = {name: value for line in lines for name, value in line.items()}
    assert names <= numbers.keys()
    assert all(math.isfinite(v) for v in numbers.values() if isinstance(v, float))


def test_the_released_distillation(place):
    run(
        place,
        *("train.distill", "method=fastwan3", "checkpoint=model", "data.folder=data", *TWO),
        *("batch_size=2", "scores.critic_ratio=1", "height=64", "width=64", "num_frames=5"),
        *("validation_captions=1", "validation_steps=2", "compile=false", "output_dir=student"),
        processes=2,
    )
    check_metrics(place / "student", {"critic_loss", "dmd_gradient", "student_grad_norm"})
    assert (place / "student/model/transformer/config.json").is_file()


def test_a_lora_of_the_5b(place):
    run(
        place,
        *("train.finetune", "checkpoint=model", "data.kind=folder", "data.folder=data", *TWO),
        *("checkpoint_blocks=full", "lora.rank=32", "lr=1e-4", "batch_size=2", "optimizer=adamw"),
        *("output_dir=lora",),
        processes=2,
    )
    check_metrics(place / "lora", {"loss", "grad_norm"})
    assert (place / "lora/pytorch_lora_weights.safetensors").is_file()

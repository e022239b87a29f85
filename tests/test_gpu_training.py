"""Training on a device: its commands on the miniature, and its parallel path in one process."""

import copy
import json
import math
from pathlib import Path

import pytest
import test_distill
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_parallel import free_ports
from test_pipeline import DIT, random_weights

import train.distill.__main__ as distill
import train.finetune.__main__ as finetune
from configs.cli import execute
from configs.parallel import ParallelConfig
from train.parallel import SequenceSplit, ShardedRanks, gathered
from wan.models.dit import WanDiT

pytestmark = pytest.mark.filterwarnings("ignore:.*matrices of zeros")  # the tiny teacher has some
teacher = test_distill.teacher
TEACHER = "builtin:miniature-teacher"


def losses(folder: Path, name: str) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def run(command, device: torch.device, folder: Path, steps: int, *words: str) -> None:
    options = [
        *(f"output_dir={folder}", f"device={device.type}", f"bfloat16={device.type == 'cuda'}"),
        *("threads=1", "batch_size=2", "warmup=1"),
        *(f"loop.steps={steps}", "loop.log_every=1", f"loop.save_every={steps}"),
    ]
    assert execute(command.main, command.LINE, "", [*options, *words]) == 0
    assert (folder / "model" / "model_index.json").is_file()


def test_finetune_trains(device, tmp_path, teacher):
    """20 steps of the miniature on a GPU, two of a tiny network on the CPU."""
    steps, checkpoint = (20, TEACHER) if device.type == "cuda" else (2, str(teacher))
    folder = tmp_path / "run"
    data = [f"data.cache_dir={tmp_path / 'cache'}", "data.num_clips=4"]
    run(finetune, device, folder, steps, f"checkpoint={checkpoint}", "lr=1e-4", *data)
    found = losses(folder, "loss")
    assert len(found) == steps
    assert all(map(math.isfinite, found))


def test_distill_trains(device, tmp_path, teacher):
    steps, checkpoint = (20, TEACHER) if device.type == "cuda" else (2, str(teacher))
    folder = tmp_path / "run"
    words = [
        *("compile=false", "max_drift=1000", "scores.critic_ratio=2", "scores.critic_warmup=0"),
        *("regression.num_pairs=4", "regression.steps=4"),
        *("validation_captions=1", "validation_steps=2"),
    ]
    run(distill, device, folder, steps, f"checkpoint={checkpoint}", *words)
    found = losses(folder, "critic_loss")
    assert len(found) == steps
    assert all(map(math.isfinite, found))


@pytest.fixture
def process_group(device):
    """This process as the only one of a run, on NCCL or gloo."""
    store = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(backend, init_method=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(dit: WanDiT, device: torch.device) -> dict[str, torch.Tensor]:
    """Of a loss that every weight has a part in."""
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, DIT.in_channels, 3, 8, 8, generator=generator).to(device)
    context = torch.randn(1, 6, DIT.text_dim, generator=generator).to(device)
    timestep = torch.tensor([500.0], device=device)
    F.mse_loss(dit(latents, timestep, context), latents).backward()
    return {name: gathered(p.grad).cpu() for name, p in dit.named_parameters()}


def test_sharded_weights_and_shared_tokens_give_the_gradients_of_a_plain_network(
    device, process_group
):
    """All collectives of a run of several processes, in a run of one."""
    plain = random_weights(WanDiT(DIT), 2).to(device)
    ranks = ShardedRanks(ParallelConfig(), device)
    shared = copy.deepcopy(plain)
    shared.split_tokens(SequenceSplit(dist.group.WORLD))
    ranks.prepare(shared)
    expected, found = gradients(plain, device), gradients(shared, device)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert ranks.gather("here") == ["here"]
    assert ranks.tally("clips", 2) == 2
    weight = shared.blocks[0].ffn.up.weight
    rows, place = ranks.stored_rows(weight)
    assert place == (0, len(weight))
    again = ranks.restore(tuple(weight.shape), lambda rows_: rows[rows_[0] : sum(rows_)].cpu())
    assert torch.equal(gathered(again), gathered(weight))

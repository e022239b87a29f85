"""Two processes on a CPU give what one gives: losses, weights, checkpoints, stops and failures."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import test_distill
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_distill import metrics, settings, student_weights
from test_rollout import with_random_weights

import train.dmd as dmd
from configs.distillation import (
    DistillConfig,
    GANConfig,
    OnPolicyConfig,
    RegressionConfig,
    ScoreConfig,
    StudentConfig,
)
from configs.export import ExportConfig
from configs.parallel import ParallelConfig
from configs.training import DataConfig, FinetuneConfig, LoopConfig, LoRAConfig
from train.checkpoint import list_checkpoints, load_checkpoint, load_latest
from train.data import LatentCache
from train.distill.run import distill
from train.finetune.run import finetune
from train.held_out import held_out_loss
from train.kept import export_kept
from train.loop import run_training, step_generator
from train.optim import EMA, Muon, apply_gradients, make_optimizers
from train.parallel import ALONE, Ranks, gathered, share_out, start
from train.state import TrainState
from wan.errors import WanError
from wan.media.video import read_video
from wan.models.dit import WanDiT
from wan.models.dit_config import DiTConfig
from wan.pipeline.config import SamplingDefaults, read_pipeline_config, write_configs
from wan.runtime.parallel import SequenceSplit
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import list_files
from wan.weights.load import load_state
from wan.weights.save import save_component

teacher = test_distill.teacher  # a fixture

TINY = DiTConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=40,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=16,
)
BATCH = 4
LOOP = LoopConfig(steps=4, save_every=2, log_every=1, keep_last=9)
Weights = dict[str, torch.Tensor]


def make_state(ranks: Ranks, bfloat16: bool = False, recompute: str = "none") -> TrainState:
    dit = with_random_weights(WanDiT(TINY, checkpoint_blocks=recompute))
    ranks.prepare(dit, bfloat16)
    # A large eps: Adam divides gradients by their size, and would blow rounding up where they
    # should be zero.
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2, eps=1e-2)
    return TrainState({"dit": dit}, {"adamw": optimizer}, {"dit": EMA(dit, 0.9)})


def make_step(ranks: Ranks, bfloat16: bool = False):
    def train_step(state: TrainState) -> dict[str, float]:
        dit, generator = state.modules["dit"], step_generator(7, state.step)
        latents, target = torch.randn(2, BATCH, 4, 3, 2, 6, generator=generator)  # 9 tokens
        context = torch.randn(BATCH, 12, 10, generator=generator)
        context[:, 5:] = 0
        own = ranks.share(BATCH)
        timestep = 1000 * torch.rand(BATCH, 3, generator=generator)
        if state.step % 2:
            timestep = timestep[:, 0]  # one for a whole clip
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            velocity = dit(latents[own], timestep[own], context[own], 5)
        loss = (velocity - target[own]).square().mean()
        loss.backward()
        norm = apply_gradients(state.optimizers, list(dit.parameters()), 1e-2, 0.5)
        state.averages["dit"].update(dit)
        return {"loss": loss.item(), "grad_norm": norm}

    return train_step


def whole(state: TrainState) -> dict[str, Weights]:
    """Weights, averages and Adam's second moments."""
    named = dict(state.modules["dit"].named_parameters())
    moments = state.optimizers["adamw"].state
    parts = {
        "weights": named,
        "averages": state.averages["dit"].weights,
        "moments": {n: moments[p]["exp_avg_sq"] for n, p in named.items()},
    }
    return {
        part: {n: gathered(t).detach().clone() for n, t in tensors.items()}
        for part, tensors in parts.items()
    }


def train(ranks: Ranks, folder: Path, loop: LoopConfig = LOOP, **options) -> dict[str, Weights]:
    state = make_state(ranks, **options)
    step = make_step(ranks, options.get("bfloat16", False))
    assert run_training(state, step, loop, folder, {}, ranks=ranks)
    return whole(state)


def until_second_step(folder: Path, copy: Path) -> Path:
    """The run as it was after its first checkpoint."""
    shutil.copytree(folder / "checkpoints" / "step-0000002", copy / "checkpoints" / "step-0000002")
    return copy


def finetune_config(folder: Path, cache: Path) -> FinetuneConfig:
    sizes = TINY.to_json() | {"in_channels": 16, "out_channels": 16, "text_dim": 128}
    return FinetuneConfig(
        output_dir=str(folder),
        threads=1,
        from_scratch=True,
        dit={k: v for k, v in sizes.items() if k in DiTConfig.__dataclass_fields__},
        batch_size=2,
        bfloat16=False,
        optimizer="adamw",
        first_frame_share=0.5,
        validation_captions=2,
        validation_steps=2,
        sample_prompts=["a red circle", "two", "three"],  # more than processes, and no multiple
        sample_size="5x32x32",
        sample_steps=2,
        data=DataConfig(cache_dir=str(cache), num_clips=4),
        loop=LoopConfig(steps=2, save_every=1, log_every=1, export_every=1),
    )


def held_out(ranks: Ranks) -> dict[str, float]:
    """The loss of the network on three clips."""
    dit = make_state(ranks).modules["dit"]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 3, 2, 6, generator=generator)
    context = torch.randn(3, 12, 10, generator=generator)
    context[:, 5:] = 0
    cache = LatentCache(latents, lambda number, rng: str(number))

    def encode(captions: list[str]) -> tuple[torch.Tensor, int]:
        return context[[int(one) for one in captions]], 5

    return held_out_loss(dit, encode, cache, range(3), False, ranks, "val")


# What follows runs in two processes.


def sharded(ranks: Ranks, root: Path) -> dict:
    results = {"shard": train(ranks, root / "shard")}
    ranks.first(ranks.is_main and until_second_step(root / "shard", root / "resumed"))
    results["resumed"] = train(ranks, root / "resumed")
    results["from one"] = train(ranks, root / "one, then two")
    for recompute in ("none", "selective"):
        name = f"bfloat16, {recompute}"
        results[name] = train(ranks, root / name, bfloat16=True, recompute=recompute)
    results["stopped"] = stop_one(ranks, root / "stopped")
    results["nan"] = break_one(ranks, root / "nan")
    results["disk"] = fill_one_disk(ranks, root / "disk")
    for name, damage in DAMAGE.items():
        results[f"damaged {name}"] = damage_one(ranks, root / "shard", root / name, damage)
    results["muon"] = muon_update(ranks)
    results["held out"] = held_out(ranks)
    return results


def stop_one(ranks: Ranks, folder: Path) -> list:
    step = make_step(ranks)

    def signalled(state: TrainState) -> dict[str, float]:
        if state.step == 0 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(state)

    state = make_state(ranks)
    finished = run_training(state, signalled, LOOP, folder, {}, ranks=ranks)
    return ranks.gather((finished, state.step))


def break_one(ranks: Ranks, folder: Path) -> list:
    def broken(state: TrainState) -> dict[str, float]:
        return {"loss": float("nan") if ranks.rank == 1 and state.step == 1 else 1.0}

    try:
        run_training(make_state(ranks), broken, LOOP, folder, {}, ranks=ranks)
    except WanError as error:
        return ranks.gather(str(error))
    return []


def fill_one_disk(ranks: Ranks, folder: Path) -> list:
    import train.checkpoint as module

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    original = module.save_file
    if ranks.rank == 1:
        module.save_file = disk_full
    try:
        train(ranks, folder)
    except (OSError, WanError) as error:
        return ranks.gather(str(error))
    finally:
        module.save_file = original
    return []


# Of a file with a digest, that only one process verifies, and of the one without, that all read.
DAMAGE = {
    "state-00000.safetensors": lambda content: content[: len(content) // 2],
    "state-00001.safetensors": lambda content: content[:5],
    "state.json": lambda content: content[:-1],
    "manifest.json": lambda content: b"{\xa2" + content[2:],  # no UTF-8
}


def damage_one(ranks: Ranks, folder: Path, copy: Path, damage: Callable[[bytes], bytes]) -> list:
    """The step that each process goes on from when a file of the newest checkpoint is damaged."""
    if ranks.is_main:
        shutil.copytree(folder, copy)
        file = copy / "checkpoints" / "step-0000004" / copy.name
        file.write_bytes(damage(file.read_bytes()))
    ranks.first(None)
    tree = load_latest(copy / "checkpoints", ranks)
    return ranks.gather(tree and tree["step"])


def muon_update(ranks: Ranks) -> torch.Tensor:
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 7, bias=False)
    ranks.prepare(layer)
    layer(torch.ones(2, 5) * torch.arange(5)).square().sum().backward()
    Muon(layer.parameters(), lr=0.1).step()
    return gathered(layer.weight).detach().clone()


def replicated(ranks: Ranks, root: Path) -> dict:
    return {"replicate": train(ranks, root / "replicate", replace(LOOP, steps=2))}


def split(ranks: Ranks, root: Path) -> dict:
    results = {"sequence": train(ranks, root / "sequence")}
    results["recomputed"] = train(ranks, root / "recomputed", recompute="full")
    results["held out, sequence"] = held_out(ranks)
    return results


def run_process(rank: int, root: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    results = {}
    cases = [
        (sharded, ParallelConfig()),
        (replicated, ParallelConfig(replicate=2)),
        (split, ParallelConfig(sequence=2)),
    ]
    for port, (case, config) in zip(ports, cases, strict=False):
        os.environ["MASTER_PORT"] = str(port)
        with start(config) as ranks:
            results |= case(ranks, root)
    os.environ["MASTER_PORT"] = str(ports[-1])
    finetune(finetune_config(root / "finetuned by two", root / "cache"))
    if rank == 0:
        torch.save(results, root / "results.pt")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(root) -> dict[str, Weights]:
    return train(ALONE, root / "one")


@pytest.fixture(scope="module")
def two(root, one) -> dict:
    """Results of everything that runs in two processes, which are started once."""
    until_second_step(root / "one", root / "one, then two")
    finetune(finetune_config(root / "finetuned by one", root / "cache"))
    mp.spawn(run_process, (root, free_ports(4)), nprocs=2)
    return torch.load(root / "results.pt", weights_only=False)


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]  # others are of a validation


def assert_close(a: dict[str, Weights], b: dict[str, Weights], tolerance: float = 2e-5) -> None:
    """Float32 rounding of sums in another order, grown over four steps of training."""
    for part in a:
        for name, tensor in a[part].items():
            scale = tensor.abs().max()
            distance = (tensor - b[part][name]).abs().max() / scale
            assert distance < tolerance, (part, name, float(distance))


@pytest.mark.parametrize("name", ["shard", "sequence", "recomputed"])
def test_two_processes_train_like_one(root, one, two, name):
    assert losses(root / name) == pytest.approx(losses(root / "one"), rel=1e-5)
    assert_close(one, two[name])


def test_two_copies_train_like_one(root, one, two):
    assert losses(root / "replicate") == pytest.approx(losses(root / "one")[:2], rel=1e-5)
    reference = train(ALONE, root / "two steps", replace(LOOP, steps=2))
    assert_close(reference, two["replicate"])


def test_a_resumed_sharded_run_repeats_an_unbroken_one_bit_for_bit(two):
    for part, tensors in two["shard"].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, two["resumed"][part][name]), (part, name)


def test_a_checkpoint_of_two_processes_continues_in_one(root, one, two):
    folder = until_second_step(root / "shard", root / "two, then one")
    files = {p.name for p in (folder / "checkpoints" / "step-0000002").iterdir()}
    assert {"state-00000.safetensors", "state-00001.safetensors"} < files
    assert_close(one, train(ALONE, folder))


def test_a_checkpoint_of_one_process_continues_in_two(one, two):
    assert_close(one, two["from one"])


def test_a_damaged_part_is_noticed(root, two, capsys):
    folder = until_second_step(root / "shard", root / "damaged")
    part = folder / "checkpoints" / "step-0000002" / "state-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(WanError, match="none of the 1 checkpoints"):
        train(ALONE, folder)
    assert "sha256" in capsys.readouterr().err


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_that_one_process_notices_sets_all_back_to_the_checkpoint_before(two, name):
    assert two[f"damaged {name}"] == [2, 2]


def test_weights_gathered_in_bfloat16_train_like_autocast(root, two):
    train(ALONE, root / "autocast", bfloat16=True)
    # The weights of norms are rounded too, by up to 2^-9, which autocast leaves alone.
    assert losses(root / "bfloat16, none") == pytest.approx(losses(root / "autocast"), rel=5e-3)


def test_recomputing_sharded_blocks_changes_nothing(two):
    for name, weight in two["bfloat16, none"]["weights"].items():
        assert torch.equal(weight, two["bfloat16, selective"]["weights"][name])


def test_a_signal_to_one_process_stops_all_after_the_same_step(root, two):
    assert two["stopped"] == [(False, 1)] * 2
    assert [p.name for p in list_checkpoints(root / "stopped" / "checkpoints")] == ["step-0000001"]


def test_a_number_that_is_not_finite_in_one_process_stops_all(two):
    assert len(two["nan"]) == 2
    assert all("step 1: loss is nan" in message for message in two["nan"])


def test_a_full_disk_of_one_process_stops_all_and_leaves_no_litter(root, two):
    assert len(two["disk"]) == 2
    assert all("No space left" in message for message in two["disk"])
    assert list((root / "disk" / "checkpoints").iterdir()) == []


def test_muon_updates_a_sharded_matrix_as_a_whole_one(two):
    # Gradients are sums of small integers here, so that even Muon's bfloat16 is the same.
    torch.testing.assert_close(two["muon"], muon_update(ALONE), rtol=0, atol=1e-3)


def test_the_command_gives_the_same_network_from_two_processes(root, two):
    folders = [root / f"finetuned by {n}" for n in ("one", "two")]
    assert losses(folders[1]) == pytest.approx(losses(folders[0]), rel=1e-5)
    a, b = (
        load_state(open_checkpoint(f / "model" / "transformer"), "transformer") for f in folders
    )
    assert a.keys() == b.keys()
    # Two warm-up steps of at most 2e-5 each, wherever Adam takes rounding for a gradient.
    assert all((a[name].float() - b[name].float()).abs().max() < 5e-5 for name in a)


def test_two_processes_export_whole_models_and_one_exports_from_their_checkpoints(root, two):
    run = root / "finetuned by two"
    export_kept(ExportConfig(str(run), output=str(run / "from the checkpoint")))
    export_kept(ExportConfig(str(run), step=1, output=str(run / "from the first")))
    pairs = {"from the first": "exports/step-0000001", "model": "exports/step-0000002"}
    for name, other in (pairs | {"from the checkpoint": "model"}).items():
        files = list_files(run / name)
        assert files.keys() == list_files(run / other).keys()
        assert all((run / other / f).read_bytes() == p.read_bytes() for f, p in files.items())


@pytest.mark.parametrize("name", ["held out", "held out, sequence"])
def test_the_loss_on_held_out_clips_does_not_depend_on_the_number_of_processes(two, name):
    assert two[name] == pytest.approx(held_out(ALONE), rel=1e-5)


def test_two_processes_write_the_samples_of_one(root, two):
    folders = [root / f"finetuned by {n}/samples" for n in ("one", "two")]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    assert len(names[0]) == 3 * 2 * 2  # prompts, weights, saves
    for name in names[0]:
        a, b = (read_video(folder / name)[0].astype(int) for folder in folders)
        assert abs(a - b).max() <= 8  # a compressed file tells a rounding more


def test_alone_nothing_is_wrapped_or_averaged():
    layer = torch.nn.Linear(2, 2)
    with start(ParallelConfig()) as ranks:
        ranks.prepare(layer)
        assert not dist.is_initialized()
        assert ranks.mean({"a": 0.1}) == {"a": 0.1}
        assert ranks.share(3) == slice(0, 3)
    assert type(layer.weight) is torch.nn.Parameter
    assert type(layer) is torch.nn.Linear


@pytest.mark.parametrize(
    ("config", "size", "shard"),
    [
        (ParallelConfig(), 8, 8),
        (ParallelConfig(replicate=2), 8, 4),
        (ParallelConfig(replicate=2, sequence=4), 8, 1),
    ],
)
def test_what_is_left_shards_the_weights(config, size, shard):
    assert share_out(config, size) == shard


@pytest.mark.parametrize("config", [ParallelConfig(shard=2), ParallelConfig(sequence=2)])
def test_other_numbers_of_processes_are_refused(config):
    with pytest.raises(WanError, match="must be the number of processes, 1"), start(config):
        pass


def test_a_batch_is_shared_out_evenly_or_not_at_all():
    ranks = Ranks(torch.device("cpu"))
    ranks.data_rank, ranks.data_size = 1, 2
    assert ranks.share(6) == slice(3, 6)
    with pytest.raises(WanError, match="multiple of the 2 groups"):
        ranks.share(5)
    assert ranks.share(8, parts=2) == slice(4, 8)
    with pytest.raises(WanError, match=r"gradient_accumulation=2; nearest: 4 and 8"):
        ranks.share(6, parts=2)


def test_numbers_that_only_some_processes_have_are_averaged_over_those():
    ranks = Ranks(torch.device("cpu"))
    ranks.gather = lambda value: [value, {"loss": 3.0, "exit_2": 5.0}]
    assert ranks.mean({"loss": 1.0, "exit_1": 4.0}) == {"loss": 2.0, "exit_1": 4.0, "exit_2": 5.0}


def test_counts_of_different_clips_are_added_and_greatest_values_stay_greatest():
    ranks = Ranks(torch.device("cpu"))
    ranks.size, ranks.data_size = 4, 2  # two and two share their clips
    own = {"exits_0": 1.0, "student_max": 2.0, "memory_gb": 5.0}
    others = {"exits_0": 3.0, "student_max": 4.0, "memory_gb": 1.0}
    ranks.gather = lambda value: [value, value, others, others]
    assert ranks.mean(own) == {"exits_0": 4.0, "student_max": 4.0, "memory_gb": 5.0}


def test_samples_are_made_in_chunks_by_each_group_its_share():
    asked = []

    def make(rows: list[int]) -> torch.Tensor:
        asked.append(rows)
        return torch.tensor(rows)

    ranks = Ranks(torch.device("cpu"))
    assert ranks.spread_tensors(make, range(5), 2).tolist() == [0, 1, 2, 3, 4]
    assert asked == [[0, 1], [2, 3], [4]]
    asked.clear()
    ranks.size, ranks.data_size, ranks.data_rank = 4, 2, 1
    ranks.gather = lambda value: [torch.tensor([0, 1, 2])] * 2 + [value] * 2
    assert ranks.spread_tensors(make, range(5), 2).tolist() == [0, 1, 2, 3, 4]
    assert asked == [[3, 4], [4]]  # as many calls as the other group: networks are sharded


def test_heads_that_cannot_be_shared_out_are_refused():
    three = SequenceSplit.__new__(SequenceSplit)
    three.size = 3
    with pytest.raises(WanError, match="2 heads cannot be shared out over 3"):
        WanDiT(TINY).split_tokens(three)


# --- train.distill --------------------------------------------------------------------------------

PLAIN = LoopConfig(steps=4, save_every=2, log_every=1, keep_last=9)
SHORT = LoopConfig(steps=2, save_every=2, log_every=1)
BOTH = ScoreConfig(2.0, shift=3.0, critic_ratio=1)  # student and critic move in every step
ADVERSARIAL = {
    "gan": GANConfig(0.5, 0.5, blocks=[0, -1]),
    "first_frame_share": 0.5,
    "scores": BOTH,
    "loop": SHORT,
}
RUNS = {
    "plain": {"loop": PLAIN},
    "gan": ADVERSARIAL,
    "gan of the teacher": ADVERSARIAL | {"gan": GANConfig(0.5, 0.5, host="teacher")},
    "whole chain": {
        "student": StudentConfig(exits="random", truncate_gradient=False),
        "loop": PLAIN,
    },
    "lora": {
        "student": StudentConfig(exits="shared", lora=LoRAConfig(rank=2)),
        "scores": replace(BOTH, critic_lora=LoRAConfig(rank=2)),
        "regression": RegressionConfig(weight=0.5, num_pairs=5, steps=4),
        "loop": SHORT,
    },
    "many": {
        "batch_size": 4,
        "student": StudentConfig(more_timesteps=[[1000, 900, 640]]),
        "gan": GANConfig(0.5, 0.5),
        # All levels in one bin: the mean of a bin is then that of its parts.
        "scores": replace(BOTH, lowest=0.81, phased=True, unguided_share=0.5, clip_share=0.5),
        "regression": RegressionConfig(weight=0.5, num_pairs=5, steps=4),
        "on_policy": OnPolicyConfig(weight=0.5, steps=2),
        "loop": SHORT,
    },
}
IN_PARTS = "many, in parts"
# Run, how it is shared out, and what it goes on from.
IN_TWO = {
    "plain": ("plain", ParallelConfig()),
    "plain, sequence": ("plain", ParallelConfig(sequence=2)),
    "gan": ("gan", ParallelConfig()),
    "gan, sequence": ("gan", ParallelConfig(sequence=2)),
    "gan of the teacher, sequence": ("gan of the teacher", ParallelConfig(sequence=2)),
    "lora": ("lora", ParallelConfig()),
    "whole chain": ("whole chain", ParallelConfig()),
    "whole chain, sequence": ("whole chain", ParallelConfig(sequence=2)),
    IN_PARTS: ("many", ParallelConfig()),
    "one, then two": ("plain", ParallelConfig()),
    "two, then two": ("plain", ParallelConfig()),
}


def distill_config(folder: Path, restless: Path, run: str, **changes) -> DistillConfig:
    """Three captions are validated: with two processes, one of them makes two."""
    config = settings(folder, restless, batch_size=2, validation_captions=3)
    return replace(config, lr=1e-2, critic_lr=1e-2, **(RUNS[run] | changes))


def calm_optimizers(*arguments, **options) -> dict[str, torch.optim.Optimizer]:
    """As for `make_state`: with a large eps rounding stays small and sizes of gradients show."""
    optimizers = make_optimizers(*arguments, **options)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["eps"] = 1e-2
    return optimizers


def distill_in_two(rank: int, root: Path, restless: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    dmd.make_optimizers = calm_optimizers
    for port, (name, (run, parallel)) in zip(ports, IN_TWO.items(), strict=True):
        os.environ["MASTER_PORT"] = str(port)
        if name == "two, then two" and rank == 0:
            until_second_step(root / "two/plain/run", root / "two" / name / "run")
        config = distill_config(root / "two" / name, restless, run, parallel=parallel)
        parts = 2 if name == IN_PARTS else 1
        assert distill(replace(config, gradient_accumulation=parts)) == 0


@pytest.fixture(scope="module")
def restless(teacher) -> Path:
    """The tiny teacher, but with no weights at zero, for 5 tokens: an odd number."""
    pipeline = read_pipeline_config(teacher)
    write_configs(replace(pipeline, defaults=SamplingDefaults(32, 32, 17, 8, 4, 3.0)), teacher)
    dit = with_random_weights(WanDiT(pipeline.transformer))
    (teacher / "transformer/diffusion_pytorch_model.safetensors").unlink()
    save_component(dit.state_dict(), teacher / "transformer", "transformer")
    return teacher


@pytest.fixture(scope="module")
def distilled(root, restless) -> Path:
    """Folder of `one` and `two`, each with the runs that so many processes finished."""
    one, two = root / "one", root / "two"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dmd, "make_optimizers", calm_optimizers)
        for run in RUNS:
            assert distill(distill_config(one / run, restless, run)) == 0
        parts = distill_config(one / IN_PARTS, restless, "many", gradient_accumulation=4)
        assert distill(parts) == 0
        until_second_step(one / "plain/run", two / "one, then two/run")
        mp.spawn(distill_in_two, (root, restless, free_ports(len(IN_TWO))), nprocs=2)
        until_second_step(two / "plain/run", one / "two, then one/run")
        assert distill(distill_config(one / "two, then one", restless, "plain")) == 0
    return root


TOLERANCE = 3e-6  # float32 rounding, grown over two to four steps that move weights by up to 1e-2
LOGGED = ("exits_", "student_max", "critic_loss", "loss_student", "gan_", "regression")
LOGGED += ("student_grad_norm", "critic_grad_norm", "motion_ratio", "spread_ratio")


def assert_same_weights(one: Weights, two: Weights) -> None:
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes_distil_the_student_of_one(distilled, restless, name):
    run, _ = IN_TWO[name]
    one = distill_config(distilled / "one" / run, restless, run)
    two = distill_config(distilled / "two" / name, restless, run)
    expected, seen = metrics(one), metrics(two)
    for line, other in zip(expected[-len(seen) :], seen, strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if key.startswith(LOGGED):
                assert other[key] == pytest.approx(line[key], rel=3e-5), key
    assert_same_weights(student_weights(one), student_weights(two))


def test_a_distillation_in_parts_is_that_of_the_batch(distilled, restless):
    whole, parts = (
        distill_config(distilled / "one" / n, restless, "many") for n in ("many", IN_PARTS)
    )
    assert_same_weights(student_weights(whole), student_weights(parts))
    for line, other in zip(metrics(whole), metrics(parts), strict=True):
        for key in line:
            if key.startswith(LOGGED):
                assert other[key] == pytest.approx(line[key], rel=3e-5), key


def test_a_resumed_distillation_in_two_repeats_an_unbroken_one_bit_for_bit(distilled, restless):
    straight, resumed = (
        student_weights(distill_config(distilled / "two" / name, restless, "plain"))
        for name in ("plain", "two, then two")
    )
    assert all(torch.equal(weight, resumed[name]) for name, weight in straight.items())


def test_a_distillation_in_two_goes_on_in_one(distilled, restless):
    straight, resumed = (
        student_weights(distill_config(distilled / "one" / name, restless, "plain"))
        for name in ("plain", "two, then one")
    )
    assert_same_weights(straight, resumed)


@pytest.mark.parametrize("step", [2, 4])
def test_a_checkpoint_has_the_students_weights_and_their_average_apart(distilled, step):
    one, two = (
        load_checkpoint(distilled / number / f"plain/run/checkpoints/step-{step:07d}")
        for number in ("one", "two")
    )
    for part in ("modules", "averages"):
        a, b = (tree[part]["student"] for tree in (one, two))
        assert_same_weights(a.get("weights", a), b.get("weights", b))


@pytest.mark.parametrize("name", ["plain", "plain, sequence"])
def test_the_teachers_panel_does_not_depend_on_who_makes_it(distilled, name):
    one, two = (
        load_file(distilled / folder / "run" / "teacher_panel.safetensors")["latents"]
        for folder in ("one/plain", f"two/{name}")
    )
    torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)

"""The loop: resume, stop, refuse, log, and name the best."""

import json
import os
import re
import signal
import sys
import weakref
from contextlib import ExitStack
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from test_train_checkpoint import assert_same, files_of_at_most
from torch import nn

from configs.distillation import DistillConfig
from configs.schema import default_values
from configs.training import LoopConfig
from train.checkpoint import best_checkpoint, list_checkpoints, load_latest
from train.disk import check_room
from train.loop import (
    LORA_STARTS,
    Diverged,
    check_unchanged,
    run_training,
    step_generator,
    typed_command,
)
from train.metrics import read_metrics
from train.optim import EMA, make_optimizers
from train.parallel import Ranks
from train.state import TrainState
from wan.errors import WanError


def make_state() -> TrainState:
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4)])
    return TrainState({"m": model}, make_optimizers(model, "muon", 1e-2), {"m": EMA(model, 0.9)})


def train_step(state: TrainState) -> dict[str, float]:
    x = torch.randn(8, 4, generator=step_generator(7, state.step))
    layer = state.modules["m"].blocks[0]
    loss = (layer(x) - x).square().mean()
    loss.backward()
    for optimizer in state.optimizers.values():
        optimizer.step()
        optimizer.zero_grad()
    state.averages["m"].update(state.modules["m"])
    return {"loss": loss.item()}


def test_three_steps_resume_three_steps_equal_six(tmp_path):
    straight = make_state()
    run_training(straight, train_step, LoopConfig(steps=6, save_every=3), tmp_path / "straight", {})
    run_training(make_state(), train_step, LoopConfig(steps=3, save_every=3), tmp_path / "two", {})
    resumed = make_state()
    run_training(resumed, train_step, LoopConfig(steps=6, save_every=3), tmp_path / "two", {})
    assert resumed.step == straight.step == 6
    for name, weight in straight.modules["m"].state_dict().items():
        assert torch.equal(weight, resumed.modules["m"].state_dict()[name])
    for name, weight in straight.averages["m"].weights.items():
        assert torch.equal(weight, resumed.averages["m"].weights[name])


def test_a_resume_with_other_settings_is_refused_and_names_them(tmp_path):
    config = LoopConfig(steps=2, save_every=1)
    run_training(make_state(), train_step, config, tmp_path, {"seed": 0, "loop": {"steps": 2}})
    with pytest.raises(WanError, match="seed: 0 there, 1 now"):
        run_training(make_state(), train_step, config, tmp_path, {"seed": 1, "loop": {"steps": 2}})
    # How often to log, and where the folder lies by now, are nobody's business
    changed = {"seed": 0, "loop": {"steps": 2}, "output_dir": "elsewhere"}
    assert run_training(make_state(), train_step, config, tmp_path, changed)


def test_data_that_are_known_by_their_digest_may_lie_elsewhere():
    here, there = {"data": {"folder": "here"}}, {"data": {"folder": "there"}}
    check_unchanged({**here, "data_digest": "1"}, {**there, "data_digest": "1"})
    with pytest.raises(WanError, match=r"data: other clips or captions; .* too old to say which"):
        check_unchanged({**here, "data_digest": "1"}, {**there, "data_digest": "2"})
    with pytest.raises(WanError, match=r"data\.folder"):
        check_unchanged(here, {**there, "data_digest": "1"})


@pytest.mark.parametrize(("digest", "option"), LORA_STARTS.items())
def test_a_lora_that_is_known_by_its_digest_may_lie_elsewhere(digest, option):
    check_unchanged({option: "here", digest: "1"}, {option: "there", digest: "1"})
    with pytest.raises(WanError, match=re.escape(digest)):
        check_unchanged({option: "here", digest: "1"}, {option: "there", digest: "2"})
    with pytest.raises(WanError, match=re.escape(option)):
        check_unchanged({option: None}, {option: "there", digest: "1"})


def test_processes_that_opened_different_data_do_not_train(tmp_path):
    class Two(Ranks):
        def gather(self, value):
            return [value, "other" if value == "one" else value]

    two = Two(torch.device("cpu"))
    config = LoopConfig(steps=1)
    assert run_training(make_state(), train_step, config, tmp_path, {"data_digest": "x"}, ranks=two)
    with pytest.raises(WanError, match="changed it while processes opened it"):
        run_training(make_state(), train_step, config, tmp_path, {"data_digest": "one"}, ranks=two)


def test_a_resume_with_one_more_or_one_less_setting_is_refused():
    less, more = {"dit": {"dim": 8}}, {"dit": {"dim": 8, "eps": 0.5}}
    with pytest.raises(WanError, match=r"dit\.eps: None there, 0\.5 now"):
        check_unchanged(less, more)
    with pytest.raises(WanError, match=r"dit\.eps: 0\.5 there, None now"):
        check_unchanged(more, less)


def test_a_setting_that_an_older_checkpoint_does_not_know_is_no_change_where_it_is_off():
    check_unchanged({"lr": 1.0}, {"lr": 1.0, "new": 0, "list": []})
    with pytest.raises(WanError, match="new: None there, 8 now"):
        check_unchanged({"lr": 1.0}, {"lr": 1.0, "new": 8})
    with pytest.raises(WanError, match="old: 8 there, 0 now"):
        check_unchanged({"old": 8}, {"old": 0})


def test_an_option_that_is_younger_than_a_checkpoint_may_have_its_default():
    settings = asdict(DistillConfig())
    old = asdict(DistillConfig())
    del old["on_policy"], old["scores"]["unguided_above"], old["data"]["two_objects"]
    defaults = default_values(DistillConfig)
    check_unchanged(old, settings, (), defaults)
    settings["on_policy"]["steps"] = 3
    with pytest.raises(WanError, match=r"settings \(on_policy.steps: None there, 3 now\)"):
        check_unchanged(old, settings, (), defaults)


def test_an_allowed_change_of_weight_decay_is_not_undone_by_the_checkpoint(tmp_path):
    run_training(make_state(), train_step, LoopConfig(steps=1), tmp_path, {"weight_decay": 0.01})
    resumed = make_state()
    resumed.optimizers = make_optimizers(resumed.modules["m"], "muon", 1e-2, (0.5, 0.6), 0.3)
    config = LoopConfig(steps=2, allow_changes=True)
    run_training(resumed, train_step, config, tmp_path, {"weight_decay": 0.3})
    (muon,), (adamw,) = (resumed.optimizers[name].param_groups for name in ("muon", "adamw"))
    assert muon["weight_decay"] == 0.3
    assert adamw["betas"] == (0.5, 0.6)
    assert resumed.optimizers["muon"].state[muon["params"][0]]["momentum"].any()


def test_a_checkpoint_that_was_read_does_not_stay_in_memory(tmp_path, monkeypatch):
    run_training(make_state(), train_step, LoopConfig(steps=1), tmp_path, {})
    read = []

    def watched(*args):
        tree = load_latest(*args)
        read.extend(weakref.ref(weight) for weight in tree["modules"]["m"].values())
        return tree

    def step(state):
        assert read
        assert all(weight() is None for weight in read)
        return train_step(state)

    monkeypatch.setattr("train.loop.load_latest", watched)
    run_training(make_state(), step, LoopConfig(steps=2), tmp_path, {})


def test_checkpoints_of_another_model_are_refused(tmp_path):
    run_training(make_state(), train_step, LoopConfig(steps=1, save_every=1), tmp_path, {})
    other = make_state()
    other.modules["m"].extra = nn.Linear(2, 2)
    with pytest.raises(WanError, match="belong to another run"):
        run_training(other, train_step, LoopConfig(steps=2), tmp_path, {})


def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    state = make_state()

    def broken(state):
        return {"loss": float("nan") if state.step == 2 else 1.0}

    with pytest.raises(WanError, match=r"step 2: loss is nan.*step-0000002: the same command"):
        run_training(state, broken, LoopConfig(steps=5, save_every=1), tmp_path, {})


def test_a_run_that_diverges_before_its_first_checkpoint_speaks_of_none(tmp_path):
    def broken(state):
        raise Diverged("step 0: a weight is nan")

    words = r"a weight is nan.*No checkpoint .* lower lr= or a longer warmup=$"
    with pytest.raises(Diverged, match=words):
        run_training(make_state(), broken, LoopConfig(steps=5, save_every=1), tmp_path, {})
    with pytest.raises(Diverged, match=r"warmup=, or bfloat16=false$"):
        run_training(make_state(), broken, LoopConfig(steps=5), tmp_path, {"bfloat16": True})


def test_a_step_that_a_run_has_passed_is_loaded_and_nothing_is_written(tmp_path):
    def config(steps):
        return LoopConfig(steps=steps, save_every=2, keep_last=3)

    def settings(steps):
        return {"loop": {"steps": steps}}

    run_training(make_state(), train_step, config(6), tmp_path, settings(6))
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    state = make_state()
    assert run_training(state, no_step, config(4), tmp_path, settings(4))
    assert_same(state.to_tree(), straight_to(tmp_path / "four", config(4)))
    with pytest.raises(WanError, match=r"loop\.steps=5: .* step 6, .* of 2, 4, 6 are there"):
        run_training(make_state(), no_step, config(5), tmp_path, settings(5))
    now = {path: path.read_bytes() for path in tmp_path.rglob("*") if path in there}
    assert now == there


def no_step(state):
    raise AssertionError("there is nothing to train")


def straight_to(folder, config):
    state = make_state()
    run_training(state, train_step, config, folder, {})
    return state.to_tree()


class Written:
    """Artefacts that only note which steps were written, and refuse to write one twice."""

    network, made = "m", ()

    def __init__(self):
        self.steps = []

    def write_step(self, state, folder, ranks):
        if state.step not in self.steps:  # as those that are there already
            self.steps.append(state.step)


@pytest.mark.parametrize("stopped", range(1, 8))
def test_exports_have_their_own_rhythm_wherever_a_run_was_stopped(tmp_path, stopped):
    """Of steps 2, 4 and 6, with checkpoints of 3, 6 and 7, and of the step where it stopped."""
    config = LoopConfig(steps=7, save_every=3, export_every=2)
    exported = Written()

    def signalled(state):
        if state.step == stopped - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state)

    def run(step):
        return run_training(make_state(), step, config, tmp_path, {}, artefacts=exported)

    assert run(signalled) == (stopped == 7)
    assert exported.steps == [step for step in (2, 4, 6) if step < stopped]
    assert run(train_step)
    assert exported.steps == [2, 4, 6]


def test_the_size_of_a_checkpoint_is_known_before_the_first_step(tmp_path):
    run_training(make_state(), train_step, LoopConfig(steps=1), tmp_path, {})
    file = tmp_path / "checkpoints/step-0000001/state.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little")
    steps_of_adamw = 4
    assert file.stat().st_size - 8 - header == make_state().num_bytes() + steps_of_adamw


def test_checkpoints_that_do_not_fit_are_refused_before_the_first_step(
    tmp_path, monkeypatch, capsys
):
    size = make_state().num_bytes()

    def free(count):
        usage = SimpleNamespace(total=10**12, free=count)
        monkeypatch.setattr("train.disk.shutil.disk_usage", lambda folder: usage)

    def check(step=0, artefact=0, **loop):
        check_room(tmp_path, LoopConfig(steps=10, **loop), step, size, artefact, ranked=True)

    free(4 * size - 1)  # two that are kept, the best one, and the next
    words = r"need .* and .* are free; loop\.keep_last=1 needs .*; loop\.save_every=10, .* needs"
    with pytest.raises(WanError, match=words):
        check(save_every=1)
    check(save_every=1, keep_last=1)
    check(save_every=4)  # three in all
    free(size - 1)
    with pytest.raises(WanError, match=r"are free; or free space"):
        check(save_every=10)
    check(step=10)  # nothing is to come
    assert capsys.readouterr().err == ""
    free(size + 5 * 7)
    check(save_every=10, export_every=2, artefact=7)  # five of them, and the end
    assert "6 exports" in capsys.readouterr().err
    free(size + 6 * 7)
    check(save_every=10, export_every=2, artefact=7)
    assert capsys.readouterr().err == ""


def test_room_that_checkpoints_of_a_resumed_run_take_already_is_not_asked_for(
    tmp_path, monkeypatch
):
    run_training(make_state(), train_step, LoopConfig(steps=2, save_every=1), tmp_path, {})
    size = make_state().num_bytes()
    usage = SimpleNamespace(total=10**12, free=size)
    monkeypatch.setattr("train.disk.shutil.disk_usage", lambda folder: usage)
    assert run_training(make_state(), train_step, LoopConfig(steps=4, save_every=1), tmp_path, {})
    usage.free = size - 1
    with pytest.raises(WanError, match="the checkpoints to come need"):
        run_training(make_state(), no_step, LoopConfig(steps=5, save_every=1), tmp_path, {})


def test_a_resume_drops_lines_that_will_be_repeated_and_half_a_line(tmp_path):
    config = LoopConfig(steps=4, log_every=1, save_every=2)
    run_training(make_state(), train_step, config, tmp_path, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "loss": 0.0}) + "\n")  # lost work: never checkpointed
        file.write('{"step": 10, "lo')
    run_training(make_state(), train_step, LoopConfig(steps=6, log_every=1), tmp_path, {})
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [0, 1, 2, 3, 4, 5]


def test_step_generators_differ_between_steps_and_repeat():
    one, two = (torch.randn(4, generator=step_generator(1, s)) for s in (0, 1))
    assert not torch.equal(one, two)
    assert torch.equal(one, torch.randn(4, generator=step_generator(1, 0)))


def test_a_number_that_not_every_step_has_is_averaged_over_those_that_do(tmp_path):
    def train_step(state):
        return {"loss": 1.0, **({"rare": float(state.step)} if state.step % 2 else {})}

    config = LoopConfig(steps=4, log_every=4, save_every=4)
    run_training(make_state(), train_step, config, tmp_path, {})
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["rare"] == 2.0  # steps 1 and 3


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(tmp_path):
    def step_that_starts_another(state):
        with pytest.raises(WanError, match="another process is writing there"):
            run_training(make_state(), train_step, LoopConfig(steps=1), tmp_path, {})
        return train_step(state)

    assert run_training(make_state(), step_that_starts_another, LoopConfig(steps=1), tmp_path, {})


def lines_of(folder) -> list[dict]:
    """The log without what the clock says."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in x.items() if k != "seconds_per_step"} for x in lines]


def test_a_signal_adds_no_candidate_for_the_best_and_no_line(tmp_path):
    def measure(state):
        return {"health": {2: 0.5, 3: 0.9, 4: 0.4}[state.step]}

    def signalled(state):
        if state.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state)

    config = LoopConfig(steps=4, log_every=4, save_every=2)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    assert run_training(make_state(), train_step, config, straight, {}, measure, ranked=True)
    assert not run_training(make_state(), signalled, config, cut, {}, measure, ranked=True)
    assert load_latest(cut / "checkpoints")["step"] == 3
    assert best_checkpoint(cut / "checkpoints").name == "step-0000002"
    assert run_training(make_state(), train_step, config, cut, {}, measure, ranked=True)
    assert best_checkpoint(cut / "checkpoints").name == "step-0000002"
    assert lines_of(cut) == lines_of(straight)


@pytest.mark.parametrize("ranked", [False, True])
def test_only_what_ranks_a_checkpoint_is_measured_before_it(tmp_path, ranked):
    there = []

    def measure(state):
        there.append(
            (state.step, [p.name for p in list_checkpoints(tmp_path / "checkpoints")][-1:])
        )
        return {"health": 1.0}

    config = LoopConfig(steps=2, save_every=1)
    assert run_training(make_state(), train_step, config, tmp_path, {}, measure, ranked=ranked)
    first, second = ["step-0000001"], ["step-0000002"]
    assert there == ([(1, []), (2, first)] if ranked else [(1, first), (2, second)])
    assert (best_checkpoint(tmp_path / "checkpoints") is not None) == ranked


def test_what_ends_the_measuring_costs_no_step_and_the_same_command_goes_on(tmp_path):
    def full(state):
        raise torch.OutOfMemoryError

    config = LoopConfig(steps=4, save_every=2)
    for step in (2, 4):
        with pytest.raises(torch.OutOfMemoryError):
            run_training(make_state(), train_step, config, tmp_path / "cut", {}, full)
        assert load_latest(tmp_path / "cut/checkpoints")["step"] == step
    assert run_training(make_state(), no_step, config, tmp_path / "cut", {}, full)
    straight_to(tmp_path / "straight", config)
    newest = (load_latest(tmp_path / name / "checkpoints") for name in ("cut", "straight"))
    assert_same(*newest)


@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_waits_for_no_measuring_but_that_of_the_last_step(tmp_path, ranked, step):
    measured = []

    def signalled(state):
        if state.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(state)

    def measure(state):
        measured.append(state.step)
        return {}

    config = LoopConfig(steps=4, save_every=2)
    run_training(make_state(), signalled, config, tmp_path, {}, measure, ranked=ranked)
    assert load_latest(tmp_path / "checkpoints")["step"] == step
    assert measured == ([] if step == 2 else [2, 4])


def test_a_line_over_steps_before_and_after_a_resume_is_that_of_an_unbroken_run(tmp_path):
    config = LoopConfig(steps=8, log_every=4, save_every=3)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_training(make_state(), train_step, config, straight, {})

    def broken(state):
        if state.step == 5:
            raise KeyboardInterrupt
        return train_step(state)

    with pytest.raises(KeyboardInterrupt):
        run_training(make_state(), broken, config, cut, {})
    run_training(make_state(), train_step, config, cut, {})
    assert lines_of(cut) == lines_of(straight)


def test_a_finished_run_may_be_asked_for_its_best(tmp_path):
    config = LoopConfig(steps=2, save_every=1)
    run_training(make_state(), train_step, config, tmp_path, {"export": "last"})
    assert run_training(make_state(), train_step, config, tmp_path, {"export": "best"})


def test_speed_counts_steps_and_not_what_is_done_at_a_save(tmp_path, monkeypatch):
    now = 0.0

    def takes(seconds, values):
        nonlocal now
        now += seconds
        return values

    monkeypatch.setattr("train.loop.time", SimpleNamespace(perf_counter=lambda: now))
    config = LoopConfig(steps=6, log_every=2, save_every=3)
    run_training(
        make_state(),
        lambda state: takes(0.5, {"loss": 1.0, "clips": 4.0}),
        config,
        tmp_path,
        {},
        lambda state: takes(100.0, {}),
    )
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["seconds_per_step"] for x in lines] == [0.5] * 3
    assert [x["clips_per_second"] for x in lines] == [8.0] * 3
    assert all("clips" not in x for x in lines)


@pytest.mark.parametrize("full", ["metrics", "checkpoint"])
def test_a_full_disk_ends_a_run_that_goes_on_from_its_last_checkpoint(tmp_path, full):
    """Files can't grow beyond a size that step 5's line, or checkpoint 6, comes to."""
    config = LoopConfig(steps=8, log_every=1, save_every=3)
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    run_training(make_state(), train_step, config, straight, {})
    metrics = cut / "metrics.jsonl"

    def until_full(state):
        if full == "metrics" and state.step == 5:
            limit.enter_context(files_of_at_most(metrics.stat().st_size + 9))
        if full == "checkpoint" and state.step == 5:
            limit.enter_context(files_of_at_most(metrics.stat().st_size + 120))
        return train_step(state)

    with ExitStack() as limit, pytest.raises(OSError, match="large") as caught:
        run_training(make_state(), until_full, config, cut, {})
    named = {"metrics": "metrics.jsonl", "checkpoint": "step-0000006"}
    assert named[full] in str(caught.value)
    assert metrics.read_text().endswith("\n") == (full == "checkpoint")  # or half a line is left
    assert [p.name for p in list_checkpoints(cut / "checkpoints")] == ["step-0000003"]
    run_training(make_state(), train_step, config, cut, {})
    assert lines_of(cut) == lines_of(straight)
    assert_same(load_latest(cut / "checkpoints"), load_latest(straight / "checkpoints"))


def test_wandb_gets_what_a_save_wrote_once_the_checkpoint_is_safe(tmp_path, monkeypatch):
    sent = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, finish=lambda: None)
    run.log = lambda values: sent.append(
        (values, [p.name for p in list_checkpoints(tmp_path / "checkpoints")])
    )
    fake = SimpleNamespace(init=lambda **k: run, Image=lambda path: path, Video=None)
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def draw(state):
        (tmp_path / "samples").mkdir(exist_ok=True)
        (tmp_path / f"samples/{state.step:07d}-sheet.png").touch()
        return {}

    config = LoopConfig(steps=2, save_every=1, wandb_project="x")
    run_training(make_state(), train_step, config, tmp_path, {}, draw)
    pictures = [(v, there) for v, there in sent if "samples/sheet" in v]
    assert [v["samples/sheet"] for v, _ in pictures] == [
        str(tmp_path / f"samples/000000{n}-sheet.png") for n in (1, 2)
    ]
    assert [there[-1] for _, there in pictures] == ["step-0000001", "step-0000002"]


def test_ctrl_c_says_where_the_checkpoint_is_and_the_command_that_goes_on(
    tmp_path, monkeypatch, capsys
):
    def signalled(state):
        os.kill(os.getpid(), signal.SIGINT)
        return train_step(state)

    main = SimpleNamespace(__spec__=SimpleNamespace(name="train.finetune.__main__"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", ["__main__.py", "sample_prompts=a red circle", "lr=1"])
    assert not run_training(make_state(), signalled, LoopConfig(steps=3), tmp_path, {})
    said = capsys.readouterr().err
    assert f"stopped at step 1 of 3; everything is in {tmp_path}/checkpoints/step-0000001" in said
    assert "python -m train.finetune 'sample_prompts=a red circle' lr=1\n" in said
    assert (tmp_path / "checkpoints/step-0000001").is_dir()
    assert typed_command(2).startswith("torchrun --nproc-per-node 2 -m train.finetune ")

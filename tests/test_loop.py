import json

import pytest
import torch
from torch import nn

from configs.training import LoopConfig
from train.loop import run_training, step_generator
from train.optim import EMA, make_optimizers
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


def test_checkpoints_of_another_model_are_refused(tmp_path):
    run_training(make_state(), train_step, LoopConfig(steps=1, save_every=1), tmp_path, {})
    other = make_state()
    other.modules["m"].extra = nn.Linear(2, 2)
    with pytest.raises(WanError, match="belong to another run"):
        run_training(other, train_step, LoopConfig(steps=2), tmp_path, {})


def test_a_half_written_line_of_metrics_does_not_stop_a_resume(tmp_path):
    config = LoopConfig(steps=2, log_every=1, save_every=2)
    run_training(make_state(), train_step, config, tmp_path, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    run_training(make_state(), train_step, LoopConfig(steps=3, log_every=1), tmp_path, {})
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]


def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    state = make_state()

    def broken(state):
        return {"loss": float("nan") if state.step == 2 else 1.0}

    with pytest.raises(WanError, match="step 2: loss is nan"):
        run_training(state, broken, LoopConfig(steps=5, save_every=1), tmp_path, {})


def test_metrics_are_lines_of_json_and_a_resume_drops_repeated_ones(tmp_path):
    config = LoopConfig(steps=4, log_every=1, save_every=2)
    run_training(make_state(), train_step, config, tmp_path, {})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "loss": 0.0}) + "\n")  # lost work: never checkpointed
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

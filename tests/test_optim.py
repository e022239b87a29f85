import itertools

import pytest
import torch
from torch import nn

from configs.training import OptimConfig
from train.checkpoint import save_checkpoint
from train.optim import (
    EMA,
    Muon,
    apply_gradients,
    learning_rate,
    make_optimizers,
    orthogonalize,
    warn_of_warmup,
    with_precision,
)
from train.parallel import ALONE
from wan.errors import WanError


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix).float())
    assert values.min() > 0.5
    assert values.max() < 1.4


@pytest.mark.parametrize("fast", [True, False])
def test_muon_computes_in_bfloat16_only_where_that_is_fast(monkeypatch, fast):
    monkeypatch.setattr("train.optim.is_fast_in_bfloat16", lambda device: fast)
    result = orthogonalize(torch.randn(16, 32, generator=torch.Generator().manual_seed(0)))
    assert result.dtype == torch.float32
    assert torch.equal(result, result.bfloat16().float()) == fast


def test_muon_fits_a_linear_map_with_a_convolution_kernel_in_it():
    torch.manual_seed(0)
    layer = nn.Conv3d(4, 6, 3)
    wanted = nn.Conv3d(4, 6, 3)
    optimizer = Muon([layer.weight], lr=0.02, weight_decay=0.0)
    x = torch.randn(8, 4, 3, 3, 3)
    with torch.no_grad():
        layer.bias.copy_(wanted.bias)
        target = wanted(x)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.05 * losses[0]


def test_optimizers_share_out_every_trainable_weight_once():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)])
    model.head = nn.Linear(4, 4)
    model.frozen = nn.Linear(4, 4).requires_grad_(False)
    optimizers = make_optimizers(model, "muon", lr=1e-3)
    given = [p for o in optimizers.values() for g in o.param_groups for p in g["params"]]
    assert len(given) == len(set(given)) == 6
    muon = [p for g in optimizers["muon"].param_groups for p in g["params"]]
    assert len(muon) == 1
    assert muon[0] is model.blocks[0].weight


def test_decay_touches_matrices_only():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    (optimizer,) = make_optimizers(model, "adamw", lr=1e-3, weight_decay=0.1).values()
    decays = {p: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[p] for p in model.parameters()] == [0.1, 0, 0, 0]


def test_the_end_of_a_step_clips_sets_the_rate_and_clears():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=9.0)
    assert apply_gradients({"sgd": optimizer}, [weight], lr=0.1, max_norm=1.0) == 5.0
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.06, -0.08]))
    assert weight.grad is None


def test_unknown_optimizer_is_refused():
    with pytest.raises(WanError, match="adamw or muon"):
        make_optimizers(nn.Linear(2, 2), "sgd", lr=1.0)


def test_learning_rate_rises_linearly_and_falls_to_its_final_share():
    rates = [learning_rate(s, 1.0, steps=100, warmup=10, final=0.1) for s in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_average_of_a_constant_is_the_constant():
    layer = nn.Linear(3, 3)
    average = EMA(layer, decay=0.9)
    for _ in range(5):
        average.update(layer)
    copy = nn.Linear(3, 3)
    average.copy_to(copy)
    torch.testing.assert_close(copy.weight, layer.weight)


def test_early_averages_follow_faster():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = EMA(layer, decay=0.9)
    nn.init.ones_(layer.weight)
    average.update(layer)
    assert average.weights["weight"].item() == pytest.approx(1 - 2 / 11)


def test_average_follows_a_change_with_its_decay():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(layer.weight)
    average = EMA(layer, decay=0.5)
    average.updates = 1000  # past the ramp
    nn.init.ones_(layer.weight)
    average.update(layer)
    assert average.weights["weight"].item() == pytest.approx(0.5)


def test_a_warmup_longer_than_the_run_is_warned_of(capsys):
    warn_of_warmup(100, 100)
    assert not capsys.readouterr().err
    assert learning_rate(99, 1.0, 100, 100) == 1
    warn_of_warmup(6, 100)
    assert "ends at 0.06 of what was asked for" in capsys.readouterr().err
    assert learning_rate(5, 1.0, 6, 100) == 0.06


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_as_the_run_began_or_where_it_is_fast_unless_given(
    monkeypatch, tmp_path, capsys, fast
):
    monkeypatch.setattr("train.optim.is_fast_in_bfloat16", lambda device: fast)
    assert with_precision(OptimConfig(), tmp_path, ALONE).bfloat16 is fast
    given = OptimConfig(bfloat16=not fast)
    assert with_precision(given, tmp_path, ALONE).bfloat16 is not fast
    # A run that began elsewhere goes on as it began.
    tree = {"weight": torch.ones(1), "settings": {"bfloat16": not fast}}
    save_checkpoint(tmp_path / "checkpoints", 1, tree)
    assert with_precision(OptimConfig(), tmp_path, ALONE).bfloat16 is not fast
    assert f"bfloat16={str(not fast).lower()}, as the run began" in capsys.readouterr().err
    given = OptimConfig(bfloat16=fast)
    assert with_precision(given, tmp_path, ALONE).bfloat16 is fast
    newest = save_checkpoint(tmp_path / "checkpoints", 2, tree | {"settings": {"bfloat16": fast}})
    assert with_precision(OptimConfig(), tmp_path, ALONE).bfloat16 is fast
    (newest / "state.json").write_text("{}")
    assert with_precision(OptimConfig(), tmp_path, ALONE).bfloat16 is not fast

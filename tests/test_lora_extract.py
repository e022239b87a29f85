"""LoRAs from two checkpoints: what is kept, what is lost and said to be, what others read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_lora import QUERY, fused_by_diffusers, numbers, state_of, tiny_dit
from torch import Tensor

from configs.cli import execute
from configs.command_line import CommandLine
from configs.conversion import ConvertConfig
from infer.convert.run import convert as main
from wan.errors import WanError
from wan.lora.extract import extract_lora, low_rank
from wan.lora.merge import merge_lora, read_lora
from wan.weights.checkpoint import open_checkpoint
from wan.weights.hub import STUDENT
from wan.weights.safetensors_file import write_tensors
from wan.weights.save import save_component

FULL = 1000  # above every side of the tiny model's matrices


def save(folder: Path, state: dict[str, Tensor], layout: str = "diffusers") -> Path:
    save_component(state, folder, "transformer", layout)
    return folder


def student_state(names: str = "") -> dict[str, Tensor]:
    """The tiny DiT's weights, those whose name holds `names` changed everywhere."""
    return {
        name: value + numbers(*value.shape, seed=seed) if names in name else value
        for seed, (name, value) in enumerate(state_of(tiny_dit()).items())
    }


def extract(tmp_path: Path, student: dict[str, Tensor], rank: int = FULL, **options):
    base = open_checkpoint(save(tmp_path / "base", state_of(tiny_dit())))
    # In the other layout, since names must not matter.
    trained = open_checkpoint(save(tmp_path / "student", student, "official"))
    lora = extract_lora(trained, base, rank, **options)
    write_tensors(tmp_path / "lora.safetensors", lora.tensors)
    return lora


def merged(path: Path) -> dict[str, Tensor]:
    dit = tiny_dit()
    merge_lora(dit, read_lora(path))
    return state_of(dit)


def test_full_rank_and_differences_give_the_student_back(tmp_path):
    student = student_state()
    lora = extract(tmp_path, student, diffs=True)
    state = merged(tmp_path / "lora.safetensors")
    assert len(lora.changes) == len(student)
    assert not lora.left_out
    for name, value in student.items():
        # Three float32 roundings: both factors of a sum of up to 40 terms, and the merge.
        torch.testing.assert_close(state[name], value, rtol=1e-6, atol=5e-7, msg=name)
    assert all(change.residual < 1e-13 for change in lora.changes)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (24, 24)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_a_pair_is_the_truncated_svd(shape, rank):
    delta = numbers(*shape).double()
    down, up = low_rank(delta, rank)
    assert down.shape == (rank, shape[1])
    assert up.shape == (shape[0], rank)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close(up @ down, u[:, :rank] * s[:rank] @ v[:rank])
    torch.testing.assert_close(up.norm(dim=0), s[:rank].sqrt())
    torch.testing.assert_close(down.norm(dim=1), s[:rank].sqrt())


def test_a_matrix_of_low_rank_is_kept_whole_at_that_rank():
    delta = numbers(24, 2).double() @ numbers(2, 40, seed=2).double()
    down, up = low_rank(delta, 6)  # four directions more than there are
    assert down.isfinite().all()
    assert up.isfinite().all()
    torch.testing.assert_close(up @ down, delta)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_residual_is_the_energy_of_the_other_singular_values(tmp_path, rank):
    student = student_state()
    lora = extract(tmp_path, student, rank)
    base = state_of(tiny_dit())
    pairs = [change for change in lora.changes if change.rank]
    assert len(pairs) == 2 * 10 + 7
    for change in pairs:
        delta = (student[change.name].double() - base[change.name].double()).flatten(1)
        energy = torch.linalg.svdvals(delta).square()
        expected = 1 - energy[:rank].sum() / energy.sum()
        assert change.residual == pytest.approx(float(expected), rel=1e-5), change.name
    total = sum(float((student[n].double() - base[n].double()).square().sum()) for n in student)
    assert sum(change.energy for change in lora.changes) == pytest.approx(total)
    # Nothing is lost unsaid: what a merge does not bring back is exactly the residual.
    state = merged(tmp_path / "lora.safetensors")
    missing = sum(float((student[n].double() - state[n].double()).square().sum()) for n in student)
    assert lora.residual == pytest.approx(missing / total, rel=1e-4)


def test_what_pairs_cannot_hold_is_listed(tmp_path):
    lora = extract(tmp_path, student_state())
    left = {change.name for change in lora.left_out}
    matrices = {n for n, p in tiny_dit().named_parameters() if p.ndim > 1 and n.endswith(".weight")}
    assert left == set(state_of(tiny_dit())) - matrices
    assert "blocks.0.modulation" in left
    assert lora.residual == pytest.approx(
        sum(c.energy for c in lora.left_out) / sum(c.energy for c in lora.changes), rel=1e-6
    )


def test_equal_parameters_take_no_space(tmp_path):
    lora = extract(tmp_path, student_state(f"{QUERY}."))
    assert {change.name for change in lora.changes} == {f"{QUERY}.weight", f"{QUERY}.bias"}
    assert len(lora.tensors) == 2
    assert lora.num_equal == len(state_of(tiny_dit())) - 2


def test_diffusers_reads_the_pairs_as_they_are_meant(tmp_path):
    student = {
        name: value if name.endswith(".weight") and value.ndim > 1 else state_of(tiny_dit())[name]
        for name, value in student_state().items()
    }
    extract(tmp_path, student)
    for name, value in fused_by_diffusers(tmp_path / "lora.safetensors").items():
        torch.testing.assert_close(value, student[name], rtol=1e-6, atol=1e-6, msg=name)


def test_what_rounding_the_file_costs_is_counted(tmp_path):
    lora = extract(tmp_path, student_state("attention.query.weight"), dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in lora.tensors.values()} == {torch.bfloat16}
    # Two factors rounded to 8 bits: relative errors of at most 2^-9 each, squared.
    assert 1e-7 < lora.residual < 4 * 2.0**-18


# --- the command ----------------------------------------------------------------------------------


def run(*arguments: str) -> int:
    keys = ("source", "output", "config", "base")
    line = CommandLine(ConvertConfig, "convert", (), path_keys=keys)
    return execute(lambda run: main(run.config), line, "", list(arguments))


def test_the_command_writes_the_file_and_its_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(Path("teacher/transformer"), state_of(tiny_dit()))
    save(Path("student"), student_state("blocks.1"))
    assert run("source=student", "base=teacher", "output=out/lora.safetensors", "rank=3") == 0
    printed = capsys.readouterr().out
    assert "left out, " in printed
    assert "blocks.1.modulation" in printed
    report = json.loads(Path("out/lora.json").read_text())
    assert f"{report['residual']:.3%} lost in all" in printed
    for layer in report["layers"]:
        assert layer["residual"] == pytest.approx(layer["lost"] / layer["energy"])
        if layer["rank"]:
            assert f"{layer['residual']:.3%}  {layer['name']}" in printed
    lora = read_lora("out/lora.safetensors")
    assert {pair.rank for pair in lora.pairs.values()} == {3}
    assert all(name.startswith("blocks.1.") for name in lora.names)


def test_a_lora_of_a_sparse_student_says_its_attention(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(STUDENT, "student")
    path = Path("student/sampling_defaults.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention": "spatial"}))
    assert run("source=student", "base=mini-teacher", "output=lora.safetensors", "rank=1") == 0
    assert read_lora("lora.safetensors").attention == "spatial"
    assert run("source=mini", "base=mini-teacher", "output=dense.safetensors", "rank=1") == 0
    assert read_lora("dense.safetensors").attention is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=student", "base=teacher", "output=a.safetensors"], "rank= is missing"),
        (["source=student", "base=teacher", "output=a.safetensors", "rank=0"], "at least 1"),
        (["source=student", "base=teacher", "output=a", "rank=2"], "a.safetensors"),
        (
            ["source=student", "base=teacher", "output=taken.safetensors", "rank=2"],
            "is there already",
        ),
        (
            ["source=student", "base=teacher", "output=a.safetensors", "rank=2", "layout=official"],
            "not for a LoRA",
        ),
        (["source=student", "output=a", "layout=official", "rank=2"], "only with base="),
        (["source=teacher", "base=teacher", "output=a.safetensors", "rank=2"], "equal weights"),
        (["source=small", "base=teacher", "output=a.safetensors", "rank=2"], "different networks"),
        (["source=wide", "base=teacher", "output=a.safetensors", "rank=2"], "of other shapes"),
        (["source=biases", "base=teacher", "output=a.safetensors", "rank=2"], "diffs=true"),
        (["source=broken", "base=teacher", "output=a.safetensors", "rank=2"], "not finite"),
        (["source=two", "base=teacher", "output=a.safetensors", "rank=2"], "a LoRA each"),
        (["source=student", "base=nowhere", "output=a.safetensors", "rank=2"], "no such file"),
    ],
)
def test_wrong_requests_end_in_one_line_and_write_nothing(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    save(Path("teacher"), state_of(tiny_dit()))
    save(Path("student"), student_state())
    save(Path("small"), state_of(tiny_dit(num_layers=1)))
    save(Path("wide"), state_of(tiny_dit(ffn_dim=48)))
    save(Path("biases"), student_state("bias"))
    broken = student_state()
    broken[f"{QUERY}.weight"][0, 0] = float("nan")
    save(Path("broken"), broken)
    Path("two/transformer_2").mkdir(parents=True)
    Path("taken.safetensors").write_text("mine")
    before = sorted(path for path in tmp_path.rglob("*"))
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_a_rank_must_be_positive(tmp_path):
    with pytest.raises(WanError, match="at least 1"):
        extract(tmp_path, student_state(), rank=-1)

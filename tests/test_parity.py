"""The parity command: its ladder passes at a small size, and it fails where it should."""

import json
import math
import os
import shutil
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

from configs.cli import run
from configs.parity import ParityConfig
from infer.parity import models as parity_sides
from infer.parity import run as parity
from infer.parity.__main__ import LINE
from infer.parity.models import random_sides
from infer.parity.run import GENERAL_RUNGS, RELEASE_RUNGS
from infer.parity.run import parity as main
from infer.parity.tolerance import Row, compare, compare_points, compare_to_truth, distance, table
from infer.parity.with_weights import autoencoder, pipeline, text_encoder, tokens, transformer
from infer.parity.without_weights import samplers, schedules
from wan.errors import WanError
from wan.models.umt5 import relative_position_buckets
from wan.sampling.samplers import few_step

pytestmark = pytest.mark.filterwarnings("ignore:the prompt has", "ignore:`torch_dtype`")
SETTINGS = {"dtype": torch.float32, "steps": 3, "seed": 0}


@pytest.fixture(scope="module")
def all_sides(tmp_path_factory):
    return random_sides(tmp_path_factory.mktemp("releases"), SETTINGS)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def failures(rows: list[Row]) -> str:
    assert rows
    return table(row for row in rows if not row.passed) if not all(r.passed for r in rows) else ""


@pytest.mark.parametrize("rung", GENERAL_RUNGS, ids=lambda rung: rung.__name__)
def test_what_needs_no_weights_equals_the_references(rung):
    assert failures(rung()) == ""


def test_unipc_schedules_are_held_to_equal_bits():
    unipc = [row for row in schedules() if row.what.startswith("UniPC, 5 lengths")]
    assert [(row.tolerance, row.max_abs) for row in unipc] == [(0, 0), (0, 0)]


@pytest.mark.parametrize("which", [0, 1], ids=["TI2V", "A14B"])
@pytest.mark.parametrize("rung", RELEASE_RUNGS, ids=lambda rung: rung.__name__)
def test_random_models_equal_the_references(rung, which, all_sides):
    assert failures(rung(all_sides[which])) == ""


@pytest.mark.parametrize(
    "rung", [text_encoder, transformer, autoencoder, pipeline], ids=lambda rung: rung.__name__
)
def test_bfloat16_is_no_further_from_float32_than_the_references(rung, all_sides):
    rows = rung(replace(all_sides[0], dtype=torch.bfloat16))
    assert failures(rows) == ""
    rounding = [row.relative_rms for row in rows if "encode: result" not in row.what]
    # bfloat16 was really at work, in what a network returns at least; encoding is float32.
    assert all(1e-5 < r < 0.5 for r in rounding)


class Damaged(parity_sides.Sides):
    """Sides whose own weights have one tensor changed."""

    tensor = ""

    def ours(self, part):
        module = super().ours(part)
        module.get_parameter(self.tensor).data.view(-1)[0] += 1.0
        return module


def damaged(sides, tensor):
    sides_class = type("Damaged", (Damaged,), {"tensor": tensor})
    return sides_class(**vars(sides))


@pytest.mark.parametrize(
    ("rung", "tensor", "named"),
    [
        (transformer, "blocks.1.ffn.down.weight", "blocks.1.ffn.down ("),
        (transformer, "blocks.2.cross_norm.weight", "blocks.2.cross_norm ("),
        (transformer, "blocks.1.modulation", "blocks.1.self_attention.query input"),
        (transformer, "patch_embedding.bias", "patch_embedding ("),
        (transformer, "head.modulation", "head.proj input"),
        (text_encoder, "blocks.1.attention.relative_bias.weight", "blocks.1.attention"),
        (autoencoder, "encoder.mid.attention.qkv.weight", "encoder.mid.attention.qkv ("),
        (autoencoder, "decoder.levels.1.upsample.time_conv.bias", "decoder.levels.1.upsample"),
    ],
)
def test_the_first_tensor_that_diverges_is_named(rung, tensor, named, all_sides):
    rows = rung(damaged(all_sides[0], tensor))
    notes = [row.note for row in rows if not row.passed and "first divergence" in row.note]
    assert notes
    assert notes[0].startswith(f"first divergence: {named}")
    assert not rows[-1].passed or rung is autoencoder  # damage to the encoder leaves decoding alone


def too_few_buckets(length, num_buckets, *more):
    """Far positions fall into the last bucket but one, from a distance of about 90 on."""
    buckets = relative_position_buckets(length, num_buckets, *more)
    half = num_buckets // 2
    return buckets - (buckets % half == half - 1).long()


@pytest.mark.parametrize(
    ("rung", "target", "wrong"),
    [
        (text_encoder, "wan.models.umt5.relative_position_buckets", too_few_buckets),
        (
            autoencoder,
            "wan.models.vae.WanVAE.latent_statistics",
            lambda vae, device: (torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)),
        ),
        (
            lambda sides: samplers(),
            "wan.sampling.samplers.few_step",
            lambda x, v, sigma, sigma_next, noise: few_step(x, v, sigma, 0.9 * sigma_next, noise),
        ),
    ],
    ids=["far positions", "latent statistics", "re-noising"],
)
def test_a_fault_of_our_own_is_seen(rung, target, wrong, all_sides, monkeypatch):
    monkeypatch.setattr(target, wrong)
    assert failures(rung(all_sides[0]))


def linked_release(folder, target, but):
    """A copy of a release whose files are the same ones, but for one part, which is copied."""
    for part in folder.iterdir():
        copy = shutil.copy if part.name == but else os.link
        if part.is_dir():
            shutil.copytree(part, target / part.name, copy_function=copy)
        else:
            copy(part, target / part.name)
    return target / but


def test_other_ids_are_counted(all_sides, tmp_path):
    path = linked_release(all_sides[0].folder, tmp_path, "tokenizer") / "tokenizer.json"
    values = json.loads(path.read_text())
    for piece in values["model"]["vocab"]:  # long pieces become unlikely in one of the two files
        piece[1] -= 50.0 if len(piece[0]) > 3 else 0.0
    path.write_text(json.dumps(values))
    rows = tokens(replace(all_sides[0], folder=tmp_path))
    # The reference reads tokenizer.json too, so our other back end is the one that differs.
    assert [row.passed for row in rows] == [True, True, False]
    assert rows[2].max_abs >= 1


def test_a_students_folder_is_run_like_a_base_models(all_sides, tmp_path):
    path = linked_release(all_sides[0].folder, tmp_path, "model_index.json")
    student = {"_class_name": "WanDMDPipeline", "timesteps": [1000, 757, 522]}
    path.write_text(json.dumps(json.loads(path.read_text()) | student))
    assert failures(pipeline(replace(all_sides[0], folder=tmp_path))) == ""


def test_distances():
    reference = torch.tensor([3.0, 4.0])
    assert distance(reference, reference) == (0.0, 0.0)
    assert distance(reference + torch.tensor([0.0, 0.5]), reference) == (0.5, 0.1)
    assert distance(reference, torch.zeros(3)) == (math.inf, math.inf)
    assert distance(torch.zeros(2), torch.zeros(2)) == (0.0, 0.0)


def test_nan_and_other_shapes_fail():
    nan = torch.tensor([1.0, math.nan])
    assert not compare("r", "w", nan, torch.ones(2), 1.0).passed
    assert not compare("r", "w", torch.ones(2), nan, 1.0).passed
    assert not compare_points("r", "w", [("a", nan, torch.ones(2))], 1.0).passed
    row = compare("r", "w", torch.ones(2), torch.ones(3), 1.0)
    assert not row.passed
    assert "shape (2,)" in row.note


def test_bfloat16_rule_is_a_factor_of_the_references_own_distance():
    truth = torch.ones(4)
    assert compare_to_truth("r", "w", truth + 1.1e-2, truth + 1e-2, truth).passed
    assert not compare_to_truth("r", "w", truth + 1.3e-2, truth + 1e-2, truth).passed


DIVERGED = Row("rung", "thing", 1.0, 1e-3, 2e-6, "first divergence: a.b (1e-3)")


@pytest.mark.parametrize(
    ("row", "end"),
    [
        (replace(DIVERGED, relative_rms=1e-7), None),
        (DIVERGED, "first failure: rung, thing: first divergence: a.b (1e-3)"),
        (replace(DIVERGED, note="loaded from a folder"), "first failure: rung, thing"),
    ],
)
def test_the_command_prints_the_table_and_fails_with_1(row, end, monkeypatch, capsys):
    monkeypatch.setattr(parity, "GENERAL_RUNGS", [lambda: [row]])
    monkeypatch.setattr(parity, "RELEASE_RUNGS", [])
    assert main(ParityConfig()) == (end is not None)
    out = capsys.readouterr().out.rstrip()
    assert (f"FAILED  {row.note}" in out) == (end is not None)
    assert f"{int(end is None)} of 1 rows ok" in out
    assert ("first failure" in out) == (end is not None)
    assert end is None or out.endswith(end)


def test_missing_references_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(parity_sides, "NEEDED", ("no_such_library",))
    with pytest.raises(WanError, match=r"no_such_library.*pip install -e \.\[parity\]"):
        main(ParityConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checkpoint=/no/such/folder"], "no such folder"),
        (["checkpoint=mini", "full_block=true"], "leave checkpoint= out"),
        (["dtype=float16"], "choose one of float32, bfloat16"),
        (["stepps=3"], "did you mean steps="),
    ],
)
def test_wrong_options_end_in_one_line_and_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["infer.parity", *arguments])
    with pytest.raises(SystemExit) as stop:
        run(lambda run: main(run.config), LINE, "")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line

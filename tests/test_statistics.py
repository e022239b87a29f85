"""Intervals cover what they should, pairing pays, and only what is shown is called a match."""

import math
from dataclasses import replace

import pytest
import torch

from wan.errors import WanError
from wan.miniature.metrics import kernel_distance, kernel_terms
from wan.miniature.statistics import (
    Clause,
    Estimate,
    Measured,
    difference,
    distance,
    estimate,
    floor_error,
    match,
    mean,
    ratio,
    resamples,
    verdict,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_rounds_draw_every_caption_equally_often_and_repeat():
    counts = resamples(50, 400)
    assert counts.shape == (400, 50)
    assert torch.equal(counts.sum(1), torch.full((400,), 50.0, dtype=torch.float64))
    assert torch.allclose(counts.mean(0), torch.ones(50, dtype=torch.float64), atol=0.25)
    assert torch.equal(counts, resamples(50, 400))


def test_the_interval_of_a_mean_is_the_textbook_one():
    values = normal(400) + 5
    half = 1.96 * float(values.std()) / 20
    result = mean(values)
    assert result.value == pytest.approx(float(values.mean()))
    assert result.high - result.value == pytest.approx(half, rel=0.1)
    assert result.value - result.low == pytest.approx(half, rel=0.1)


def test_missing_values_are_left_out_and_nothing_at_all_is_an_error():
    values = torch.tensor([1.0, math.nan, 3.0])
    assert mean(values).value == 2
    assert mean(values).low >= 1
    with pytest.raises(WanError, match="nothing to estimate"):
        mean(torch.full((3,), math.nan))


def test_pairing_removes_what_captions_have_in_common():
    hard = 10 * normal(200)
    one, other = hard + 0.1 * normal(200, seed=1), hard + 0.1 * normal(200, seed=2) - 0.5
    paired = difference(one, other)
    assert 0.45 < paired.low < paired.high < 0.55
    assert mean(one).high - mean(one).low > 2
    assert ratio(2 * hard + 100, hard + 50).high == pytest.approx(2)


def test_settings_with_fewer_captions_are_compared_on_those_that_both_have():
    values = normal(100)
    assert difference(values[:40], values) == difference(values[:40], values[:40])
    assert difference(values[:40], values).value == 0


def test_who_shows_nothing_on_hard_captions_is_not_measured_by_the_easy_ones():
    hard = torch.arange(200) >= 180
    ours = torch.full((200,), 0.9).where(~hard, math.nan)
    theirs = torch.full((200,), 0.8).where(~hard, 4.0)
    assert ratio(ours, theirs).value == pytest.approx(0.9 / 0.8)
    assert ratio(ours, theirs).low > 1.1
    assert difference(theirs, ours).high == pytest.approx(-0.1)


def test_the_floors_error_is_the_spread_of_the_distance_between_equals():
    drawn = [
        kernel_terms(normal(100, 6, seed=2 * i), normal(100, 6, seed=2 * i + 1)) for i in range(80)
    ]
    spread = torch.tensor([float(kernel_distance(terms)) for terms in drawn]).std()
    error = sum(map(floor_error, drawn)) / len(drawn)
    assert error == pytest.approx(float(spread), rel=0.3)


def test_the_distance_interval_excludes_zero_for_another_distribution_only():
    truth = normal(60, 4)
    same = distance(normal(60, 4, seed=1), truth)
    assert same.low < 0 < same.high
    assert distance(normal(60, 4, seed=1) + 0.7, truth).low > 0


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.01, 0.03, "holds"),
        (-0.03, 0.03, "open"),
        (-0.05, -0.03, "fails"),
        (-0.05, -0.02, "fails"),
    ],
)
def test_a_clause_holds_if_its_whole_interval_does(low, high, expected):
    assert Clause("", Estimate((low + high) / 2, low, high), above=-0.02).verdict == expected
    mirrored = Clause("", Estimate(-(low + high) / 2, -high, -low), below=0.02)
    assert mirrored.verdict == expected


def test_a_range_has_two_ends():
    def clause(low, high):
        return Clause("", Estimate((low + high) / 2, low, high), 0.95, 1.05)

    assert [clause(0.96, 1.04).verdict, clause(1.06, 1.1).verdict] == ["holds", "fails"]
    assert clause(0.9, 1.1).verdict == "open"
    assert verdict([clause(0.96, 1.04)]) == "match"
    assert verdict([clause(0.96, 1.04), clause(0.9, 1.1)]) == "open"
    assert verdict([clause(0.9, 1.1), clause(1.06, 1.1)]) == "no match"
    assert str(clause(0.9, 1.1)) == "open   : 1.000 (0.900 to 1.100), must be > 0.95 and < 1.05"


def good(num: int = 400) -> Measured:
    ones = torch.ones(num)
    joint = (torch.arange(num) % 10 > 0).float()
    values = {
        "joint": joint,
        "pair_joint": joint,
        "motion_ratio": ones + 0.05 * normal(num, seed=3),
        "saturation_ratio": ones + 0.02 * normal(num, seed=4),
        "residual": 0.5 * ones,
        "entropy": 0.8 * ones,
        "cells": 5 * ones,
    }
    return Measured(values, normal(num, 8, seed=5), normal(num, 8, seed=6))


def changed(base: Measured, **values: torch.Tensor) -> Measured:
    return replace(base, values={**base.values, **values})


def verdicts(student: Measured, baseline: Measured | None = None) -> dict[str, str]:
    clauses = match([student], good(), good(), baseline)
    return {clause.name: clause.verdict for clause in clauses}


def test_a_model_matches_itself():
    clauses = match([good()], good(), good())
    assert len(clauses) == 8
    assert verdict(clauses) == "match"


@pytest.mark.parametrize(
    ("name", "value", "clause"),
    [
        ("joint", torch.zeros(400), "joint, one object: difference"),
        ("pair_joint", torch.zeros(400), "joint, two objects: difference"),
        ("motion_ratio", torch.full((400,), 0.9), "motion ratio: ratio"),
        ("saturation_ratio", torch.full((400,), 1.1), "saturation: ratio"),
        ("entropy", torch.full((400,), 0.7), "entropy of what is unsaid: ratio"),
        ("cells", torch.full((400,), 4.0), "cells of the stage in use: ratio"),
        ("residual", torch.full((400,), 0.6), "temporal residual: ratio"),
    ],
)
def test_each_fault_fails_its_own_clause(name, value, clause):
    found = verdicts(changed(good(), **{name: value}))
    assert [key for key, one in found.items() if one != "holds"] == [clause]
    assert found[clause] == "fails"


def test_another_distribution_fails_its_clause():
    found = verdicts(replace(good(), features=good().features + 1))
    assert [key for key, one in found.items() if one == "fails"] == [
        "distance to the truth: difference"
    ]


def test_of_several_trainings_the_mean_of_each_caption_is_compared():
    trainings = [changed(good(), entropy=torch.full((400,), value)) for value in (0.7, 0.8, 0.96)]
    unlike = replace(good(), features=good().features + 1)
    found = {c.name: c for c in match(trainings, good(), good())}
    entropy = found["entropy of what is unsaid: ratio"]
    assert entropy.estimate.value == pytest.approx((0.7 + 0.8 + 0.96) / 3 / 0.8)
    assert entropy.verdict == "holds"  # although the first alone fails
    apart, mixed = (
        next(c for c in match(students, good(), good()) if "distance" in c.name).estimate.value
        for students in ([unlike], [good(), unlike])
    )
    assert mixed == pytest.approx(apart / 2)


def test_more_trainings_narrow_the_interval_and_gaps_are_no_numbers():
    def widths(count: int) -> float:
        students = [
            changed(good(), motion_ratio=1 + 0.3 * normal(400, seed=s)) for s in range(count)
        ]
        clauses = match(students, good(), good())
        span = next(c.estimate for c in clauses if c.name.startswith("motion"))
        return span.high - span.low

    assert widths(4) < 0.65 * widths(1)
    gap = torch.ones(400)
    gap[7] = math.nan
    whole, holed = changed(good(), residual=torch.ones(400)), changed(good(), residual=gap)
    clauses = match([whole, holed], changed(good(), residual=torch.ones(400)), good())
    residual = next(c for c in clauses if "residual" in c.name)
    assert residual.estimate.value == residual.estimate.low == 1


def test_a_student_must_beat_the_teacher_at_as_few_steps():
    name = "joint above the teacher at as few steps"
    assert verdicts(good(), good())[name] == "fails"
    assert verdicts(good(), changed(good(), joint=torch.zeros(400)))[name] == "holds"


def test_three_captions_show_no_share_even_if_the_clips_are_the_same():
    few = good(3)
    found = {clause.name: clause.verdict for clause in match([few], few, few)}
    assert [name for name, one in found.items() if one == "open"] == [
        "joint, one object: difference",
        "joint, two objects: difference",
    ]
    assert "fails" not in found.values()


def test_few_captions_leave_it_open():
    few = good(20)
    unlike = changed(few, joint=few.values["joint"].roll(1))
    assert verdict(match([unlike], few, few)) == "open"


def test_estimates_need_a_number():
    with pytest.raises(WanError, match="nothing to estimate"):
        estimate(math.nan, torch.ones(3))

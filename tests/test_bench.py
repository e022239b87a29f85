"""The benchmark: what it counts, and that every target runs."""

import json

import pytest
import torch

from configs.benchmark import COMPARED, STAGES, BenchConfig
from infer import bench, bench_load
from infer.bench_compare import prompt_of
from infer.bench_measure import (
    Contest,
    Outcome,
    Timing,
    peak_bytes,
    reset_resident_peak,
    run_contest,
    table,
)
from wan.errors import WanError

CPU = torch.device("cpu")


def timing(*seconds: float) -> Timing:
    return Timing(list(seconds), [2 * s for s in seconds], 10**6)


def test_a_row_says_median_middle_half_and_how_many_times_as_fast():
    outcome = Outcome(
        "dit", "small", {"ours": timing(1, 2, 9), "reference": timing(6, 6, 6)}, 4.0, 8e12, 1e-7
    )
    assert outcome.ratio("wall") == 3.0
    assert outcome.sides["ours"].median("cpu") == 4
    assert outcome.sides["ours"].spread("wall") == pytest.approx((5.5 - 1.5) / 2)
    header, ours, theirs = table([outcome], "wall").splitlines()
    assert ours.split()[:2] == ["dit:", "small"]
    assert [word in ours for word in ("3.00x", "4x", "1e-07")] == [True] * 3
    assert "TFLOP/s" in header
    assert theirs.split() == ["reference", "6", "0%", "1", "1.33"]
    json.dumps(outcome.as_json())


def test_sides_take_turns_after_warming_up_and_are_compared():
    calls = []

    def side(name: str, value: float):
        def run() -> torch.Tensor:
            calls.append(name)
            return torch.full((4,), value)

        return run

    contest = Contest("dit", "", {"ours": side("a", 3.0), "reference": side("b", 2.0)})
    outcome = run_contest(contest, repeats=4, warmup=1)
    assert outcome.difference == pytest.approx(0.5)
    assert "".join(calls[-8:]) == "abbaabba"
    assert [len(side.wall) for side in outcome.sides.values()] == [4, 4]


@pytest.mark.skipif(reset_resident_peak() is None, reason="this system tells no peak")
def test_peak_memory_is_what_a_call_takes_and_gives_back():
    size = 64 << 20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert size * 0.95 < peak < size * 1.3
    assert peak_bytes(lambda: torch.ones(4).sum(), CPU) < size / 8


def test_every_target_runs_against_the_references(tmp_path, capsys):
    targets = [target for target in COMPARED if target != "load"]
    bench.main(
        BenchConfig(
            targets,
            checkpoint="random",
            repeats=2,
            steps=2,
            prompt_tokens=9,
            block_heads=1,
            height=32,
            width=32,
            num_frames=5,
            output_dir=str(tmp_path),
        )
    )
    outcomes = json.loads((tmp_path / "bench.json").read_text())["outcomes"]
    assert list(dict.fromkeys(o["target"] for o in outcomes)) == targets
    for outcome in outcomes:
        limit = 2e-2 if "bfloat16" in outcome["what"] else 1e-4
        assert outcome["difference"] < limit, outcome
    assert "decode: 5x32x32, bfloat16" in capsys.readouterr().out


def test_loading_is_measured_in_processes_of_their_own(tmp_path):
    config = BenchConfig(["load"], load_gb=0.03, repeats=2)
    outcome = bench_load.contest(config, tmp_path, torch.float32)
    assert [len(side.wall) for side in outcome.sides.values()] == [2, 2, 2]
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) >= 4
    assert "GB of float32 to bfloat16" in outcome.what


def test_unchecked_loading_is_told_apart_by_a_damaged_value(tmp_path):
    bench_load.write_release(tmp_path / "transformer", 0.03, seed=0)
    path = min((tmp_path / "transformer").glob("*.safetensors"))
    with path.open("r+b") as file:  # the last value becomes NaN
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    assert bench_load.load_once(tmp_path, "unchecked")["wall"] > 0
    with pytest.raises(WanError, match="not finite"):
        bench_load.load_once(tmp_path, "ours")


@pytest.mark.parametrize("profile", [False, True])
def test_stages_of_a_tiny_model_run_alone(tmp_path, capsys, profile):
    bench.main(
        BenchConfig(
            stages="tiny", compile=False, repeats=2, profile=profile, output_dir=str(tmp_path)
        )
    )
    text = capsys.readouterr().out
    for stage in STAGES:
        assert f"{stage}: " in text
    assert "TFLOP need" in text
    profiles = [path.read_text() for path in sorted(tmp_path.glob("profile_*.txt"))]
    assert len(profiles) == (3 if profile else 0)
    assert all("aten::" in text for text in profiles)


def test_random_networks_have_the_dtypes_of_loaded_ones():
    size = bench.bench_stages.SIZES["tiny"]
    network = bench.bench_stages.random_network(
        lambda: bench.bench_stages.WanDiT(size.transformer), torch.bfloat16, CPU, 0
    )
    assert network.blocks[0].ffn.up.weight.dtype == torch.bfloat16
    assert network.blocks[0].modulation.dtype == torch.float32
    assert network.blocks[0].cross_attention.key_norm.weight.eq(1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["denoise"]}, "choose one of text, encode"),
        ({"targets": ["dit"], "stages": "tiny"}, "choose one of text, denoise"),
        ({"stages": "huge"}, "full, tiny"),
        ({"device": "mps"}, "runs on the cpu"),
        ({"repeats": 1}, "at least 2"),
        ({"clock": "sun"}, "wall, cpu"),
        ({"dtypes": ["float8"]}, "float32, bfloat16"),
        ({"load_gb": 0.0}, "above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(WanError, match=message):
        BenchConfig(**options)


def test_a_gpu_means_the_full_stages():
    assert BenchConfig(device="cuda").stages == "full"


def test_prompts_have_the_tokens_that_were_asked_for():
    class Words:
        def __call__(self, text: str, max_length: int):
            return type("Tokens", (), {"ids": [*text.split(), "</s>"][:max_length]})

    assert prompt_of(Words(), 4) == "a red a"

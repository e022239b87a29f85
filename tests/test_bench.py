"""The benchmark: what it counts, and that every target runs."""

import json
import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from configs.benchmark import COMPARED, STAGES, BenchConfig
from infer import machine as record
from infer.bench import against_diffusers as bench_compare
from infer.bench import loading as bench_load
from infer.bench import run as bench
from infer.bench import stages as bench_stages
from infer.bench.against_diffusers import prompt_of
from infer.bench.timing import (
    Contest,
    Outcome,
    Task,
    Timing,
    num_calls,
    peak_bytes,
    reset_resident_peak,
    run_contest,
    table,
)
from wan.errors import WanError
from wan.models.attention import AttentionConfig
from wan.models.dit_config import DiTConfig

CPU = torch.device("cpu")


def timing(*seconds: float) -> Timing:
    return Timing(list(seconds), [2 * s for s in seconds], 10**6)


def test_a_row_says_median_middle_half_and_how_many_times_as_fast():
    sides = {"ours": timing(1, 2, 9), "reference": timing(6, 6, 6)}
    outcome = Outcome(Task("dit", "small", goal=4.0, flops=8e12), sides, 1e-7)
    assert outcome.ratio("wall") == 3.0
    assert outcome.sides["ours"].median("cpu") == 4
    assert outcome.sides["ours"].spread("wall") == pytest.approx((5.5 - 1.5) / 2)
    header, ours, theirs = table([outcome], "wall", peak_tflops=16).splitlines()
    assert ours.split()[:2] == ["dit:", "small"]
    assert [word in ours for word in ("3.00x", "4x", "1e-07", "  0.5  ")] == [True] * 4
    assert "TFLOP/s" in header
    assert theirs.split() == ["reference", "6", "0%", "1", "+", "weights", "1.33"]
    json.dumps(outcome.as_json())


def test_every_missed_aim_is_named_and_no_other():
    slow = {"ours": timing(2, 2), "reference": timing(4, 4)}
    small = {**slow, "reference": replace(slow["reference"], peak_bytes=5 * 10**5)}
    task = Task("decode", "clip", goal=2.0, memory_goal=1.0, goal_seconds=2.0)
    met = Outcome(task, slow)
    assert met.misses("wall") == []
    assert list(met.aims("wall")) == ["2x", "2 s", "memory 1x"]
    for outcome, text in (
        (replace(met, task=replace(task, goal=3.0)), "2.00x of 3x"),
        (replace(met, task=replace(task, goal_seconds=1.9)), "2 s, the aim is 1.9 s"),
        (replace(met, sides=small), "peak memory 2.00x the reference's, the aim is 1x"),
        (replace(met, weights_bytes=8 * 10**5), "peak memory 1.25x the weights, the aim is 1x"),
        (replace(met, difference=0.2), "results differ by 2e-01 of their rms"),
        (replace(met, difference=math.nan), "results differ by nan of their rms"),
    ):
        assert outcome.misses("wall") == [f"decode, clip: {text}"]
        json.dumps(outcome.as_json(), allow_nan=False)
    assert "1 with weights" in table([replace(met, weights_bytes=1)], "wall")


def test_what_fails_later_loses_no_contest_that_is_done(tmp_path, monkeypatch):
    def contests(config):
        yield Outcome(Task("text", "prompt"), {"ours": timing(1, 1)})
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench, "compared", contests)
    with pytest.raises(RuntimeError, match="out of memory"):
        bench.bench(BenchConfig(output_dir=str(tmp_path)))
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [outcome["target"] for outcome in record["outcomes"]] == ["text"]


def test_sides_take_turns_after_warming_up_and_are_compared():
    calls = []

    def side(name: str, value: float):
        def run() -> torch.Tensor:
            calls.append(name)
            return torch.full((4,), value)

        return run

    sides = {"ours": side("a", 3.0), "reference": side("b", 2.0)}
    contest = Contest(Task("dit", ""), sides)
    outcome = run_contest(contest, repeats=4, warmup=1)
    assert outcome.difference == pytest.approx(0.5)
    assert "".join(calls[-8:]) == "abbaabba"
    assert all(side.first > 0 for side in outcome.sides.values())
    assert [len(side.wall) for side in outcome.sides.values()] == [4, 4]


def test_a_call_is_told_as_often_as_was_said_before():
    sides = {"ours": lambda: torch.zeros(2), "reference": lambda: torch.ones(2)}
    contest, calls = Contest(Task("dit", ""), sides), []
    run_contest(contest, repeats=3, warmup=2, called=lambda: calls.append(1))
    assert len(calls) == num_calls(contest, repeats=3, warmup=2)


def test_what_takes_too_long_is_left_out_with_a_line_and_the_others_go_on(
    tmp_path, monkeypatch, capsys
):
    def contests(config):
        for target, seconds in (("text", 0.2), ("dit", 0.0)):

            def run(seconds: float = seconds) -> torch.Tensor:
                time.sleep(seconds)
                return torch.ones(1)

            yield Contest(Task(target, "small"), {"ours": run, "reference": run})

    monkeypatch.setattr(bench, "compared", contests)
    bench.bench(BenchConfig(most_seconds=0.1, repeats=2, output_dir=str(tmp_path)))
    outcomes = json.loads((tmp_path / "bench.json").read_text())["outcomes"]
    assert [outcome["target"] for outcome in outcomes] == ["dit"]
    out, err = capsys.readouterr()
    assert "text: small: left out, one call of reference took 0.2 s; most_seconds=0.1" in err
    assert "a matrix product in float32 here" in out


def test_a_stage_that_was_left_out_leaves_out_the_sum_of_its_dtype_alone():
    def outcome(stage: str, dtype: str, seconds: float) -> Outcome:
        return Outcome(Task(stage, f"small, {dtype}"), {"eager": timing(seconds, seconds)})

    outcomes = [outcome(stage, "bfloat16", 1.0) for stage in STAGES]
    outcomes += [outcome(stage, "float32", 5.0) for stage in STAGES[1:]]
    config = BenchConfig(stages="tiny", dtypes=["float32", "bfloat16"])
    (total,) = bench_stages.end_to_end(outcomes, config, parity_checked=True)
    assert total.task.what.endswith("bfloat16")
    assert total.sides["eager"].median("wall") == len(STAGES)


@pytest.mark.skipif(reset_resident_peak() is None, reason="this system tells no peak")
def test_peak_memory_is_what_a_call_takes_and_gives_back():
    size = 64 << 20
    peak = peak_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert size * 0.95 < peak < size * 1.3
    assert peak_bytes(lambda: torch.ones(4).sum(), CPU) < size / 8


def test_every_target_runs_against_the_references(tmp_path, capsys):
    targets = [target for target in COMPARED if target != "load"]
    bench.bench(
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
    config = BenchConfig(["load"], load_gb=0.03, repeats=2, profile=True)
    outcome = bench_load.contest(config, tmp_path, torch.float32)
    assert [len(side.wall) for side in outcome.sides.values()] == [2, 2, 2]
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) >= 4
    assert "GB of float32 to bfloat16" in outcome.task.what
    written = json.loads((tmp_path / "transformer" / "config.json").read_text())
    network = bench_load.build_network(DiTConfig.from_json(written))
    assert outcome.weights_bytes == bench_load.num_bytes(network, torch.bfloat16)
    lines = list(bench.explain(outcome, config))
    assert lines[0].startswith("load: 0.0")
    assert any(line.startswith("  convert and place") for line in lines)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_phases_of_loading_are_those_that_happen(tmp_path, stored):
    bench_load.write_sharded(tmp_path, 0.03, seed=0, stored=stored)
    ours = bench_load.load_once(tmp_path, "ours", with_phases=True)["phases"]
    unchecked = bench_load.load_once(tmp_path, "unchecked", with_phases=True)["phases"]
    always = {"open headers", "match names", "build on meta", "map", "touch every page"}
    read = {"allocate", "read", "convert and place"} if stored == torch.float32 else set()
    assert set(ours) == always | read | {"check values"}
    assert set(unchecked) == always | read
    assert bench_load.load_once(tmp_path, "ours")["phases"] == {}


def test_unchecked_loading_is_told_apart_by_a_damaged_value(tmp_path):
    bench_load.write_sharded(tmp_path, 0.03, seed=0)
    path = min((tmp_path / "transformer").glob("*.safetensors"))
    with path.open("r+b") as file:  # the last value becomes NaN
        file.seek(-2, 2)
        file.write(b"\xff\xff")
    assert bench_load.load_once(tmp_path, "unchecked")["wall"] > 0
    with pytest.raises(WanError, match="not finite"):
        bench_load.load_once(tmp_path, "ours")


def test_stages_of_a_tiny_model_run_alone_and_are_profiled(tmp_path, capsys):
    bench.bench(
        BenchConfig(
            stages="tiny",
            compile=False,
            parity=False,
            repeats=2,
            profile=True,
            output_dir=str(tmp_path),
        )
    )
    text = capsys.readouterr().out
    for stage in (*STAGES, "end to end"):
        assert f"{stage}: " in text
    assert "TFLOP need" in text
    assert "missed" not in text
    profiles = [path.read_text() for path in sorted(tmp_path.glob("profile_*.txt"))]
    assert len(profiles) == 3
    assert all("aten::" in text for text in profiles)


def test_compiled_stages_are_added_up_and_a_missed_aim_is_named(tmp_path, capsys, monkeypatch):
    def absent(library: str):
        raise WanError("not installed")

    monkeypatch.setattr(bench, "reference", absent)
    bench.bench(
        BenchConfig(
            stages="tiny",
            compile_backend="eager",
            goal_seconds=1e-6,
            repeats=2,
            output_dir=str(tmp_path),
        )
    )
    text = capsys.readouterr().out
    assert "parity with diffusers: NOT CHECKED" in text.splitlines()[0]
    total = "text + denoise + decode, bfloat16, parity NOT CHECKED"
    assert f"end to end: {total}" in text
    assert f"missed: end to end, {total}: " in text
    assert "the aim is 1e-06 s" in text
    assert text.count("compiling took") == 4
    assert "denoise: attention sdpa, for which PyTorch takes FLASH_ATTENTION" in text
    *stages, sums = json.loads((tmp_path / "bench.json").read_text())["outcomes"]
    assert [stage["target"] for stage in stages] == list(STAGES)
    for side in ("compiled", "eager"):
        for number in ("wall_median", "cpu_median", "first"):
            parts = [stage["sides"][side][number] for stage in stages]
            assert sums["sides"][side][number] == pytest.approx(sum(parts))
    assert sums["flops"] == sum(stage["flops"] for stage in stages)
    for one in (*stages, sums):
        for side in one["sides"].values():
            rate = one["flops"] / side["wall_median"] / 1e12
            assert side["tflops_per_second"] == pytest.approx(rate)
    assert all(stage["difference"] < 2e-2 for stage in stages)
    assert all(s["sides"]["compiled"]["first"] > s["sides"]["eager"]["first"] for s in stages)


@pytest.mark.gpu
def test_stages_run_on_a_gpu_once_parity_is_checked(tmp_path, capsys):
    config = BenchConfig(stages="tiny", device="cuda", repeats=2, compile=False)
    bench.bench(replace(config, output_dir=str(tmp_path)))
    text = capsys.readouterr().out
    assert "parity with diffusers: 3 of 3 rows ok" in text
    assert torch.cuda.get_device_name() in text.splitlines()[-2]


def test_the_eager_side_leaves_compiled_what_blocks_call():
    ran = []

    def backend(name: str, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        def run(*arguments):
            ran.append(name)
            return graph(*arguments)

        return run

    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return flex(x) + 1

    @torch.compiler.disable  # so that the block's graph does not swallow it
    def flex(x: torch.Tensor) -> torch.Tensor:
        return kernel(x)

    kernel = torch.compile(lambda x: 2 * x, backend=partial(backend, "kernel"))
    block, x = Block(), torch.ones(2)
    block.compile(backend=partial(backend, "block"))
    assert block(x).tolist() == [3, 3]
    assert set(ran) == {"kernel", "block"}
    ran.clear()
    with bench_stages.uncompiled([block]):
        assert block(x).tolist() == [3, 3]
    assert ran == ["kernel"]
    block(x)
    assert "block" in ran


def test_flops_are_those_that_the_attention_computes():
    size, grid = bench_stages.SIZES["tiny"], (3, 2, 2)
    dense = bench_stages.WanDiT(size.transformer)
    spatial = bench_stages.WanDiT(size.transformer, "spatial")  # a frame of three
    work = bench_stages.velocity_work(dense, grid, size.text_length)
    assert work == bench_stages.network_work(size.transformer, 12, size.text_length).forward
    left_out = 2 / 3 * 4 * 12**2 * size.transformer.width * size.transformer.num_layers
    assert bench_stages.velocity_work(spatial, grid, size.text_length) == pytest.approx(
        work - left_out
    )


def test_an_illegal_size_is_refused_before_weights_are_drawn():
    with pytest.raises(WanError, match="height=33"):
        next(bench_stages.contests(BenchConfig(stages="full", height=33)))


# --- parity before timing -------------------------------------------------------------------------


def test_blocks_and_decoder_are_held_against_diffusers_in_bfloat16():
    rows = bench.check_parity(BenchConfig(stages="tiny", prompt_tokens=9))
    assert [row.rung for row in rows] == ["blocks", "blocks", "decode"]
    assert all(row.passed and row.relative_rms > 1e-3 for row in rows)
    text = bench.parity_text(rows, BenchConfig(stages="tiny"))
    assert "attention sdpa" in text
    assert text.endswith("3 of 3 rows ok")


def test_what_computes_something_else_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr("wan.models.vae.silu", torch.relu)
    monkeypatch.setattr(bench, "run_contest", lambda *_: pytest.fail("timed"))
    config = BenchConfig(stages="tiny", compile=False, output_dir=str(tmp_path))
    with pytest.raises(WanError, match=r"nothing is timed; first: decode, \(3, 4, 4\) latents"):
        bench.bench(config)


@pytest.mark.parametrize(
    ("attention", "held"),
    [("cudnn", "cudnn"), ("spatial", "flash"), ("sage", "flash"), ("math", "math")],
)
def test_parity_is_that_of_the_exact_kernel(attention, held):
    choice = AttentionConfig(attention, exact="flash")
    assert bench_compare.exact_name(BenchConfig(attention=choice)) == held


def test_a_kernel_that_is_wrong_on_both_sides_does_not_pass():
    truth = torch.ones(8)
    row = bench_compare.held("decode", "", truth * 1.1, truth * 0.5, truth)
    assert not row.passed


# --- what the numbers were taken on ---------------------------------------------------------------


def test_the_last_line_names_gpu_driver_and_libraries():
    about = {"packages": {"torch": "2.13"}, "processor": "CPU", "threads": 2}
    assert bench.machine(about) == "CPU, 2 threads, PyTorch 2.13"
    gpu = {"gpu": "H100", "driver": "550.54", "cuda": "12.8", "cudnn": None}
    assert bench.machine(about | gpu) == "H100, driver 550.54, CUDA 12.8, PyTorch 2.13"


def test_the_driver_is_read_from_its_own_file(tmp_path):
    file = tmp_path / "version"
    assert record.driver_version(file) is None
    kernel = (
        "NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version: 12.3"
    )
    file.write_text(f"NVRM version: {kernel}.0")
    assert record.driver_version(file) == "550.54.15"


def test_kernels_are_recorded_where_they_are_installed(monkeypatch):
    def version(package: str) -> str | None:
        return "3.1" if package in ("triton", "torch") else None

    monkeypatch.setattr(record, "package_version", version)
    packages = record.environment(CPU)["packages"]
    assert packages["triton"] == "3.1"
    assert "sageattention" not in packages


# --- settings -------------------------------------------------------------------------------------


def test_random_networks_have_the_dtypes_of_loaded_ones():
    size = bench_stages.SIZES["tiny"]
    network = bench_stages.random_network(
        lambda: bench_stages.WanDiT(size.transformer), torch.bfloat16, CPU, 0
    )
    assert network.blocks[0].ffn.up.weight.dtype == torch.bfloat16
    assert network.blocks[0].modulation.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["denoise"]}, "choose one of text, encode"),
        ({"targets": ["dit"], "stages": "tiny"}, "choose one of text, denoise"),
        ({"stages": "huge"}, "full, tiny"),
        ({"device": "mps"}, "cpu or cuda"),
        ({"device": "mps", "stages": "tiny"}, "cpu or cuda"),
        ({"repeats": 1}, "at least 2"),
        ({"clock": "sun"}, "wall, cpu"),
        ({"dtypes": ["float8"]}, "float32, bfloat16"),
        ({"load_gb": 0.0}, "above 0"),
        ({"goal_seconds": 0.0}, "above 0"),
        ({"compile_backend": "gcc"}, "inductor, aot_eager, eager"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(WanError, match=message):
        BenchConfig(**options)


def test_an_option_of_the_other_mode_is_refused():
    with pytest.raises(WanError, match=r"parity=False: nothing reads it here.*stages=full"):
        BenchConfig(parity=False).on("cpu")
    with pytest.raises(WanError, match=r"load_gb=3.0: nothing reads it here.*device=cpu"):
        BenchConfig(load_gb=3.0, stages="tiny").on("cpu")
    assert BenchConfig(parity=False).on("cuda").stages == "full"


def test_a_gpu_means_the_full_stages():
    assert BenchConfig(device="cuda").stages == "full"


def test_prompts_have_the_tokens_that_were_asked_for():
    class Words:
        def __call__(self, text: str, max_length: int):
            return type("Tokens", (), {"ids": [*text.split(), "</s>"][:max_length]})

    assert prompt_of(Words(), 4) == "a red a"


def test_auto_times_stages_on_a_gpu_and_beside_diffusers_on_a_cpu():
    assert BenchConfig().on("cpu").stages is None
    assert BenchConfig().on("cuda").stages == "full"
    assert BenchConfig(targets=["decode"]).on("cuda").stages == "full"
    assert BenchConfig(device="cpu", targets=["encode"]).on("cpu").chosen() == ("encode",)
    with pytest.raises(WanError, match=r"targets=encode: .* add device=cpu, or choose text"):
        BenchConfig(targets=["encode"]).on("cuda")
    with pytest.raises(WanError, match="device=mps: nothing else than cpu or cuda can be timed"):
        BenchConfig(device="mps")

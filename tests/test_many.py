"""One video by two and by four processes is the video of one; and none is left waiting."""

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from test_costs import SMALL_VAES
from test_parallel import free_ports
from test_pipeline import DIT, build, random_weights, write_models

import infer.sample.generate  # noqa: F401 - for the processes that are forked from this file
from configs.cli import execute
from configs.compose import compose_runs
from infer.processes import Processes
from infer.sample.__main__ import LINE, SampleCommand
from infer.sharing import makes_together
from wan.errors import WanError
from wan.files import read_sealed
from wan.media.video import read_video
from wan.models.dit import WanDiT
from wan.models.vae import WanVAE
from wan.pipeline.pipeline import WanDMDPipeline, WanPipeline
from wan.runtime.parallel import RowSplit, check_heads
from wan.weights.hub import TEACHER

# Six rows of latents: four processes have 1, 2, 1 and 2 of them. 3 x 3 x 4 tokens, four heads.
SIZE = {"height": 24, "width": 32, "num_frames": 9}
FOUR_HEADS = replace(DIT, num_attention_heads=4, attention_head_dim=6)
EQUAL = 1e-5  # relative; sums are rounded in another order
IMAGE = torch.linspace(0, 1, 3 * 24 * 32).reshape(3, 24, 32)


def pipeline(root: Path, name: str = "base") -> WanPipeline:
    """A tiny model whose transformers have four heads; or the shipped one, which has six."""
    if name == "miniature":
        return WanPipeline.from_pretrained(TEACHER, dtype=torch.float32)
    kind = WanDMDPipeline if name == "student" else WanPipeline
    settings = {"timesteps": (1000, 757, 522)} if name == "student" else {"expand_timesteps": True}
    pipe = build(root / "tokenizer", kind, two_experts=name == "experts", **settings)
    for number, part in enumerate(pipe.networks()):
        setattr(pipe, part, random_weights(WanDiT(FOUR_HEADS), 2 + number))
    pipe.chunk_latents = 1
    return pipe


# Question -> model, the pipeline's call, and arguments of `enable_parallelism`.
CALLS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "guided": ("base", {"guidance_scale": 4.0}, {}),
    "guided, no halves": ("base", {"guidance_scale": 4.0}, {"guidance": False}),
    "unguided": ("base", {"guidance_scale": 1.0, "sampler": "euler"}, {}),
    "image": ("base", {"guidance_scale": 3.0, "image": IMAGE}, {}),
    "one expert guided": ("experts", {"guidance_scale": 3.0, "guidance_scale_2": 1.0}, {}),
    "few steps": ("student", {}, {}),
    "sharded": ("experts", {"guidance_scale": 3.0}, {"weights": "sharded"}),
    "sharded, bfloat16": ("base", {"guidance_scale": 3.0}, {"weights": "sharded"}),
    "offload": ("base", {"guidance_scale": 3.0}, {}),
    # Four rows of latents.
    "miniature": ("miniature", {"height": 64, "guidance_scale": 4.0, "num_inference_steps": 2}, {}),
}
# What four processes are not asked.
BY_TWO = ("guided, no halves", "one expert guided", "sharded", "sharded, bfloat16", "offload")


def prepared(root: Path, question: str) -> tuple[WanPipeline, dict[str, Any]]:
    name, call, _ = CALLS[question]
    pipe = pipeline(root, name)
    if "bfloat16" in question:
        pipe.to(torch.bfloat16)
    if question == "offload":
        pipe.set_offload("block")
    return pipe, {"prompt": "a red circle", "seed": 3, **SIZE, **call}


def made(pipe: WanPipeline, **call: Any) -> dict[str, torch.Tensor]:
    latents = pipe(**call, output_type="latent").frames
    return {"latents": latents, "pixels": pipe.decode_latents(latents)}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def decoded(generation: str, rows: int, chunk: int | None, group: Any = None) -> torch.Tensor:
    """Frames of random latents that are so many rows high; by all processes of a group."""
    vae = random_weights(WanVAE(SMALL_VAES[generation]), 1)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, vae.config.z_dim, 4, rows, 3, generator=generator)
    split = None if group is None else RowSplit(group, rows)
    with torch.no_grad():
        return torch.cat(list(vae.decode_stream(latents, chunk, split)), dim=2)


DECODINGS = [(g, rows, chunk) for g in SMALL_VAES for rows, chunk in ((7, 1), (5, None))]


# --- what runs in several processes ---------------------------------------------------------------


def refusal(work: Callable[[], Any]) -> str:
    try:
        work()
    except (WanError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def calls_of_all(root: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for question, (_, _, options) in CALLS.items():
        if question in BY_TWO and dist.get_world_size() > 2:
            continue
        pipe, call = prepared(root, question)
        if dist.get_rank() > 0:
            pipe.text_encoder = pipe.tokenizer = None
            call["seed"] = 99  # the main process's counts
        pipe.enable_parallelism(**options)
        results[question] = made(pipe, **call)
    for case in DECODINGS:
        results[str(case)] = decoded(*case, group=dist.group.WORLD)
    return results


def double(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
    """A callback that does something in the main process only."""
    is_main = pipe.parallel is None or pipe.parallel.is_main
    return {"latents": 2 * tensors["latents"]} if is_main else {}


def endings(root: Path) -> dict[str, Any]:
    """One process stops, errs or differs: what each of them sees of it, all in one pipeline."""
    pipe, call = prepared(root, "guided")
    pipe.enable_parallelism()
    last = dist.get_rank() == dist.get_world_size() - 1

    def stop(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._interrupt = last and step == 0
        return tensors

    def fail(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        if last and step == 1:
            raise WanError("the callback's own")
        return tensors

    def guide(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        pipe._guidance_scale = 2.0 if last else 3.0
        return tensors

    results = {
        "stopped": made(pipe, **call, callback_on_step_end=stop),
        "doubled": made(pipe, **call, callback_on_step_end=double),
        "failed": refusal(lambda: pipe(**call, callback_on_step_end=fail)),
        "guidance": refusal(lambda: pipe(**call, callback_on_step_end=guide)),
        "other call": refusal(lambda: pipe(**call, num_inference_steps=2 + last)),
    }
    pipe.tile = 4
    results["tiles"] = refusal(lambda: pipe(**call))
    pipe.tile = None
    results["afterwards"] = made(pipe, **call)
    if last:
        with torch.no_grad():
            pipe.transformer.head.proj.bias.fill_(torch.nan)
    results["nan"] = refusal(lambda: pipe(**call))
    return results


def desertion(root: Path) -> dict[str, Any]:
    """The last process errs in the midst of a step, and ends."""
    pipe, call = prepared(root, "guided")
    pipe.enable_parallelism()
    if dist.get_rank() > 0:
        pipe.transformer.head.register_forward_pre_hook(lambda *_: 1 / 0)
        with suppress(ZeroDivisionError):
            pipe(**call)
        refused = refusal(lambda: pipe(**call))
        os._exit(0 if "out of step" in refused else 1)
    return {"deserted": refusal(lambda: pipe(**call))}


def commands(root: Path, size: int) -> list[int]:
    """infer.sample in each process: a video by all, a list of jobs, and the list again."""
    command = SampleCommand()
    options = [f"checkpoint={root / 'base'}", "guidance_scale=3", "skip_done=true"]

    def sample(folder: str, *more: str) -> int:
        return execute(command, LINE, "", [*options, f"output_dir={root / folder}", *more])

    jobs = [f"prompt_file={root / 'prompts.txt'}", "num_videos=2"]
    return [
        sample(f"video by {size}", "prompt=a red circle", "height=24"),
        sample(f"jobs by {size}", *jobs),
        sample(f"jobs by {size}", *jobs),
    ]


def run(rank: int, root: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    for port, size in zip(ports, (4, 2), strict=True):
        if rank >= size:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        codes = commands(root, size) if size == 4 else []
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        results = {"codes": codes, **calls_of_all(root), **endings(root)}
        if size == 2:
            results |= desertion(root)
            torch.save(results, root / f"results of {rank} in {size}")
            return
        torch.save(results, root / f"results of {rank} in {size}")
        dist.destroy_process_group()


# --- and what it is compared with -----------------------------------------------------------------

PROMPTS = 'a red circle\n{"prompt": "a blue star", "seed": 5}\na red circle\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The folder of everything that four processes, then two of them, have made."""
    root = tmp_path_factory.mktemp("many")
    write_models(root)
    (root / "prompts.txt").write_text(PROMPTS)
    with pytest.MonkeyPatch.context() as patch:  # one process imports this file for all four
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        mp.get_context("forkserver").set_forkserver_preload([__name__])
        arguments = {"nprocs": 4, "start_method": "forkserver", "join": False}
        processes = mp.start_processes(run, (root, free_ports(2)), **arguments)
    assert commands(root, 1) == [0, 0, 0]
    while not processes.join():
        pass
    return root


@pytest.fixture(scope="module")
def seen(root) -> dict[int, list[dict[str, Any]]]:
    """Number of processes -> the results of each; of two, the second one has deserted."""
    ranks = {4: range(4), 2: range(1)}
    return {
        size: [torch.load(root / f"results of {r} in {size}", weights_only=False) for r in ranks]
        for size, ranks in ranks.items()
    }


def assert_same(seen: list[dict[str, Any]], question: str, one: Any, equal: float = EQUAL) -> None:
    """All processes have the same bits, and those of one process up to rounding."""
    for name, value in one.items():
        for other in seen[1:]:
            assert torch.equal(other[question][name], seen[0][question][name]), name
        assert distance(seen[0][question][name], value) < equal, name


@pytest.mark.parametrize("question", CALLS)
def test_a_call_gives_every_process_the_video_of_one(root, seen, question):
    pipe, call = prepared(root, question)
    one = made(pipe, **call)
    for size in (2,) if question in BY_TWO else (2, 4):
        assert_same(seen[size], question, one, 2e-2 if "bfloat16" in question else EQUAL)


@pytest.mark.parametrize("case", DECODINGS, ids=str)
def test_rows_are_decoded_as_in_whole_frames(seen, case):
    one = decoded(*case)
    for results in seen.values():
        for result in results:
            assert distance(result[str(case)], one) < EQUAL


def test_what_a_callback_does_in_one_process_is_done_in_all(root, seen):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 0
        return tensors

    pipe, call = prepared(root, "guided")
    for name, callback in (("stopped", stop), ("doubled", double), ("afterwards", None)):
        one = made(pipe, **call, callback_on_step_end=callback)
        for results in seen.values():
            assert_same(results, name, one)


def test_an_error_in_one_process_is_one_in_all(seen):
    for size, results in seen.items():
        own, others = results[-1], results[:-1] if size == 4 else results
        if size == 4:
            assert own["failed"] == "WanError: the callback's own"
        for other in others:
            assert other["failed"] == f"WanError: process {size - 1}: the callback's own"
        for result in results:
            assert "guidance, after step 1: process 0 has" in result["guidance"]
            assert "all processes must do the same" in result["other call"]
            assert "leave tiling off" in result["tiles"]
            assert "not finite after step 1 of 3" in result["nan"]


def test_a_process_that_has_ended_leaves_none_waiting(seen):
    (main,) = seen[2]
    assert "another process has ended" in main["deserted"]


# --- infer.sample ---------------------------------------------------------------------------------


def made_by(folder: Path) -> dict[str, Path]:
    """The finished videos of a folder: what their names say but for the number -> record."""
    records = sorted(folder.glob("*.json"))
    assert all(read_sealed(record)["status"] == "done" for record in records)
    assert len({record.name for record in records}) == len(list(folder.glob("*.mp4")))
    found: dict[str, Path] = {}
    for record in records:
        name = record.stem.partition("_")[2]
        found[name if name not in found else f"{name}, again"] = record
    return found


@pytest.mark.parametrize(("folder", "count"), [("video", 1), ("jobs", 6)])
def test_the_command_makes_the_same_files_once(root, seen, folder, count):
    assert all(result["codes"] == [0, 0, 0] for result in seen[4])
    one, many = made_by(root / f"{folder} by 1"), made_by(root / f"{folder} by 4")
    assert one.keys() == many.keys()
    assert len(one) == count
    for name, record in one.items():
        a, b = (load_file(r.with_suffix(".latents.safetensors")) for r in (record, many[name]))
        assert distance(b["latents"], a["latents"]) < EQUAL
        first, second = (
            read_video(r.with_suffix(".mp4"))[0].astype(int) for r in (record, many[name])
        )
        assert abs(first - second).max() <= 8  # a compressed file tells a rounding more
        processes = read_sealed(many[name])["environment"].get("processes")
        assert processes == (4 if folder == "video" else None)


def settings(*tokens: str):
    (point,) = compose_runs(LINE, [*tokens, "prompt=a"])
    return point.config, point.sources


@pytest.mark.parametrize(
    ("tokens", "size", "together"),
    [((), 1, False), ((), 4, True), (("num_videos=2",), 4, False)]
    + [(("num_videos=2", "parallel.mode=video"), 4, True), (("parallel.mode=jobs",), 4, False)],
)
def test_one_video_is_made_by_all_and_several_by_one_each(tokens, size, together):
    config, sources = settings(*tokens)
    assert makes_together(config, sources, config.num_videos, Processes(0, size)) is together


@pytest.mark.parametrize(
    ("tokens", "size", "why"),
    [
        (("parallel.weights=sharded",), 1, "sharded has no effect: this is one process"),
        (("parallel.guidance=false", "num_videos=2"), 2, "each process makes videos of its own"),
    ],
)
def test_options_without_effect_are_said(tokens, size, why):
    config, sources = settings(*tokens)
    with pytest.warns(UserWarning, match=why):
        makes_together(config, sources, config.num_videos, Processes(0, size))


def test_videos_whose_seeds_are_drawn_are_never_done_already():
    with pytest.raises(WanError, match="skip_done=true with seed=-1: each run draws other seeds"):
        settings("skip_done=true", "seed=-1")


def test_heads_that_cannot_be_shared_out_are_refused():
    check_heads(24, 16, halved=True)
    with pytest.raises(WanError, match=r"24 heads cannot be shared out over 5 .* 1, 2, 3, 4, 6, 8"):
        check_heads(24, 5, halved=False)


def test_parallelism_needs_a_process_group(root):
    with pytest.raises(WanError, match="init_process_group first"):
        pipeline(root).enable_parallelism()

"""One run of `infer.sample` decides everything once, and the path to the kernel is short."""

import re
import sys
from pathlib import Path

import pytest
import torch
from test_pipeline import build, write_tokenizer

import infer.sample.request
import wan.files
import wan.models.tokenizer
import wan.pipeline.config
import wan.pipeline.known_models
import wan.pipeline.model_index
from configs.cli import execute
from infer.sample.__main__ import LINE, SampleCommand
from wan.models.attention import NetworkAttention
from wan.pipeline.pipeline import WanDMDPipeline
from wan.weights.hub import STUDENT, TEACHER

ROOT = Path(__file__).parents[1]
OPENED: list[str] | None = None  # files that Python opens, while a test looks


def _note_opened(event: str, arguments: tuple) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


sys.addaudithook(_note_opened)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder / "tokenizer")
    student = build(folder / "tokenizer", WanDMDPipeline, timesteps=(1000, 757, 522))
    student.save_pretrained(folder / "student")
    return folder / "student"


@pytest.fixture
def sample(model, tmp_path):
    def run(*tokens: str) -> int:
        given = [f"checkpoint={model}", f"output_dir={tmp_path}", "hash_weights=false"]
        return execute(SampleCommand(), LINE, "", [*given, "prompt=a red circle", *tokens])

    return run


@pytest.fixture
def counts(monkeypatch):
    """Calls by name, of what must happen once."""
    calls: dict[str, int] = {}

    def count(owner, name: str, label: str) -> None:
        original = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[label] = calls.get(label, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(NetworkAttention, "__init__", "attention choices built")
    count(NetworkAttention, "verify", "verifications")
    count(infer.sample.request, "plan_sampling", "plans")
    return calls


@pytest.mark.parametrize("attention", ["sdpa", "spatial"])
def test_a_run_builds_verifies_plans_and_reads_once(sample, counts, model, attention):
    global OPENED
    OPENED = []
    try:
        assert sample(f"attention={attention}") == 0
        opened = [path for path in OPENED if path.endswith(".json") and str(model) in path]
    finally:
        OPENED = None
    assert counts == {"attention choices built": 1, "verifications": 1, "plans": 1}
    assert len(opened) >= 6  # the index, the scheduler's, three parts', the tokenizer's
    assert sorted(opened) == sorted(set(opened))


def frames_to_the_kernel(sample, monkeypatch) -> list[tuple[str, str]]:
    """(function, file) of our own frames between the command and the first self-attention."""
    kernel = torch.nn.functional.scaled_dot_product_attention
    stacks = []

    def watched(*args, **kwargs):
        frame, stack = sys._getframe(1), []
        while frame is not None:
            stack.append((frame.f_code.co_qualname, frame.f_code.co_filename))
            frame = frame.f_back
        if any(name == "PipelineStages.denoise" for name, _ in stack):
            stacks.append(stack[::-1])
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    assert sample() == 0
    ours = [
        (name, Path(file).relative_to(ROOT))
        for name, file in stacks[0]
        if Path(file).is_relative_to(ROOT)
    ]
    ours = [(name, file.as_posix()) for name, file in ours if file.parts[0] != "tests"]
    return [frame for frame in ours if "<listcomp>" not in frame[0]]  # no frame from 3.12 on


def test_the_path_from_the_command_to_the_kernel_is_the_one_that_is_documented(sample, monkeypatch):
    page = (ROOT / "wan/README.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| \d+ \| `([\w.]+)` \| `([\w./]+)` \|", page, re.MULTILINE)
    assert len(documented) <= 17
    assert documented[:2] == [("main", "infer/sample/__main__.py"), ("run", "configs/cli.py")]
    # The test calls `execute` itself, as `run` does.
    assert frames_to_the_kernel(sample, monkeypatch) == documented[2:]


def test_a_model_with_shared_parts_is_read_once_too(tmp_path, counts):
    """The record hashes every file as well, which reads it a second time without parsing it."""
    read: list[Path] = []
    read_bytes = wan.files.read_bytes

    def noting(path, limit):
        read.append(path.resolve())
        return read_bytes(path, limit)

    with pytest.MonkeyPatch.context() as patch:
        for module in (wan.files, wan.models.tokenizer):  # also inside read_json
            patch.setattr(module, "read_bytes", noting)
        tokens = ["model=mini-teacher", "steps=1", "prompt=a star", f"output_dir={tmp_path}"]
        assert execute(SampleCommand(), LINE, "", tokens) == 0
    assert {path.parent for path in read} >= {TEACHER, STUDENT / "vae", STUDENT / "tokenizer"}
    settings = [path for path in read if path.is_relative_to(ROOT) and path.suffix == ".json"]
    assert len(settings) == len(set(settings)) >= 8
    assert counts["plans"] == counts["verifications"] == 1

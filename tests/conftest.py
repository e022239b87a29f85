"""Shared by all tests: one CPU thread; no GPU tests without a GPU, nor pages without a browser."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from browser import chromium, missing

from configs.progress import STATUS

# The models are tiny: threads would wait for each other longer than they compute.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fuzz-cases", type=int, default=2000, help="damaged files that tests/fuzz.py makes"
    )
    parser.addoption(
        "--full-width", action="store_true", help="run the released recipes at one full block"
    )


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Each test of a GPU path runs on the CPU too, which proves what it says.

    Convolutions of a GPU are in float32 like the CPU's, and not in TF32.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests are remembered for as long as the tests run, and not in the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def nothing_left_going_on() -> Iterator[None]:
    """What has ended, however it ended, is told of no longer."""
    yield
    left, STATUS._activities = STATUS._activities, []
    assert not [activity.text(0) for activity in left]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lacking = {"gpu": "" if torch.cuda.is_available() else "no CUDA device", "browser": missing()}
    for item in items:
        for mark, reason in lacking.items():
            if reason and mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium (selenium's driver), one for the marked tests of a file.

    Not of all files: its last page would go on playing beside the tests that follow.
    """
    with chromium(tmp_path_factory.mktemp("browser")) as driver:
        yield driver

"""The notebooks run from top to bottom on a CPU, draw, and are committed without outputs."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = [path.name for path in NOTEBOOKS]
CPU_SECONDS = 120  # half of it on an idle machine; shared ones vary by a factor of two

# Cells one after the other in one namespace, as a kernel runs them; figures stay open.
RUNNER = """
import json, sys, warnings
from pathlib import Path

warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
name, namespace = sys.argv[1], {"__name__": "__main__"}
for number, cell in enumerate(json.loads(Path(name).read_text(encoding="utf-8"))["cells"]):
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), namespace)

from matplotlib import pyplot
for number in pyplot.get_fignums():
    figure = pyplot.figure(number)
    figure.canvas.draw()
    print("figure", sum(panel.has_data() for panel in figure.axes))
"""


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def test_there_are_four():
    assert [name[:3] for name in NAMES] == ["01_", "02_", "03_", "04_"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_is_a_notebook_without_outputs(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        required = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert cell.keys() == required | {"outputs", "execution_count"}
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        else:
            assert cell["cell_type"] == "markdown"
            assert cell.keys() == required


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_is_short_and_imports_the_library(path):
    sources = ["".join(cell["source"]) for cell in code_cells(path)]
    lines = [line for source in sources for line in source.splitlines() if line.strip()]
    assert len(lines) <= 150
    assert len(read(path)["cells"]) <= 18
    assert any(line.startswith(("from wan.", "from train.")) for line in lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)
def test_runs_and_draws(path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, path.name],
        cwd=FOLDER,
        env=os.environ | {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    panels = [int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("figure")]
    assert len(panels) >= 3
    assert min(panels) >= 1
    assert after.ru_utime - before.ru_utime < CPU_SECONDS

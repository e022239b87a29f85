import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ("wan", "configs", "infer", "train")
FILES = [path for package in PROJECT for path in sorted((ROOT / package).rglob("*.py"))]

# package -> what of the project it may import
MAY_IMPORT = {
    "wan": ("wan",),
    "configs": ("configs", "wan"),
    "infer": ("infer", "configs", "wan"),
    "train": PROJECT,
}

# module -> what of `wan` it may import: the network knows no sampler, the samplers no network
LAYERS = {
    "wan/rope.py": {"wan.errors"},
    "wan/attention/exact.py": {"wan.errors"},
    "wan/attention/backends.py": {"wan.errors"},
    "wan/attention/pattern.py": {"wan.attention.exact"},
    "wan/attention_config.py": {"wan.errors"},
    "wan/flow.py": {"wan.errors"},
    "wan/schedule.py": {"wan.errors", "wan.flow"},
    "wan/samplers.py": {"wan.errors", "wan.flow", "wan.schedule", "wan.noise"},
    "wan/dit.py": {
        "wan.errors",
        "wan.rope",
        "wan.attention",
        "wan.dit_config",
        "wan.recompute",
    },
    "wan/dit_config.py": {"wan.errors", "wan.rope"},
}


def imported_modules(path):
    """Dotted names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_packages_import_downwards_only(path):
    allowed = MAY_IMPORT[path.relative_to(ROOT).parts[0]]
    tops = {name.split(".")[0] for name in imported_modules(path)}
    assert tops.intersection(PROJECT) <= set(allowed)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_model_import_downwards_only(name):
    ours = {n for n in imported_modules(ROOT / name) if n.split(".")[0] == "wan"}
    assert ours <= LAYERS[name]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_parity_imports_the_oracles_and_only_commands_import_hydra(path):
    tops = {name.split(".")[0] for name in imported_modules(path)}
    relative = path.relative_to(ROOT)
    if not relative.name.startswith("parity"):
        assert not tops & {"diffusers", "transformers"}
    if relative.parts[0] == "wan":
        assert not tops & {"hydra", "omegaconf"}


def test_importing_the_library_touches_no_oracle_hydra_or_gpu():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.relative_to(ROOT).parts[0] == "wan"
    ]
    script = (
        "import importlib, os, sys; before = dict(os.environ)\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
        "assert dict(os.environ) == before, 'environment changed'\n"
        "loaded = {'diffusers', 'transformers', 'hydra', 'omegaconf'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert result.returncode == 0, result.stderr

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = ("wan", "configs", "infer", "train")
FILES = [path for package in PROJECT for path in sorted((ROOT / package).rglob("*.py"))]

# Room -> the other rooms that it may import; the modules of `OPEN` are open to all.
MAY_IMPORT = {
    "wan.errors": (),
    "wan.files": (),
    "wan.paths": (),
    "wan.precision": (),
    "wan.settings": (),
    "wan.models": (),
    "wan.sampling": (),
    "wan.weights": (),
    "wan.media": (),
    "wan.miniature": (),  # the world of shapes knows nothing of networks
    "wan.lora": ("wan.weights",),
    "wan.runtime": ("wan.models",),
    "wan.pipeline": (
        *("wan.models", "wan.sampling", "wan.weights", "wan.media", "wan.lora", "wan.runtime"),
    ),
    "configs": ("wan.models.attention_config", "wan.models.vae_config"),  # none loads PyTorch
    "infer": ("wan", "configs"),
    "train": ("wan", "configs"),
}
OPEN = ("wan.errors", "wan.files", "wan.paths", "wan.precision", "wan.settings")

# The network knows no sampler and the samplers no network; inside the rooms this is the order.
LAYERS = {
    "wan/models/rope.py": set(),
    "wan/models/attention/exact.py": set(),
    "wan/models/attention/kernels.py": set(),
    "wan/models/attention/pattern.py": {"wan.models.attention.exact"},
    "wan/models/attention_config.py": set(),
    "wan/models/dit_config.py": {"wan.models.rope"},
    "wan/models/dit.py": {
        "wan.models.rope",
        "wan.models.attention",
        "wan.models.dit_config",
        "wan.models.recompute",
    },
    "wan/models/recompute.py": set(),
    "wan/sampling/flow.py": set(),
    "wan/sampling/noise.py": set(),
    "wan/sampling/denoiser.py": set(),
    "wan/sampling/schedule.py": {"wan.sampling.flow"},
    "wan/sampling/samplers.py": {
        "wan.sampling.flow",
        "wan.sampling.schedule",
        "wan.sampling.noise",
    },
}


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module):
    """The entry of MAY_IMPORT that a module belongs to; None for the front page `wan` itself."""
    rooms = [room for room in MAY_IMPORT if module == room or module.startswith(room + ".")]
    return rooms[0] if rooms else None


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


def ours(path):
    return {name for name in imported_modules(path) if name.split(".")[0] in PROJECT}


def test_every_file_is_in_a_room():
    rooms = {module_name(path): room_of(module_name(path)) for path in FILES}
    assert [module for module, room in rooms.items() if room is None] == ["wan"]
    assert set(rooms.values()) - {None} == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_a_room_imports_only_what_it_may(path):
    room = room_of(module_name(path))
    if room is None:  # wan/__init__.py is the front page: it names what the rooms define
        return
    allowed = (room, *MAY_IMPORT[room], *OPEN)
    for name in ours(path):
        assert any(name == a or name.startswith(a + ".") for a in allowed), name


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_the_model_import_downwards_only(name):
    assert ours(ROOT / name) - set(OPEN) <= LAYERS[name]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_what_compares_or_measures_imports_the_oracles_and_only_commands_import_hydra(path):
    tops = {name.split(".")[0] for name in imported_modules(path)}
    if not module_name(path).startswith(("infer.parity.", "infer.bench.", "infer.measure.")):
        assert not tops & {"diffusers", "transformers"}
    if path.relative_to(ROOT).parts[0] == "wan":
        assert not tops & {"hydra", "omegaconf"}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_command_imports_another(path):
    commands = {name for name in imported_modules(path) if name.endswith(".__main__")}
    assert not commands


def test_reading_settings_loads_no_pytorch():
    script = "import configs.cli, configs.schema, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_importing_the_library_touches_no_oracle_hydra_or_gpu():
    modules = [module_name(path) for path in FILES if path.relative_to(ROOT).parts[0] == "wan"]
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

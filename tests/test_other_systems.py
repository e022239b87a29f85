"""Windows and macOS, as far as Linux can stand in for them: what they lack is taken away."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wan.runtime import memory_meter
from wan.runtime.memory_meter import ProcessMemory, SystemMemory, available_on_macos

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
# Windows has none of these; `msvcrt` and `kernel32` stand for its own.
STAND_IN = """
import ctypes, importlib, json, os, subprocess, sys, types  # subprocess: it looks for msvcrt too
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("sysconf", "getuid", "geteuid", "fork", "O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW",
             "O_DIRECTORY", "getloadavg", "sched_getaffinity", "statvfs", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)
locked = []
def locking(number, mode, size):
    if number in locked:
        raise OSError("locked")
    locked.append(number)
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
"""
IMPORT_ALL = """
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
FILES = """
from pathlib import Path
from wan.files import folder_beside, read_sealed, write_json, write_sealed, create_sealed
from train.tensor_cache import only_writer
os.chdir(sys.argv[1])
write_sealed(Path("a.json"), {"a": "ä"})
write_sealed(Path("a.json"), {"a": "ö"})
assert read_sealed(Path("a.json")) == {"a": "ö"}
create_sealed(Path("b.json"), {"b": 1})
with folder_beside(Path("c")) as folder:
    (folder / "x").touch()
    folder.rename("c")
with only_writer(Path(".")):
    assert locked
print(json.dumps(sorted(os.listdir("."))))
"""


# gradio, which this file imports, knows other systems by their real names and not by stand-ins.
OF_GRADIO = "infer.app.page"


def modules() -> list[str]:
    found = [
        path.relative_to(ROOT).with_suffix("").parts
        for package in ("wan", "configs", "infer", "train")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    names = {".".join(parts).removesuffix(".__init__") for parts in found}
    return sorted(n for n in names - {OF_GRADIO} if not n.endswith("__main__"))


def run_there(script: str, *arguments: str) -> str:
    command = [sys.executable, "-c", STAND_IN + script, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_is_imported_where_unix_modules_are_missing():
    run_there(IMPORT_ALL, *modules())


def test_files_are_written_and_locked_without_unix_locks(tmp_path):
    assert json.loads(run_there(FILES, str(tmp_path))) == [".lock", "a.json", "b.json", "c"]


def test_a_lock_that_another_process_holds_is_waited_for_or_refused(tmp_path):
    run_there(
        """
from wan.files import lock_file
with open(sys.argv[1], "w") as file:
    lock_file(file, wait=False)
    try:
        lock_file(file, wait=False)
    except BlockingIOError:
        sys.exit(0)
sys.exit("not refused")
""",
        str(tmp_path / "lock"),
    )


LIGHT = [
    ("infer.sample", ["--help"], 0),
    ("infer.sample", ["promt=x"], 2),
    ("train.finetune", ["--help"], 0),
    ("train.finetune", ["lr=-1"], 2),
]


@pytest.mark.parametrize(("module", "arguments", "code"), LIGHT)
def test_light_commands_run_there(module, arguments, code):
    script = f"""
import runpy
sys.argv = [sys.argv[0], *{arguments!r}]
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert (end.code or 0) == {code}, end.code
"""
    run_there(script)


def test_memory_is_asked_of_windows(monkeypatch):
    def of_system(answer):
        found = ctypes.cast(answer, ctypes.POINTER(SystemMemory)).contents
        assert found.size == 64  # MEMORYSTATUSEX
        found.total_physical, found.available_physical = 16 << 30, 5 << 30
        return 1

    def of_process(process, answer, size):
        found = ctypes.cast(answer, ctypes.POINTER(ProcessMemory)).contents
        assert (size.value, found.size) == (72, 72)  # PROCESS_MEMORY_COUNTERS of 64 bits
        found.peak_working_set, found.working_set = 3 << 30, 1 << 30
        return 1

    class Current:
        def __call__(self):
            return 1

    kernel = SimpleNamespace(
        GlobalMemoryStatusEx=of_system,
        K32GetProcessMemoryInfo=of_process,
        GetCurrentProcess=Current(),
    )
    monkeypatch.setattr(memory_meter, "resource", None)
    windll = SimpleNamespace(kernel32=kernel)
    monkeypatch.setattr(ctypes, "windll", windll, raising=False)
    assert memory_meter.free_bytes(CPU) == 5 << 30
    assert memory_meter.peak_memory(CPU) == {"process": 3 << 30}
    kernel.GlobalMemoryStatusEx = lambda answer: 0
    with pytest.raises(OSError, match="does not answer GlobalMemoryStatusEx"):
        memory_meter.free_bytes(CPU)


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            300000.
Pages inactive:                           20000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                        150000.
Pages purgeable:                           1000.
"Translation faults":                 123456789.
"""


def test_free_memory_of_macos_is_not_all_of_it(monkeypatch):
    assert available_on_macos(VM_STAT) == 33000 * 16384
    done = SimpleNamespace(stdout=VM_STAT)
    monkeypatch.setattr(memory_meter.sys, "platform", "darwin")
    monkeypatch.setattr(memory_meter.subprocess, "run", lambda *_, **__: done)
    assert memory_meter.free_bytes(CPU) == 33000 * 16384

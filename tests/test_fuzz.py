"""Damaged and hostile files end in one short message or in a right result; see fuzz.py."""

from pathlib import Path

import fuzz


def test_every_damaged_file_is_refused_or_read_rightly(pytestconfig):
    cases = pytestconfig.getoption("--fuzz-cases")
    table, failures = fuzz.fuzz(list(range(cases)), seed=0)
    assert not failures, "\n\n".join(failures)
    assert sum(sum(row.values()) for row in table.values()) == cases
    # A kind that is read after one damage in fifty may by chance not be read here at all, so the
    # whole is counted; the child reads each kind once before it is damaged.
    if cases >= 2000:
        assert all(row["refused"] for row in table.values()), table
        assert sum(row["read"] for row in table.values()) > cases / 10, table


FAULTS = {
    "sound": "fuzz.read_index(folder)",
    "hang": "time.sleep(60)",
    "crash": "os._exit(3)",
    "flood": "bytearray(4 << 30)",
    "raw error": "raise ValueError('raw')",
}


def test_the_fuzzer_sees_hangs_crashes_floods_and_raw_errors(tmp_path):
    program = tmp_path / "faulty.py"
    program.write_text(
        f"""
import os, sys, time
sys.path.insert(0, {str(Path(fuzz.__file__).parent)!r})
import fuzz

def reader(fault):
    def read(folder):
        exec(fault if folder.name == "case" else FAULTS["sound"], globals() | locals())
    return read

FAULTS = {FAULTS!r}
fuzz.SECONDS = 3
damage = fuzz.damaged_json("sharded/model.safetensors.index.json")
fuzz.TARGETS = [fuzz.Target(name, damage, reader(fault)) for name, fault in FAULTS.items()]
fuzz.main()
"""
    )
    table, failures = fuzz.fuzz(list(range(len(FAULTS))), seed=0, program=program)
    assert table.pop("sound")["failed"] == 0
    assert all(row == {"failed": 1} for row in table.values())
    words = ("Timeout", "exit code 3", "MemoryError", "ValueError: raw")
    for failure, name, word in zip(failures, list(FAULTS)[1:], words, strict=True):
        assert failure.startswith("case")
        assert f"({name})" in failure
        assert word in failure

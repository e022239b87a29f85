"""Files appear whole, or what was there stays."""

import errno
import fcntl
import json
import math
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from wan import WanDMDPipeline
from wan.errors import WanError
from wan.files import (
    create_sealed,
    expanded,
    parse_json,
    read_bytes,
    read_json,
    read_sealed,
    read_text,
    remove_leftovers,
    write_sealed,
    write_text,
    written_beside,
)
from wan.weights.save import replace_component

ROOT = Path(__file__).parents[1]


def test_a_file_appears_at_the_end_and_nothing_beside_it_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_beside(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
        assert beside.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_on_the_way_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def run_out_of_disk() -> None:
        with written_beside(path) as beside:
            beside.write_text("ne")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_out_of_disk()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_at_once_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with written_beside(path) as one, written_beside(path) as other:
        one.write_text("one")
        other.write_text("other")
        assert one != other
    assert path.read_text() == "one"  # which finished last
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_the_name_points_to_it(tmp_path, monkeypatch):
    flushed = []
    path = tmp_path / "a.txt"
    monkeypatch.setattr("wan.files.os.fsync", lambda _: flushed.append(path.exists()))
    write_text(path, "é\n")
    assert flushed == [False]
    assert path.read_bytes() == "é\n".encode()


def test_files_get_the_rights_that_the_umask_leaves(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_text(tmp_path / "a.txt", "x")
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


# --- what killed processes leave ------------------------------------------------------------------

WRITER = """
import os, signal, sys
from pathlib import Path
from wan.files import folder_beside, written_beside
with written_beside(Path(sys.argv[1], "a.txt")) as file, folder_beside(Path(sys.argv[1], "b")) as b:
    file.write_text("half")
    (b / "half").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is in the middle of writing a file and a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_leftovers_of_a_killed_process_go_and_a_living_one_keeps_its_own(tmp_path, writer):
    def hidden():
        return sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith("."))

    remove_leftovers.cache_clear()
    write_text(tmp_path / "c.txt", "whole")
    assert hidden() == [".part", ".tmp", ".tmp"]
    writer.kill()
    writer.wait()
    assert hidden() == [".part", ".tmp", ".tmp"]
    remove_leftovers.cache_clear()
    write_text(tmp_path / "c.txt", "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


def test_a_file_that_is_taken_for_a_leftover_before_it_is_locked_gets_another_name(
    tmp_path, monkeypatch
):
    lock, names = fcntl.flock, []

    def lock_too_late(descriptor, how):
        if not names:  # between creating and locking: what another process does there
            names.extend(tmp_path.iterdir())
            names[0].unlink()
        lock(descriptor, how)

    monkeypatch.setattr("wan.files.fcntl.flock", lock_too_late)
    write_text(tmp_path / "a.txt", "whole")
    assert names
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_disk_without_locks_or_links_serves_too(tmp_path, monkeypatch):
    def no(*_):
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr("wan.files.fcntl.flock", no)
    monkeypatch.setattr("wan.files.os.link", no)
    (tmp_path / ".x.0123abcd.tmp").touch()  # of whom, nobody can tell
    write_text(tmp_path / "a.txt", "whole")
    create_sealed(tmp_path / "b.json", {})
    with pytest.raises(FileExistsError):
        create_sealed(tmp_path / "b.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == [".x.0123abcd.tmp", "a.txt", "b.json"]


def test_a_folder_is_not_written_over_a_file(tmp_path):
    (tmp_path / "model").write_text("x")
    with pytest.raises(WanError, match="is a file, and a folder is to be written"):
        replace_component({}, tmp_path / "model", "vae", {})
    with pytest.raises(WanError, match="is a file, and a folder is to be written"):
        WanDMDPipeline.from_pretrained("builtin:miniature").save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_errors_name_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_text(tmp_path / "no" / "a.txt", "x")
    assert caught.value.filename == str(tmp_path / "no" / "a.txt")
    with pytest.raises(OSError, match="No space") as caught, written_beside(tmp_path / "b.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "b.txt")
    write_text(tmp_path / ("x" * 250), "the longest name but five")


# --- records --------------------------------------------------------------------------------------


def test_any_single_change_of_a_record_is_noticed(tmp_path):
    path = tmp_path / "a.json"
    values = {"b": [1, 0.1, None, True], "a": {"é": "x"}, "seed": 2**63, "tiny": 5e-324}
    write_sealed(path, values | {"t": (1, 2), "n": {10: 1, 9: 2}})
    assert read_sealed(path) == values | {"t": [1, 2], "n": {"10": 1, "9": 2}}
    whole = path.read_bytes()
    said = json.loads(whole)
    for place in range(len(whole)):
        flipped = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for damaged in (whole[:place], flipped):
            path.write_bytes(damaged)
            try:
                read_sealed(path)
            except WanError:
                continue
            # Read all the same: a line end less, or a digest under another name.
            there = json.loads(damaged)
            assert there == said or "digest" not in there


def test_a_record_without_digest_is_one_of_an_older_release(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_sealed(path) == {"a": 1}


def test_a_record_is_created_once_and_never_without_its_content(tmp_path, monkeypatch):
    path = tmp_path / "a.json"

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        with pytest.raises(OSError, match="No space"):
            create_sealed(path, {"a": 1})
    assert not list(tmp_path.iterdir())
    create_sealed(path, {"a": 1})
    with pytest.raises(FileExistsError):
        create_sealed(path, {"a": 2})
    assert read_sealed(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


# --- paths ----------------------------------------------------------------------------------------


def test_a_home_folder_that_nobody_knows_is_one_clear_error(monkeypatch):
    assert expanded("~") == Path.home()
    assert expanded("a/~b") == Path("a/~b")
    here = expanded("./~nosuchuser/x")
    assert here == expanded(here) == Path.cwd() / "~nosuchuser" / "x"
    with pytest.raises(WanError, match=r"~nosuchuser/x: ~nosuchuser stands for .* not known"):
        expanded("~nosuchuser/x")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}[0])  # a user without an entry
    with pytest.raises(WanError, match="not known"):
        expanded("~/x")
    assert expanded("x") == Path("x")


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: os.mkfifo(path), "a pipe"),
        (lambda path: path.mkdir(), "a folder"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
    ],
)
def test_only_regular_files_are_read(tmp_path, make, what):
    """A pipe that nobody writes to would be waited for, a device may never end."""
    make(tmp_path / "a.json")
    for read in (read_json, read_text, lambda path: read_bytes(path, 10)):
        with pytest.raises(WanError, match=rf"a\.json: {what}, not a regular file"):
            read(tmp_path / "a.json")


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, limit=8) == {"a": 1}
    with pytest.raises(WanError, match="8 bytes, at most 7"):
        read_json(path, limit=7)
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a sparse file takes no place on the disk
    with pytest.raises(WanError, match="1,099,511,627,776 bytes"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 1}', "the key 'a' occurs twice"),
        ('{"a": {"b": 1, "b": 2}}', "the key 'b' occurs twice"),
        ('{"a": 123456789012345678901}', "a number of 21 digits"),
        ('{"a": 1e400}', "1e400 is no number"),
        ('{"a": 0.' + "1" * 99 + "}", "0.111111"),
        ('{"a": NaN}', "NaN where JSON has numbers"),
        ('{"a": "\\udc00"}', "half of a character"),
        ("[1]", "not an object"),
        ('{"a":' * 32 + "{}" + "}" * 32, "nested more than 32 levels"),
        ('{"a": [' * 60_000, "nested more than 32 levels"),
        ("{'a': 1}", "not valid JSON"),
    ],
)
def test_json_is_bounded(tmp_path, text, problem):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(WanError) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: ")
    assert problem in str(caught.value)


def test_json_at_its_bounds_is_read():
    values = {"a": 12345678901234567890, "b": -1.5e-300, "c": "\U0001f600 é\n", "d": {}}
    for _ in range(30):
        values = {"deep": values}
    assert parse_json(json.dumps(values), "x") == values
    assert parse_json('{"low": -Infinity}', "x", infinite=True) == {"low": -math.inf}


def test_messages_are_short_and_visible():
    error = WanError("a\x1b[2J\u202eb\x85" + "x" * 5000 + "the end", "y" * 5000)
    assert str(error).startswith("a\\x1b[2J\\u202eb\\x85xxx")
    assert str(error).endswith("the end")
    assert "characters more" in str(error)
    assert len(str(error)) == len(error.on_command_line) == 2000
    plain = "héllo\t家 \u3000 👩‍👩‍👧\n"
    assert str(WanError(plain)) == plain
    assert str(error.about("a.json")).startswith("a.json: a\\x1b")

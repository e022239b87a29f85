"""Files appear whole, or what was there stays."""

import stat

import pytest

from wan.files import write_text, written_beside


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

"""Files of tensors with a digest of all that they hold."""

import torch

from train.distill.run import is_panel
from wan.errors import WanError
from wan.weights.checked import SHA256, read_checked, write_checked
from wan.weights.safetensors_file import read_header, write_tensors

TENSORS = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.tensor(1, dtype=torch.int64)}


def test_what_is_written_is_read_and_metadata_stays(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checked(path, TENSORS, {"key": "k"})
    tensors = read_checked(path)
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert read_header(path).metadata.keys() == {"key", SHA256}


def test_any_change_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checked(path, TENSORS, {"key": "k"})
    sound = path.read_bytes()
    header = 8 + int.from_bytes(sound[:8], "little")
    places = [*range(0, header, 7), *range(header, len(sound))]
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 1]) + sound[place + 1 :])
        try:
            tensors = read_checked(path)
        except WanError:
            continue
        # A digest under another name, or a blank in the header: the tensors are whole.
        assert place < header
        assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_a_file_of_an_older_release_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, TENSORS)
    assert torch.equal(read_checked(path)["b"], TENSORS["b"])


def test_a_damaged_panel_of_the_teacher_is_made_again(tmp_path, capsys):
    path = tmp_path / "teacher_panel.safetensors"
    assert not is_panel(path, "k")
    write_checked(path, {"latents": torch.zeros(9)}, {"key": "k"})
    assert is_panel(path, "k")
    assert not is_panel(path, "another teacher")
    assert not capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    assert not is_panel(path, "k")
    assert "it is made again" in capsys.readouterr().err

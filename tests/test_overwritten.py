"""Weight files that are written to in place while a model is in memory: one error, no other video.

The weights are bfloat16, which is how the files hold them: so they are views of the mapped files.
"""

import copy
import gc
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from wan.errors import WanError
from wan.pipeline.folder import load_part
from wan.pipeline.parts import WanTransformer3DModel
from wan.pipeline.pipeline import WanDMDPipeline
from wan.runtime.offload import at_work
from wan.weights import tensor_reader
from wan.weights.hub import STUDENT

CPU = torch.device("cpu")
PARTS = ("transformer", "vae", "text_encoder")


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(STUDENT, tmp_path / "model"))


def weights(model, part):
    return next((model / part).glob("*.safetensors"))


def load(model, **options):
    return WanDMDPipeline.from_pretrained(model, dtype=torch.bfloat16, **options)


def video(pipeline, **options):
    call = {"height": 64, "width": 64, "num_frames": 5, "seed": 0, "output_type": "pt"}
    return pipeline("a red circle", **call, **options).frames.float().numpy()


def overwrite(path):
    """As `cp new.safetensors old.safetensors` does: other bytes in the same file."""
    content = bytearray(path.read_bytes())
    content[-1000:] = bytes(1000)
    with path.open("r+b") as file:
        file.write(content)


def refused(run, path):
    with pytest.raises(WanError, match=r"was written to in place.*Load the model again") as caught:
        run()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("offload", ["none", "stage", "block"])
@pytest.mark.parametrize("part", PARTS)
def test_an_overwritten_file_is_one_error(model, part, offload):
    pipeline = load(model, offload=offload)
    video(pipeline)
    overwrite(weights(model, part))
    refused(lambda: video(pipeline), weights(model, part))


def test_and_so_is_one_that_is_overwritten_while_it_is_at_work(model):
    pipeline, file = load(model), weights(model, "transformer")

    def on_step(pipe, i, timestep, tensors):
        overwrite(file)
        return {}

    refused(lambda: video(pipeline, callback_on_step_end=on_step), file)


def test_a_file_that_is_cut_is_an_error_and_does_not_kill(model):
    program = (
        "import os, sys, torch\n"
        "from wan.errors import WanError\n"
        "from wan.pipeline.pipeline import WanDMDPipeline\n"
        "pipeline = WanDMDPipeline.from_pretrained(sys.argv[1], dtype=torch.bfloat16)\n"
        "os.truncate(sys.argv[2], 0)\n"
        "try:\n"
        "    pipeline('a red circle')\n"
        "except WanError as error:\n"
        "    print(error)\n"
    )
    for part in PARTS:
        copied = model.with_name(part)
        shutil.copytree(model, copied)
        arguments = [sys.executable, "-c", program, copied, weights(copied, part)]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode == 0, done
        assert f"{weights(copied, part)}: was written to in place" in done.stdout


def test_a_file_that_is_replaced_by_a_rename_changes_nothing(model):
    pipeline = load(model)
    expected = video(pipeline)
    for part in PARTS:
        beside = weights(model, part).with_suffix(".new")
        beside.write_bytes(b"something else")
        os.replace(beside, weights(model, part))
    assert np.array_equal(video(pipeline), expected)
    shutil.rmtree(model)
    assert np.array_equal(video(pipeline), expected)


def test_weights_that_are_copies_do_not_depend_on_the_file(model):
    pipeline = WanDMDPipeline.from_pretrained(model, dtype=torch.float32)
    expected = video(pipeline)
    for part in PARTS:
        overwrite(weights(model, part))
    assert np.array_equal(video(pipeline), expected)


def test_a_copy_of_a_network_is_its_own(model):
    network = WanTransformer3DModel.from_pretrained(
        model, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    copies = [copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    overwrite(weights(model, "transformer"))
    for one in copies:
        with at_work(one, CPU, "none"):
            pass
    with pytest.raises(WanError, match="in place"), at_work(network, CPU, "none"):
        pass
    network.to(torch.float32)
    with at_work(network, CPU, "none"):
        pass


def test_a_file_that_changes_while_it_is_read_is_an_error(model, monkeypatch):
    path = weights(model, "vae")
    fill = tensor_reader.fill

    def slow(*arguments):
        zero = fill(*arguments)
        overwrite(path)
        return zero

    monkeypatch.setattr(tensor_reader, "fill", slow)
    with pytest.raises(WanError, match="changed while it was being loaded"):
        load_part(model, "vae", dtype=torch.float32)


def test_descriptors_are_given_back(model):
    def opened():
        links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
        return [link for link in links if os.path.realpath(link).startswith(str(model))]

    pipeline = load(model)
    assert opened()
    del pipeline
    gc.collect()
    assert not opened()

"""Clips and prompts through the command and into training; damage to what it wrote."""

import errno
import hashlib
import json
import os
import shutil
import signal
import time
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_clips
import torch
import torch.multiprocessing as mp
from PIL import Image
from test_clips import damage, make_clip
from test_data import TINY
from test_parallel import free_ports

import train.data
import train.preprocess.run
from configs.cli import USER_ERROR
from configs.command_line import CommandLine
from configs.compose import compose_runs
from configs.data import DataConfig, PreprocessConfig, parse_size
from configs.progress import Steps
from configs.start import interrupt_from_now_on
from configs.training import FinetuneConfig, LoopConfig
from train.conditioning import component_digests
from train.data import CONTENT, Source, as_text, folder_cache, open_data, other_rate
from train.finetune.__main__ import LINE
from train.finetune.run import finetune
from train.parallel import ALONE
from train.preprocess.run import preprocess
from train.tensor_cache import TensorStore, open_to_read
from wan.errors import WanError
from wan.files import read_sealed, remove_leftovers, write_json, write_sealed
from wan.models.dit_config import DiTConfig
from wan.models.vae import WanVAE
from wan.pipeline.config import SamplingDefaults
from wan.pipeline.parts import vae_levels
from wan.weights.checkpoint import open_checkpoint
from wan.weights.digests import sha256_file
from wan.weights.hub import STUDENT
from wan.weights.load import load_state
from wan.weights.safetensors_file import map_tensors, read_header, write_tensors
from wan.weights.save import save_component

clips = test_clips.clips


def export(vae, folder):
    save_component(vae.state_dict(), folder, "vae", vae_levels=vae_levels(vae.config))
    write_json(folder / "config.json", vae.config.to_json())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A released layout's frozen parts: a tiny autoencoder, the miniature's text encoder."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    export(WanVAE(TINY), folder / "vae")
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(STUDENT / name, folder / name)
    return folder


def settings(tmp_path, model, **changes) -> PreprocessConfig:
    config = PreprocessConfig(
        clips=str(tmp_path / "clips"),
        output_dir=str(tmp_path / "data"),
        checkpoint=str(model),
        sizes=["5x32x32"],
        threads=1,
    )
    return replace(config, **changes)


def report(tmp_path, name="report.jsonl") -> dict[str, dict]:
    lines = (tmp_path / "data" / name).read_text().splitlines()
    return {row["clip"]: row for row in map(json.loads, lines)}


def with_older_report(folder) -> dict:
    """Write a folder's report as older releases did; returns the index that belongs to it."""
    lines = [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]
    older = as_text([{n: value for n, value in line.items() if n != CONTENT} for line in lines])
    (folder / "report.jsonl").write_text(older)
    digest = hashlib.sha256(older.encode()).hexdigest()
    return read_sealed(folder / "index.json") | {"report_sha256": digest}


# --- the command ----------------------------------------------------------------------------------


def test_every_clip_has_a_line_and_bad_ones_are_set_aside_not_replaced(clips, tmp_path, model):
    make_clip(clips / "good.mp4", caption="a gray wall")
    make_clip(clips / "mute.mp4", caption=None)
    damage(make_clip(clips / "cut.mp4", frames=12, size=(64, 64)), "truncated")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(clips / "picture.png")
    (clips / "picture.png").write_bytes((clips / "picture.png").read_bytes()[:50])
    (clips / "picture.txt").write_text("a picture")
    (clips / "gone.mp4").symlink_to(clips / "nowhere.mp4")
    (clips / "gone.txt").write_text("gone")
    (clips / "latin.txt").write_bytes(b"caf\xe9")
    make_clip(clips / "latin.mp4", caption=None, seed=1)
    assert preprocess(settings(tmp_path, model, max_set_aside=5)) == 0
    rows = report(tmp_path)
    good = rows.pop("good.mp4")
    assert (good["verdict"], good["size"], good["retimed_to"]) == ("ok", "5x32x32", None)
    assert (good["declared_frames"], good["decoded_frames"], good["fps"]) == (5, 5, 8.0)
    assert (good["crop"], good["caption_cut"]) == ([0, 0, 32, 32], False)
    reasons = {name: row["reason"] for name, row in rows.items()}
    assert {row["verdict"] for row in rows.values()} == {"set aside"}
    for name, reason in {
        "mute.mp4": "caption is missing",
        "cut.mp4": "damaged",
        "picture.png": "damaged or unreadable",
        "gone.mp4": "No such file",
        "latin.mp4": "not UTF-8",
    }.items():
        assert reason in reasons.pop(name)
    assert not reasons
    assert not any(str(tmp_path) in row["reason"] for row in rows.values())
    cache = folder_cache(tmp_path / "data", component_digests(model))
    assert len(cache) == 1
    assert cache.batch(0, 2, seed=0)[1] == ["a gray wall"] * 2


def test_the_summary_says_how_much_of_the_picture_was_lost(clips, tmp_path, model, capsys):
    make_clip(clips / "a.mp4")
    make_clip(clips / "b.mp4", size=(32, 40))
    assert preprocess(settings(tmp_path, model)) == 0
    lost = "2 clips of 5x32x32 (10% of the picture cropped away, 20% at most)"
    assert lost in capsys.readouterr().out
    assert [row["cropped_share"] for row in report(tmp_path).values()] == [0, 0.2]


def test_a_clip_may_become_several_samples_that_are_stored_and_resumed_one_by_one(
    clips, tmp_path, model, monkeypatch
):
    make_clip(clips / "a.mp4", frames=17, caption="long")
    make_clip(clips / "b.mp4", caption="short", seed=1)
    make_clip(clips / "mute.mp4", caption=None)
    config = settings(tmp_path, model, frames="chunk", shard_clips=2, max_set_aside=1)
    encoded = []

    def encode(vae, video, chunk=None):
        encoded.append(video)
        if len(encoded) == 3:
            raise Killed
        return train.data.encode_float16(vae, video, chunk)

    monkeypatch.setattr(train.preprocess.run, "encode_float16", encode)
    with pytest.raises(Killed):
        preprocess(config)
    assert preprocess(config) == 0
    assert len(encoded) == 3 + 2  # the third, which was killed, and the short clip
    assert preprocess(config) == 0
    assert len(encoded) == 5
    lines = [json.loads(line) for line in (tmp_path / "data/report.jsonl").open()]
    found = [(row["clip"], row.get("used_frames"), row.get("sample")) for row in lines]
    long = [("a.mp4", [start, start + 4], start // 5 + 1) for start in (0, 5, 10)]
    assert found == [*long, ("b.mp4", [0, 4], 1), ("mute.mp4", None, None)]
    cache = folder_cache(tmp_path / "data", None)
    assert len(cache) == 4
    assert sorted(cache.batch(0, 4, seed=0)[1]) == ["long"] * 3 + ["short"]
    with pytest.raises(WanError, match=r"frames: chunk there, head now"):
        preprocess(replace(config, frames="head"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "only 0.6 of the clips' 3.0 seconds are used, 79% are dropped: frames=head"),
        ({"frames": "slide", "frame_stride": 12}, "only 1.2 of the clips' 3.0"),
        ({"frames": "slide", "frame_stride": 2}, None),
        ({"frames": "chunk"}, None),
    ],
)
def test_seconds_that_no_sample_has_are_told_once(clips, tmp_path, model, capsys, changes, said):
    make_clip(clips / "a.mp4", frames=24)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(clips / "picture.png")
    (clips / "picture.txt").write_text("a picture")
    assert preprocess(settings(tmp_path, model, sizes=["5x32x32", "1x32x32"], **changes)) == 0
    printed = capsys.readouterr().out
    assert said in printed if said else "dropped" not in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": "slide"}, r"frames=slide: .*so give frame_stride= too"),
        ({"frames": "uniform"}, r"frames=uniform: .*so give frame_samples= too"),
        ({"frame_stride": 3}, "frame_stride=3: only frames=slide reads it, and frames=head"),
        ({"frames": "chunk", "frame_samples": 3}, "only frames=uniform reads it"),
        ({"frames": "full"}, "frames=full.*head"),
    ],
)
def test_options_of_frames_are_used_or_refused(tmp_path, model, changes, message):
    with pytest.raises(WanError, match=message):
        settings(tmp_path, model, **changes)


def test_too_many_bad_clips_fail_the_run(clips, tmp_path, model):
    for name in ("a", "b"):
        make_clip(clips / f"{name}.mp4", caption=None)
    make_clip(clips / "c.mp4")
    make_clip(clips / "d.mp4", caption=None, frames=3, fps=4)
    with pytest.raises(WanError) as refused:  # by all reasons, and before anything is encoded
        preprocess(settings(tmp_path, model))
    for part in (
        "3 of 4 clips are set aside, 0 may be",
        "check_only=true judges them",
        "a.mp4, b.mp4: its caption is missing",
        "d.mp4: its caption is missing; write one sentence into a .txt file of its name beside it; "
        "4 frames per second, fewer than fps=8; fits no size (5x32x32: has 3 frames at 8 fps)",
    ):
        assert part in str(refused.value)
    assert len(report(tmp_path, "check.jsonl")) == 4
    assert not list((tmp_path / "data").glob("latents-*"))
    (clips / "d.mp4").unlink()
    with pytest.raises(WanError, match="2 of 3 clips"):
        preprocess(settings(tmp_path, model, max_set_aside_share=0.34))
    with pytest.raises(WanError, match=r"did not finish|has not finished"):
        folder_cache(tmp_path / "data", None)
    assert preprocess(settings(tmp_path, model, max_set_aside_share=0.67)) == 0
    (clips / "c.mp4").unlink()
    with pytest.raises(WanError, match="2 of 2 clips"):  # nothing is left
        preprocess(settings(tmp_path, model, max_set_aside=9))


def test_a_file_with_several_captions_is_read_and_counted_once(clips, tmp_path, model, monkeypatch):
    rows = [{"path": "good.mp4", "cap": ["one", "two", ""]}, {"path": "bad.mp4", "cap": ["a", "b"]}]
    (tmp_path / "l.json").write_text(json.dumps(rows))
    make_clip(tmp_path / "good.mp4")
    make_clip(tmp_path / "bad.mp4", fps=4)
    read = []
    judge_clip = train.preprocess.run.judge_clip
    monkeypatch.setattr(
        train.preprocess.run,
        "judge_clip",
        lambda clip, *rest: (read.append(clip.path.name), judge_clip(clip, *rest))[1],
    )
    config = settings(tmp_path, model, clips=str(tmp_path / "l.json"))
    with pytest.raises(WanError, match=r"^2 of 2 clips .* bad\.mp4: 4 frames"):
        preprocess(config)
    assert read == ["good.mp4", "bad.mp4"]
    assert preprocess(replace(config, max_set_aside=2)) == 0  # of one a caption only
    lines = [json.loads(x) for x in (tmp_path / "data/report.jsonl").read_text().splitlines()]
    assert [(x["clip"], x["caption"]) for x in lines if x["verdict"] == "ok"] == [
        ("good.mp4", "one"),
        ("good.mp4", "two"),
    ]
    assert [x["verdict"] for x in lines] == ["ok", "ok", *["set aside"] * 3]


def test_check_only_judges_all_and_changes_nothing_else(clips, tmp_path, model):
    make_clip(clips / "a.mp4", caption=None)
    make_clip(clips / "b.mp4")
    make_clip(clips / "c.mp4", frames=2)
    with pytest.raises(WanError, match=r"2 of 3 clips .*check\.jsonl has a line for each\."):
        preprocess(settings(tmp_path, model, check_only=True))
    verdicts = [row["verdict"] for row in report(tmp_path, "check.jsonl").values()]
    assert verdicts == ["set aside", "ok", "set aside"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["check.jsonl"]


def test_a_run_that_stored_nothing_does_not_claim_the_folder(clips, tmp_path, model):
    make_clip(clips / "a.mp4", caption=None)
    with pytest.raises(WanError, match="set aside"):
        preprocess(settings(tmp_path, model))
    (clips / "a.txt").write_text("a wall")
    assert preprocess(settings(tmp_path, model, fps=8.05)) == 0


def test_a_frame_rate_that_is_not_the_models_is_warned_about_here_and_in_training(
    clips, tmp_path, model, capsys
):
    own = shutil.copytree(model, tmp_path / "model")
    write_json(own / "sampling_defaults.json", {"fps": 24})
    make_clip(clips / "a.mp4", fps=8)
    assert preprocess(settings(tmp_path, own)) == 0
    wrong = (
        "its clips have 8 frames per second, and the model's videos are shown with 24: what is "
        "learnt moves 3 times as fast there; encode clips with fps=24, or show videos with fps=8\n"
    )
    assert capsys.readouterr().err.endswith(f"warning: fps=8: {wrong}")
    folder = str(tmp_path / "data")
    for fps, said in ((24, f"warning: data.folder: {folder}: {wrong}"), (8, "")):
        shown = SimpleNamespace(transformer=DiTConfig(), defaults=SamplingDefaults(fps=fps))
        open_data(DataConfig(kind="folder", folder=[folder]), shown, own, ALONE)
        assert capsys.readouterr().err == said
    assert other_rate(["1x32x32"], 8, 24) is None  # pictures have no rate
    assert other_rate(["17x32x32"], 23.976, 24) is None


def test_a_folder_of_something_else_is_left_alone(clips, tmp_path, model):
    make_clip(clips / "a.mp4")
    (tmp_path / "data").mkdir()
    shard = tmp_path / "data" / "latents-00000.safetensors"
    write_tensors(shard, {"latents": torch.zeros(1)})
    with pytest.raises(WanError, match="no folder of this command"):
        preprocess(settings(tmp_path, model))
    assert [path.name for path in sorted((tmp_path / "data").iterdir())] == [".lock", shard.name]


def test_a_run_that_fails_leaves_a_finished_folder_as_it_was(clips, tmp_path, model):
    make_clip(clips / "a.mp4")
    preprocess(settings(tmp_path, model))
    digest = folder_cache(tmp_path / "data", None).digest
    make_clip(clips / "b.mp4", caption=None)
    with pytest.raises(WanError, match=r"/data/check\.jsonl has a line for each"):
        preprocess(settings(tmp_path, model))
    assert folder_cache(tmp_path / "data", None).digest == digest
    assert "caption is missing" in report(tmp_path, "check.jsonl")["b.mp4"]["reason"]


class Killed(BaseException):
    """No one catches it, as no one catches kill -9."""


def test_a_killed_run_goes_on_after_its_last_shard(clips, tmp_path, model, monkeypatch):
    for i in range(5):
        make_clip(clips / f"{i}.mp4", caption=f"wall {i}", seed=i)
    config = settings(tmp_path, model, shard_clips=2)
    encoded = []

    def encode(vae, video, chunk=None):
        if len(encoded) == kill_at:
            raise Killed
        encoded.append(video)
        return train.data.encode_float16(vae, video, chunk)

    monkeypatch.setattr(train.preprocess.run, "encode_float16", encode)
    kill_at = 3
    with pytest.raises(Killed):
        preprocess(config)
    with pytest.raises(WanError, match="did not finish"):
        folder_cache(tmp_path / "data", None)
    assert len(open_to_read(tmp_path / "data", "latents").stored) == 2
    (tmp_path / "data" / ".latents-0.safetensors.0123abcd.tmp").write_bytes(b"half a shard")
    remove_leftovers.cache_clear()  # as in a new process
    kill_at = -1
    assert preprocess(config) == 0
    assert not list((tmp_path / "data").glob(".latents*"))
    assert len(encoded) == 3 + 3  # the third was lost with its shard
    assert preprocess(config) == 0
    assert len(encoded) == 6
    resumed = folder_cache(tmp_path / "data", None)
    straight = replace(config, output_dir=str(tmp_path / "straight"), shard_clips=4)
    assert preprocess(straight) == 0
    other = folder_cache(tmp_path / "straight", None)
    assert (tmp_path / "straight/report.jsonl").read_text() == (
        tmp_path / "data/report.jsonl"
    ).read_text()
    assert all(torch.equal(resumed.latents[i], other.latents[i]) for i in range(5))
    # A new clip is added, a changed caption is another text; what is there is not encoded again.
    encoded.clear()
    make_clip(clips / "new.mp4", caption="wall", seed=9)
    (clips / "0.txt").write_text("another wall")
    assert preprocess(config) == 0
    assert len(encoded) == 1
    assert "another wall" in folder_cache(tmp_path / "data", None).batch(0, 6, seed=0)[1]


def run_process(rank, config, killed, ports):
    """One of two processes: a whole run, a refused one, and one in which the second is killed."""
    torch.set_num_threads(1)
    interrupt_from_now_on()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
    root = Path(config.output_dir).parent
    bars = []

    class Counted(Steps):
        def __init__(self, what, total, done=0, quiet=False):
            super().__init__(what, total, done, quiet)
            bars.append(self)

    train.preprocess.run.Steps = Counted
    with (
        (root / f"said by {rank}").open("w") as said,
        redirect_stderr(said),
        redirect_stdout(said),
    ):
        assert preprocess(config) == 0
        if rank:
            assert all(bar.quiet for bar in bars)
        else:  # of five clips this process has encoded three
            assert [bar.done for bar in bars] == [bar.total for bar in bars] == [6, 5, 6]
        os.environ["MASTER_PORT"] = str(ports[1])
        if rank:
            assert preprocess(replace(killed, max_set_aside=0)) == USER_ERROR
        else:  # only the main process says why
            with pytest.raises(WanError, match="1 of 6 clips"):
                preprocess(replace(killed, max_set_aside=0))
    encode, encoded = train.data.encode_float16, []

    def killed_or_stopped(vae, video, chunk=None):
        if rank:
            while not (root / "waits").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        if encoded:
            (root / "waits").touch()
            signal.pause()  # until SIGTERM comes, as torchrun sends it to those that are left
        encoded.append(video)
        return encode(vae, video, chunk)

    train.preprocess.run.encode_float16 = killed_or_stopped
    os.environ["MASTER_PORT"] = str(ports[2])
    preprocess(killed)


def test_two_processes_share_the_clips_and_make_the_folder_of_one(
    clips, tmp_path, model, monkeypatch
):
    for i in range(5):
        make_clip(clips / f"{i}.mp4", caption=f"wall {i}", seed=i, frames=5 + 5 * (i == 1))
    make_clip(clips / "mute.mp4", caption=None)
    one = settings(tmp_path, model, max_set_aside=1, frames="chunk")
    preprocess(one)
    two, killed = (replace(one, output_dir=str(tmp_path / name)) for name in ("two", "killed"))
    arguments = (two, killed, free_ports(3))
    # Forked, as a process that starts anew loads PyTorch for seconds.
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.start_processes(run_process, arguments, nprocs=2, start_method="fork")

    def content(name):
        made = folder_cache(tmp_path / name, component_digests(model))
        lines = (tmp_path / name / "report.jsonl").read_text()
        return made.digest, lines, [made.latents[i].tolist() for i in range(len(made))]

    assert content("two") == content("data")
    assert (tmp_path / "said by 1").read_text() == ""
    assert "5 clips in 6 samples" in (tmp_path / "said by 0").read_text()

    encoded = []

    def count(vae, video, chunk=None):
        encoded.append(video)
        return train.data.encode_float16(vae, video, chunk)

    monkeypatch.setattr(train.preprocess.run, "encode_float16", count)
    preprocess(killed)
    assert len(encoded) == 6 - 1  # what was ready where the signal came was stored
    assert content("killed") == content("data")


def test_damage_after_writing_is_noticed_and_can_be_repaired(clips, tmp_path, model, capsys):
    make_clip(clips / "a.mp4")
    config = settings(tmp_path, model)
    preprocess(config)
    (shard,) = (tmp_path / "data").glob("latents-*")
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(WanError, match=r"not what was written.*delete the file"):
        folder_cache(tmp_path / "data", None).batch(0, 1, seed=0)
    preprocess(replace(config, verify=True))
    assert "removed, its content is made again" in capsys.readouterr().err
    assert shard.read_bytes() == sound
    shard.write_bytes(sound[:-1])
    with pytest.raises(WanError, match="cut short"):
        folder_cache(tmp_path / "data", None)
    preprocess(config)
    assert shard.read_bytes() == sound


def test_what_a_shard_says_of_a_tensor_is_checked_too(tmp_path):
    store = TensorStore(tmp_path, "latents")
    store.add({"a": torch.zeros(2, 3)}, {"a": {"size": "5x32x32"}})
    (shard,) = store.shards()
    sound = shard.read_bytes()
    for said, other in ((b"5x32x32", b"5x64x32"), (b"[2,3]", b"[3,2]"), (b'"F32"', b'"I32"')):
        assert sound.count(said) == 1
        shard.write_bytes(sound.replace(said, other))
        with pytest.raises(WanError, match=r"latents-.*; delete the file"):
            open_to_read(tmp_path, "latents")
    shard.write_bytes(sound)
    assert open_to_read(tmp_path, "latents").read("a").shape == (2, 3)


def test_shards_and_an_index_of_an_older_release_are_read(clips, tmp_path, model):
    make_clip(clips / "a.mp4")
    preprocess(settings(tmp_path, model))
    folder = tmp_path / "data"
    before = folder_cache(folder, None)
    latents = before.latents[0]
    for shard in folder.glob("*.safetensors"):
        file = read_header(shard)
        notes = {key: json.loads(note) for key, note in file.metadata.items()}
        notes = {key: {n: note[n] for n in ("sha256", "facts")} for key, note in notes.items()}
        old = {key: json.dumps(note) for key, note in notes.items()}
        write_tensors(shard, {k: t.clone() for k, t in map_tensors(file).items()}, old)
    write_json(folder / "index.json", with_older_report(folder))
    after = folder_cache(folder, None)
    assert torch.equal(after.latents[0], latents)
    assert after.digest == before.digest == sha256_file(folder / "index.json")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("index.json", lambda content: content.replace(b"5x32x32", b"5x64x32", 1)),
        ("index.json", lambda content: content[: len(content) // 2]),
        ("index.json", lambda content: b"[1, 2]"),
        ("index.json", lambda content: b""),
        ("report.jsonl", lambda content: content.replace(b'"ok"', b'"no"')),
        ("report.jsonl", lambda content: content[: len(content) // 2]),
    ],
)
def test_a_damaged_index_or_report_is_refused_and_made_again(
    clips, tmp_path, model, name, change, capsys
):
    make_clip(clips / "a.mp4")
    config = settings(tmp_path, model)
    preprocess(config)
    file = tmp_path / "data" / name
    sound = file.read_bytes()
    file.write_bytes(change(sound))
    assert file.read_bytes() != sound
    with pytest.raises(WanError, match=r"run train\.preprocess there again"):
        folder_cache(tmp_path / "data", None)
    capsys.readouterr()
    assert preprocess(config) == 0
    assert ("it is written again" in capsys.readouterr().err) == (name == "index.json")
    assert file.read_bytes() == sound


def test_a_disk_that_fails_costs_no_shard(clips, tmp_path, model, monkeypatch):
    make_clip(clips / "a.mp4")
    preprocess(settings(tmp_path, model))
    (shard,) = (tmp_path / "data").glob("latents-*")

    def fail(path):
        assert path == shard
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("wan.weights.safetensors_file.open_regular", fail)
    with pytest.raises(WanError, match="input/output error"):
        preprocess(settings(tmp_path, model))
    assert shard.exists()


def test_what_a_folder_lacks_or_has_otherwise_is_noticed_when_it_is_opened(clips, tmp_path, model):
    make_clip(clips / "a.mp4")
    preprocess(settings(tmp_path, model))
    (texts,) = (tmp_path / "data").glob("texts-*")
    aside = texts.rename(tmp_path / "aside")
    with pytest.raises(WanError, match="2 of 2 texts are missing"):
        folder_cache(tmp_path / "data", None)
    aside.rename(texts)
    store = open_to_read(tmp_path / "data", "latents")
    (key,) = store.stored
    store.add({key: store.read(key) + 1}, {key: store.facts(key)})
    with pytest.raises(WanError, match=r"not those that index\.json was written for"):
        folder_cache(tmp_path / "data", None)


def test_another_recipe_or_model_needs_another_folder(clips, tmp_path, model, monkeypatch):
    make_clip(clips / "a.mp4")
    preprocess(settings(tmp_path, model))
    with monkeypatch.context() as later:
        later.setattr(train.preprocess.run, "RECIPE", 99)
        with pytest.raises(WanError, match=r"\(recipe: \d there, 99 now\); it can be trained on"):
            preprocess(settings(tmp_path, model))
    with pytest.raises(WanError, match=r"other settings \(fps: 8.0 there, 8.05 now\)"):
        preprocess(settings(tmp_path, model, fps=8.05))
    digests = component_digests(model)
    with pytest.raises(WanError, match="another vae than"):
        folder_cache(tmp_path / "data", {**digests, "vae": "0"})
    with pytest.raises(WanError, match="another text_encoder than"):
        folder_cache(tmp_path / "data", {**digests, "text_encoder": "0"})


def test_a_background_is_told_by_the_command_and_is_a_setting_of_the_folder(clips, tmp_path, model):
    make_clip(clips / "a.mp4")
    picture = Image.new("RGBA", (32, 32), (200, 100, 50, 0))
    picture.save(clips / "b.png")
    (clips / "b.txt").write_text("nothing")
    config = settings(tmp_path, model, sizes=["5x32x32", "1x32x32"])
    with pytest.raises(
        WanError, match=r"image b\.png: has .* white with image_background=\[255,255"
    ):
        preprocess(config)
    preprocess(replace(config, max_set_aside=1))
    assert "image_background" not in read_sealed(tmp_path / "data/index.json")["identity"]
    white = replace(config, image_background=[255, 255, 255])
    with pytest.raises(WanError, match=r"image_background: None there, \[255, 255, 255\] now"):
        preprocess(white)
    preprocess(replace(white, output_dir=str(tmp_path / "white")))
    assert len(folder_cache(tmp_path / "white", None)) == 2
    with pytest.raises(WanError, match=r"image_background: \[255, 255, 255\] there, None now"):
        preprocess(replace(config, output_dir=str(tmp_path / "white"), max_set_aside=1))


def test_the_digest_of_a_files_content_is_told_and_changes_no_data(clips, tmp_path, model):
    """A folder of an older release, written again by the same command, is the same data."""
    path = make_clip(clips / "a.mp4", caption="a wall")
    config = settings(tmp_path, model)
    folder = tmp_path / "data"
    assert preprocess(config) == 0
    assert report(tmp_path)["a.mp4"][CONTENT] == sha256_file(path)
    digest = folder_cache(folder, None).digest
    write_sealed(folder / "index.json", with_older_report(folder))
    assert (folder_cache(folder, None).digest, folder_cache(folder, None).sources) == (
        digest,
        [Source("a.mp4")],
    )
    make_clip(clips / "b.mp4", caption="another", seed=1)
    assert preprocess(config) == 0  # clips are added to it
    assert folder_cache(folder, None).digest != digest
    (clips / "b.mp4").unlink()
    (clips / "b.txt").unlink()
    assert preprocess(config) == 0
    assert folder_cache(folder, None).digest == digest
    assert folder_cache(folder, None).sources == [Source("a.mp4", sha256_file(path))]


def test_prompts_alone_are_enough_and_stored_as_encoded(tmp_path, model):
    (tmp_path / "prompts.txt").write_text("a red circle\n\n ein Kreis, {rot} \n")
    config = settings(
        tmp_path,
        model,
        clips=None,
        prompts=str(tmp_path / "prompts.txt"),
        negative_prompt="blur",
        sizes=["5x32x64"],
    )
    assert preprocess(config) == 0
    cache = folder_cache(tmp_path / "data", component_digests(model))
    assert len(cache) == 0
    assert cache.shapes == [(2, 2, 2, 4)]
    assert sorted(cache.prompts(0, 2, seed=0)) == ["a red circle", "ein Kreis, {rot}"]
    rows = cache.tokens_of(["a red circle", "", "blur"])
    shown = train.preprocess.run.Tokenizer.from_folder(model / "tokenizer")
    assert len(rows[0]) == len(shown("a red circle").ids)
    assert [row.shape[1] for row in rows] == [128] * 3
    with pytest.raises(WanError, match="no embedding of 'a blue"):
        cache.tokens_of(["", "a blue circle"])


@pytest.mark.parametrize("text", ["17x128", "0x32x32", "5x32x32x1", "a"])
def test_sizes_are_three_numbers(text):
    with pytest.raises(WanError, match="frames x height x width"):
        parse_size(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clips": None}, "nothing to do"),
        ({"sizes": ["5x30x32"]}, "height must be a multiple of 16"),
        ({"sizes": ["6x32x32"]}, "nearest are 5 and 9"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_read(
    clips, tmp_path, model, change, message
):
    make_clip(clips / "a.mp4")
    with pytest.raises(WanError, match=message):
        preprocess(settings(tmp_path, model, **change))
    assert not (tmp_path / "data").exists()


def test_sizes_are_those_that_the_checkpoints_transformer_takes(clips, tmp_path, model):
    make_clip(clips / "a.mp4", size=(48, 48))
    preprocess(settings(tmp_path, model, sizes=["5x48x48"]))  # who knows for which
    dit = DiTConfig()
    data = DataConfig(kind="folder", folder=str(tmp_path / "data"))
    with pytest.raises(WanError, match="takes no clips of that size"):
        open_data(data, SimpleNamespace(transformer=dit), model, ALONE)
    whole = tmp_path / "whole"
    (whole / "transformer").mkdir(parents=True)
    (whole / "transformer/config.json").write_text(json.dumps(dit.to_json()))
    for part in model.iterdir():
        copy = shutil.copytree if part.is_dir() else shutil.copy
        copy(part, whole / part.name)
    with pytest.raises(WanError, match="5x48x48: the height must be a multiple of 32, the width"):
        preprocess(settings(tmp_path, whole, sizes=["5x48x48"]))


def test_options_are_taken_as_typed():
    line = CommandLine(PreprocessConfig, "preprocess", ("negative_prompt",), path_keys=("clips",))
    tokens = ["sizes=[121x704x1280,1x704x1280]", "negative_prompt=${x}, 'a'", "clips=a,b"]
    (run,) = compose_runs(line, tokens)
    assert run.config.parsed_sizes() == [(121, 704, 1280), (1, 704, 1280)]
    assert (run.config.negative_prompt, run.config.clips) == ("${x}, 'a'", "a,b")


# --- training -------------------------------------------------------------------------------------


def test_training_on_a_folder_resumes_in_the_middle_of_an_epoch(
    clips, tmp_path, model, monkeypatch
):
    """Two buckets, a batch that straddles epochs, and neither encoder in memory."""
    for i in range(3):
        make_clip(clips / f"{i}.mp4", caption=f"wall {i}", seed=i)
    make_clip(clips / "wide.mp4", size=(32, 64), caption="wide")
    preprocess(settings(tmp_path, model, sizes=["5x32x32", "5x32x64"]))

    def refuse(*args):
        raise AssertionError("a frozen part is loaded")

    monkeypatch.setattr(train.data, "load_frozen", refuse)
    config = FinetuneConfig(
        output_dir=str(tmp_path / "straight"),
        checkpoint=str(model),
        from_scratch=True,
        dit={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "ffn_dim": 32,
            "in_channels": 2,
            "out_channels": 2,
            "text_dim": 128,
            "freq_dim": 32,
        },
        threads=1,
        batch_size=2,
        caption_dropout=0.5,
        data=DataConfig(kind="folder", folder=str(tmp_path / "data")),
        loop=LoopConfig(steps=5, log_every=1, save_every=2),
    )
    finetune(config)
    halves = replace(config, output_dir=str(tmp_path / "halves"))
    step = train.data.LatentCache.batch

    def killed(self, number, size, seed):
        if number == 3:
            raise Killed
        return step(self, number, size, seed)

    monkeypatch.setattr(train.data.LatentCache, "batch", killed)
    with pytest.raises(Killed):
        finetune(halves)
    monkeypatch.setattr(train.data.LatentCache, "batch", step)
    finetune(halves)
    one, two = (
        load_state(open_checkpoint(tmp_path / run / "model/transformer"), "transformer")
        for run in ("straight", "halves")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Other data under the same name is noticed, and said by what differs.
    (clips / "0.txt").write_text("another caption")
    again = settings(tmp_path, model, sizes=["5x32x32", "5x32x64"])
    preprocess(again)
    with pytest.raises(WanError, match=r"\(\S*data: other captions\)"):
        finetune(halves)
    (clips / "0.txt").write_text("wall 0")
    make_clip(clips / "more.mp4", size=(32, 64), seed=9)
    preprocess(again)
    changes = (
        r"samples: 4 there, 5 now; \S*data: clips: 4 there, 5 now; \S*data: samples by size: 3"
    )
    with pytest.raises(WanError, match=changes):
        finetune(halves)
    data = config.data
    both = replace(data, folder=[*data.folder, str(tmp_path / "other")])
    retimed = replace(
        again, output_dir=both.folder[1], retime=True, sizes=["5x32x32"], max_set_aside=9
    )
    preprocess(retimed)
    with pytest.raises(WanError, match=r"data\.folder: 1 of them there, 2 now"):
        finetune(replace(halves, data=both))
    with pytest.raises(WanError, match=r"other: sizes: \['5x32x32', .* now; .*retime: False there"):
        finetune(replace(halves, data=replace(data, folder=both.folder[1:])))


def test_several_folders_are_one_data_set_if_they_go_together(clips, tmp_path, model):
    for i in range(3):
        make_clip(clips / f"{i}.mp4", caption=f"wall {i}", seed=i)
    preprocess(settings(tmp_path, model))
    for path in clips.iterdir():
        path.unlink()
    make_clip(clips / "a.mp4", caption="a", seed=7)
    make_clip(clips / "wide.mp4", size=(32, 64), caption="wide", seed=8)
    (tmp_path / "prompts.txt").write_text("a prompt")
    other = settings(
        tmp_path,
        model,
        output_dir=str(tmp_path / "other"),
        sizes=["5x32x64", "5x32x32"],
        prompts=str(tmp_path / "prompts.txt"),
    )
    preprocess(other)
    folders = [tmp_path / "data", tmp_path / "other"]
    cache = folder_cache(folders, component_digests(model), [1, 2])
    assert cache.shapes == [(2, 2, 2, 2), (2, 2, 2, 4)]
    assert cache.buckets == [[0, 1, 2, 3], [4]]
    seen = Counter(text for step in range(18) for text in cache.batch(step, 1, seed=0)[1])
    assert seen == {"wall 0": 2, "wall 1": 2, "wall 2": 2, "a": 6, "wide": 6}
    assert len(cache.tokens_of(["wall 0", "wide", "a prompt", ""])) == 4
    digests = {folder_cache(order, None).digest for order in (folders, folders[::-1], folders[0])}
    assert len(digests) == 3
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(model, elsewhere, ignore=shutil.ignore_patterns("vae"))
    export(WanVAE(replace(TINY, z_dim=3)), elsewhere / "vae")
    preprocess(replace(other, checkpoint=str(elsewhere), output_dir=str(tmp_path / "third")))
    with pytest.raises(WanError, match=r"channels of latents: \[2\] and \[3\]; another vae"):
        folder_cache([*folders, tmp_path / "third"], None)


def test_repeats_change_how_often_a_clip_comes_and_nothing_that_is_encoded(
    clips, tmp_path, model, monkeypatch
):
    make_clip(clips / "a.mp4", caption="a")
    make_clip(clips / "b.mp4", caption="b", seed=1)
    preprocess(settings(tmp_path, model))
    digest = folder_cache(tmp_path / "data", None).digest
    rows = [{"video": "a.mp4", "prompt": "a", "repeats": 3}, {"video": "b.mp4", "prompt": "b"}]
    (clips / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(train.preprocess.run, "encode_float16", None)
    preprocess(settings(tmp_path, model, clips=str(clips / "l.jsonl")))
    cache = folder_cache(tmp_path / "data", None)
    assert Counter(cache.batch(0, 8, seed=0)[1]) == Counter(a=6, b=2)
    assert cache.digest != digest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [1]}, r"data.weights=\[1.*\]: need one for each of the 2 folders"),
        ({"weights": [1, 0]}, "data.weights=0.*: must be a number above 0"),
        ({"folder": ["a", "a"]}, "none twice"),
    ],
)
def test_folders_and_weights_that_do_not_fit_are_refused(options, message):
    with pytest.raises(WanError, match=message):
        DataConfig(**{"kind": "folder", "folder": ["a", "b"]} | options).check_source()


def test_folders_are_typed_as_one_or_as_a_list():
    line = ["data.kind=folder", "data.folder=[a,b c]", "data.weights=[3,0.5]"]
    (run,) = compose_runs(LINE, line)
    assert (run.config.data.folder, run.config.data.weights) == (["a", "b c"], [3, 0.5])
    (run,) = compose_runs(LINE, ["data.folder=${runs}/a"])
    assert run.config.data.folder == ["${runs}/a"]

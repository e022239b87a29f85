"""A record makes its video again; and what differs between two videos is named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pipeline import write_models
from test_sample import style

import infer.rerun.__main__ as rerun
import infer.sample.prepare
from configs.cli import USER_ERROR, execute
from infer.diff.__main__ import LINE as DIFF_LINE
from infer.diff.__main__ import main as diff_main
from infer.diff.compare import DIFFER
from infer.sample.__main__ import LINE as SAMPLE_LINE
from infer.sample.__main__ import SampleCommand
from wan.files import read_sealed
from wan.media.video import read_video, write_video

COMMANDS = {
    "sample": (SampleCommand(), SAMPLE_LINE),
    "rerun": (rerun.main, rerun.LINE),
    "diff": (diff_main, DIFF_LINE),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a TI2V base model, a student and a two-expert model, tiny and untrained."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a command in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(command, *tokens):
        main, line = COMMANDS[command]
        code = execute(main, line, "", [str(token) for token in tokens])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def made(run):
    """Make a video: the path of its record."""

    def made(*tokens) -> Path:
        code, out, err = run("sample", *tokens)
        assert code == 0, err
        return Path(out.splitlines()[-1]).with_suffix(".json")

    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory, models):
    """The record of a video, and that of the same request made once more."""
    folder = tmp_path_factory.mktemp("two")
    for _ in range(2):
        tokens = [f"checkpoint={models / 'student'}", f"output_dir={folder}", "prompt=a star"]
        assert execute(*COMMANDS["sample"], "", tokens) == 0
    return sorted(folder.glob("*.json"))


def read(path: Path) -> dict:
    """A record without its digest, which anyone can leave out."""
    return read_sealed(path)


def changed(path: Path, target: Path, **entries) -> Path:
    """A copy of a record with some entries replaced; `...` takes one away."""
    values = read(path) | entries
    target.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))
    return target


# --- again, bit for bit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tokens"),
    [
        ("student", ["prompt=a star", "seed=7", "fps=5"]),
        ("student", ["prompt=a star", "steps=2", "shift=4", "allow_untrained=true"]),
        ("student", ["prompt=  a star ", "compat=fastvideo"]),
        ("student", ["prompt=quotes \"' ${oc.env:HOME}, [x] \x07"]),
        ("base", ["prompt=x", "negative_prompt=y", "guidance_scale=3", "steps=2"]),
        ("base", ["prompt=x", "negative_prompt=", "sampler=dpm++", "steps=3", "shift=2"]),
        ("base", ["prompt=x", "sampler=euler", "sampler.grid=karras", "num_frames=5"]),
        ("base", ["prompt=x", "image={image}", "steps=2", "image_fit=resize"]),
        ("base", ["prompt=x", "image={image}", "steps=2", "height=32", "width=48"]),
        ("base", ["prompt=x", "lora={lora}:0.5,{other}", "lora_strength=0.8"]),
        ("base", ["prompt=x", "attention=top_k", "attention.keep=0.5", "attention.steps=1-"]),
        ("base", ["prompt=x", "sampler=few_step", "timesteps=[900,500]", "deterministic=true"]),
        ("base", ["prompt=x", "dtype=bfloat16", "tile=4", "chunk_latents=1", "seed=-1"]),
        ("experts", ["prompt=x", "guidance_scale=3", "guidance_scale_2=2", "lora_2={lora}"]),
        ("experts", ["prompt_file={jobs}", "num_videos=2"]),
    ],
)
@pytest.mark.parametrize("ending", ["json", "mp4"])
def test_a_video_is_made_again_bit_for_bit(run, made, models, tmp_path, model, tokens, ending):
    """From its record, and from the mp4 alone; what lies elsewhere is given again."""
    Image.effect_noise((60, 40), 90).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "jobs.txt").write_text('x\n{"prompt": "y", "seed": 3, "height": 40, "steps": 2}\n')
    places = {
        "image": tmp_path / "a.png",
        "jobs": tmp_path / "jobs.txt",
        "lora": style(tmp_path / "a.safetensors", 1),
        "other": style(tmp_path / "b.safetensors", 2),
    }
    tokens = [token.format(**places) if token.count("{") and "oc." not in token else token
              for token in tokens]  # fmt: skip
    record = made(f"checkpoint={models / model}", "output_dir=out", *tokens)
    again = [f"checkpoint={models / model}"]
    for token in tokens:
        name, _, value = token.partition("=")
        if name in ("image", "lora", "lora_2"):  # the strengths are the record's
            again.append(f"{name}={value.replace(':0.5', '')}")
    given = record
    if ending == "mp4":
        given = tmp_path / "renamed.mp4"
        shutil.copy(record.with_suffix(".mp4"), given)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    code, out, err = run("rerun", given, "output_dir=out", *again)
    assert code == 0, out + err
    assert out.splitlines()[-1] == "the same, bit for bit"
    new = Path(out.splitlines()[0])
    assert all(path.read_bytes() == content for path, content in before.items())
    assert new not in before
    frames = [read_video(path)[0] for path in (record.with_suffix(".mp4"), new)]
    assert (frames[0] == frames[1]).all()
    assert read(new.with_suffix(".json"))["pixels_sha256"] == read(record)["pixels_sha256"]


def test_the_shipped_miniature_needs_no_other_word(run, made):
    record = made("prompt=a small red circle moving right on a gray background", "seed=5")
    for name in (record, record.with_suffix(".mp4"), record.with_suffix(""), f"record={record}"):
        code, out, _ = run("rerun", name)
        assert (code, out.splitlines()[-1]) == (0, "the same, bit for bit")
    assert len(list(record.parent.glob("*.json"))) == 5


def test_models_and_files_beside_the_record_are_found(run, made, models, tmp_path):
    """A folder that holds all it needs can be moved."""
    shutil.copytree(models / "base", tmp_path / "box/model")
    style(tmp_path / "box/a.safetensors", 1)
    box = tmp_path / "box"
    tokens = [f"checkpoint={box / 'model'}", f"lora={box / 'a.safetensors'}:0.7"]
    record = made(*tokens, "prompt=x", f"output_dir={box}")
    values = read(record)
    for name, value in (("checkpoint", "model"), ("lora", ["a.safetensors:0.7"])):
        values["settings"][name]["value"] = value
    (tmp_path / "box").rename(tmp_path / "moved")
    moved = tmp_path / "moved" / record.name
    moved.write_text(json.dumps(values))
    code, out, err = run("rerun", moved)
    assert code == 0, out + err


def test_another_device_or_dtype_is_a_difference_that_is_said(run, two, models):
    tokens = (two[0], f"checkpoint={models / 'student'}")
    code, out, _ = run("rerun", *tokens, "dtype=bfloat16")
    assert code == DIFFER
    assert out.splitlines()[-1] == "first difference: settings: dtype float32 and bfloat16"
    code, out, _ = run("rerun", *tokens, "offload=stage", "device=cpu")
    assert code == 0
    ends = "the same, bit for bit, though settings differ: offload none and stage"
    assert out.splitlines()[-1] == ends


def test_other_weights_are_named(run, two, models, tmp_path):
    shutil.copytree(models / "student", tmp_path / "other")
    path = tmp_path / "other/transformer/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    code, out, _ = run("rerun", two[0], "checkpoint=other")
    assert code == DIFFER
    assert "first difference: weights: transformer/diffusion_pytorch_model.safetensors" in out


# --- the first thing that differs -----------------------------------------------------------------


def test_the_same_request_made_twice_is_the_same(run, two):
    code, out, _ = run("diff", *two)
    assert (code, out.splitlines()[-1]) == (0, "the same, bit for bit")
    assert "different" not in out
    assert "not compared" not in out


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("seed", 2, "settings: seed 0 and 2"),
        ("prompt", "a \x1b[31mstar", r"settings: prompt a star and a \x1b[31mstar"),
        ("weights_sha256/vae/config.json", "0" * 64, "weights: vae/config.json"),
        ("image_sha256", "0" * 64, "weights: image= only in b"),
        ("environment/packages/torch", "1.0", "versions and hardware: torch"),
        ("environment/threads", 999, "versions and hardware: threads"),
        ("noise_sha256", "0" * 64, "noise: "),
        ("text_sha256/prompt", "0" * 64, "text embeddings: prompt"),
        ("image_latents_sha256", "0" * 64, "text embeddings: the same, but not the first frame"),
        ("steps_sha256/1", "0" * 64, "latents: from step 2 of 3 on"),
        ("latents_sha256", "0" * 64, "latents: after the last step"),
        ("pixels_sha256", "0" * 64, "pixels: "),
    ],
)
def test_the_first_level_that_differs_is_named(run, two, tmp_path, key, value, words):
    """Each time, all that comes after it differs too, and nothing before it."""
    values = read(two[0])
    if "/" in key:
        keys = key.split("/", 1) if key.startswith("weights") else key.split("/")
        inner = values
        for one in keys[:-1]:
            inner = inner[one]
        inner[int(keys[-1]) if isinstance(inner, list) else keys[-1]] = value
    else:
        values[key] = value
    values["pixels_sha256"] = "f" * 64
    (tmp_path / "b.json").write_text(json.dumps(values))
    code, out, _ = run("diff", two[0], "b.json")
    assert code == DIFFER
    assert f"first difference: {words}" in out.splitlines()[-1]
    before = words.partition(":")[0]
    for line in out.splitlines()[2:]:
        if line.startswith(before):
            break
        assert line.endswith("the same"), line


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("seed=1", "seed=2", "settings: seed 1 and 2"),
        ("steps=2", "steps=3", "settings: sampler.steps 2 and 3"),
        ("lora={lora}:0.5", "lora={lora}:0.25", "settings: strength of lora 1 0.5 and 0.25"),
        ("lora={lora}", "lora={copy}", None),
        ("lora={lora}", "lora={other}", "weights: LoRA 1 of transformer"),
        ("image={image}", "image={same}", None),
        ("image={image}", "image={picture}", "weights: image= is another picture"),
        ("prompt=x", "prompt=y", "settings: prompt x and y"),
        ("preflight=never", "preflight=always", None),
    ],
)
def test_two_real_videos(run, made, models, tmp_path, one, other, words):
    """A file under another name is the same file, and another of the same name is not."""
    folders = [tmp_path / "one", tmp_path / "other"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        Image.new("RGB", (32, 32), (99, 9, number)).save(folder / "a.png")
        style(folder / "a.safetensors", number + 1)
    shutil.copy(folders[0] / "a.png", tmp_path / "same.png")
    shutil.copy(folders[0] / "a.safetensors", tmp_path / "copy.safetensors")
    names = {
        "image": folders[0] / "a.png",
        "picture": folders[1] / "a.png",
        "same": tmp_path / "same.png",
        "lora": folders[0] / "a.safetensors",
        "other": folders[1] / "a.safetensors",
        "copy": tmp_path / "copy.safetensors",
    }
    usual = ["prompt=x", f"checkpoint={models / 'base'}"]
    records = []
    for token in (one, other):
        tokens = [u for u in usual if u.partition("=")[0] != token.partition("=")[0]]
        records.append(made(*tokens, token.format(**names)))
    code, out, _ = run("diff", *records)
    assert code == (0 if words is None else DIFFER)
    if words is not None:
        assert f"first difference: {words}" in out
        assert "kept latents" in out


def test_the_distance_of_kept_latents_is_told(run, two, tmp_path, models):
    from safetensors.torch import load_file, save_file

    for record in two:
        shutil.copy(record, tmp_path)
        latents = load_file(record.with_suffix(".latents.safetensors"))["latents"]
        if record == two[1]:
            latents = latents * 1.01
        save_file({"latents": latents}, tmp_path / f"{record.stem}.latents.safetensors")
    _, out, _ = run("diff", *(record.name for record in two))
    assert "kept latents           0.01 apart" in out


# --- what an older version wrote ------------------------------------------------------------------

NEW = ("text_sha256", "steps_sha256", "pixels_sha256", "image_sha256", "image_latents_sha256")


def test_an_older_record_is_compared_by_what_it_holds(run, two, models, tmp_path):
    old = changed(two[0], tmp_path / "old.json", **dict.fromkeys(NEW, ...))
    code, out, _ = run("diff", old, two[1])
    assert code == 0
    assert out.splitlines()[-1] == (
        "the same, bit for bit, up to the latents; pixels were not compared"
    )
    assert "text embeddings        not compared: no sha256 of it in a" in out
    code, out, _ = run("rerun", old, f"checkpoint={models / 'student'}")
    assert code == 0, out
    values = changed(old, tmp_path / "other.json", latents_sha256="0" * 64)
    code, out, _ = run("diff", values, two[1])
    assert code == DIFFER
    assert "first difference: latents: at the last step" in out


def test_without_any_digest_nothing_tells(run, two, tmp_path):
    nothing = dict.fromkeys((*NEW, "noise_sha256", "latents_sha256"), ...)
    old = changed(two[0], tmp_path / "old.json", **nothing)
    code, _, err = run("diff", old, two[1])
    assert code == USER_ERROR
    assert err.startswith("error: nothing tells whether the videos are the same")
    assert err.count("\n") == 1


def test_the_mp4_of_an_older_version_needs_its_record(run, two, tmp_path):
    frames, info = read_video(two[0].with_suffix(".mp4"))
    comment = json.loads(info.metadata["comment"])
    del comment["record"]
    write_video(tmp_path / "old.mp4", frames, 8, {"comment": json.dumps(comment)})
    code, _, err = run("rerun", "old.mp4")
    assert code == USER_ERROR
    assert "give the record that was written beside it" in err


def test_an_interrupted_run_is_made_whole(run, two, models, tmp_path):
    values = {"status": "interrupted", "latents_sha256": None, "pixels_sha256": None, "video": None}
    steps = read(two[0])["steps_sha256"][:1]
    cut = changed(two[0], tmp_path / "cut.json", **values, steps_sha256=steps)
    code, out, err = run("rerun", cut, f"checkpoint={models / 'student'}")
    assert code == USER_ERROR
    assert "its run ended early" in err
    assert read_video(out.splitlines()[0])[0].shape[0] == 9


# --- what is no record, or means harm -------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{}", "not the record of a video (no record_version"),
        (b"[1]", "not an object"),
        (b'{"record_version": 1, "a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", "nested"),
        (b'{"record_version": 2}', "a record of version 2"),
        (b'{"record_version": 1' + b"0" * 50 + b"}", "digits"),
        (b'{"seed": 1, "seed": 2}', "twice"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("command", ["rerun", "diff"])
def test_what_is_no_record_is_one_line(run, two, tmp_path, command, content, words):
    (tmp_path / "x.json").write_bytes(content)
    more = [two[0]] if command == "diff" else []
    code, out, err = run(command, *more, "x.json")
    assert (code, out) == (USER_ERROR, "")
    assert words in err
    assert "x.json" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["seed", "settings", "config", "steps_sha256", "environment"])
@pytest.mark.parametrize("value", [None, "x", 3.5, [[1]], {"a": {"b": [1]}}, True])
def test_an_entry_of_another_kind_is_one_line_or_harmless(run, two, models, tmp_path, name, value):
    changed(two[0], tmp_path / "x.json", **{name: value})
    for tokens in (
        ("rerun", "x.json", f"checkpoint={models / 'student'}"),
        ("diff", two[1], "x.json"),
    ):
        code, _, err = run(*tokens)
        assert code in (0, DIFFER, USER_ERROR)
        assert code != USER_ERROR or err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("height", "32", "height='32': need int"),
        ("num_frames", True, "num_frames=True: need int"),
        ("sampler", {"name": 3}, "sampler.name=3: need str"),
        ("sampler", {"timesteps": ["a"]}, "sampler.timesteps='a': need float"),
        ("sampler", {"steps": 10**9}, "steps="),
        ("image_background", [1, 2, "x"], "image_background='x': need int"),
        ("embed_prompt", "yes", "embed_prompt='yes': need bool"),
        ("attention", {"name": "/etc/passwd"}, "/etc/passwd"),
        ("attention", {"steps": "${oc.env:HOME}"}, "${oc.env:HOME}"),
        ("_target_", "os.system", "_target_: this version has no such option"),
        ("sampler", {"shift": -1}, "shift=-1"),
        ("num_frames", 10**15 + 1, "num_frames"),
    ],
)
def test_options_of_a_record_have_the_type_and_range_of_typed_ones(
    run, two, models, tmp_path, name, value, words
):
    values = read(two[0])
    values["config"][name] = value
    values["settings"].pop(name, None)
    (tmp_path / "x.json").write_text(json.dumps(values))
    code, _, err = run("rerun", "x.json", f"checkpoint={models / 'student'}")
    assert code == USER_ERROR
    assert words in err.splitlines()[-1]
    assert not list((tmp_path / "outputs").glob("*.mp4"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("checkpoint", "{models}/student"),
        ("checkpoint", "../models/student"),
        ("checkpoint", "~/student"),
        ("checkpoint", "link"),
        ("checkpoint", "local/model"),
        ("checkpoint", ""),
        ("checkpoint", 3),
        ("transformer", "/etc"),
        ("vae", "../../etc/passwd"),
        ("tokenizer", "link"),
        ("image", "/etc/passwd"),
        ("image", "someone/picture"),
        ("lora", ["/etc/passwd:0.5"]),
        ("lora", ["https://huggingface.co/a/b/resolve/main/c.safetensors"]),
        ("lora", "/etc/passwd"),
        ("revision", "../../x"),
        ("variant", "/../../../x"),
        ("variant", "*"),
    ],
)
def test_a_record_reads_no_file_outside_its_folder(
    run, two, models, tmp_path, monkeypatch, option, value
):
    opened = []
    monkeypatch.setattr(infer.sample.prepare, "model_folder", lambda *a: opened.append(a))
    folder = tmp_path / "given"
    folder.mkdir()
    (folder / "link").symlink_to(models / "student")
    shutil.copytree(models / "student", tmp_path / "local/model")
    if isinstance(value, str):
        value = value.format(models=models)
    values = read(two[0])
    values["settings"]["checkpoint"]["value"] = "builtin:miniature"
    values["settings"][option]["value"] = value
    (folder / "x.json").write_text(json.dumps(values))
    code, _, err = run("rerun", folder / "x.json")
    assert code == USER_ERROR
    assert not opened
    assert err.count("\n") == 1
    assert option in err
    assert "x.json: " in err


def test_a_record_writes_only_where_it_is_told(run, two, models, tmp_path):
    values = read(two[0])
    values["config"] |= {"output_dir": str(tmp_path / "hidden"), "prompt_file": "/etc/passwd"}
    values["config"] |= {"num_videos": 10**6, "preflight": "never", "verify": True}
    values["video"]["file"] = "../../../evil.mp4"
    (tmp_path / "x.json").write_text(json.dumps(values))
    code, _, _ = run("rerun", "x.json", f"checkpoint={models / 'student'}", "output_dir=told")
    assert code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", "told"}
    assert len(list((tmp_path / "told").glob("*.mp4"))) == 1


def test_what_is_given_again_is_held_against_the_record(run, made, models, tmp_path):
    for name, colour in (("a", 9), ("b", 10)):
        Image.new("RGB", (32, 32), (99, 9, colour)).save(tmp_path / f"{name}.png")
    model = f"checkpoint={models / 'base'}"
    a = style(tmp_path / "a.safetensors", 1)
    record = made("prompt=x", "steps=1", model, f"image={tmp_path / 'a.png'}", f"lora={a}:0.5")
    code, _, err = run("rerun", record, model, "image=b.png", f"lora={a}")
    assert code == USER_ERROR
    assert "image=b.png: not the picture that the video started from" in err
    code, _, err = run("rerun", record, model, "image=a.png", f"lora={a},{a}")
    assert code == USER_ERROR
    assert "lora=: 2 of them, and the video was made with 1" in err
    code, out, _ = run("rerun", record, model, "image=a.png", f"lora={a}:0.6")
    assert code == DIFFER
    assert "settings: strength of lora 1 0.5 and 0.6" in out
    other = style(tmp_path / "b.safetensors", 2)
    code, out, _ = run("rerun", record, model, "image=a.png", f"lora={other}")
    assert code == DIFFER
    assert "first difference: weights: LoRA 1 of transformer" in out
    plain = made("prompt=x", "steps=1", model)
    code, _, err = run("rerun", plain, model, "image=a.png")
    assert code == USER_ERROR
    assert "the video was made without one" in err


@pytest.mark.parametrize("name", ["fifo.json", "folder.json", "none.json", "fifo.mp4", "text.mp4"])
def test_what_is_no_file_is_refused_at_once(run, tmp_path, name):
    for kind in ("json", "mp4"):
        os.mkfifo(tmp_path / f"fifo.{kind}")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "text.mp4").write_text("{}")
    code, _, err = run("rerun", name)
    assert code == USER_ERROR
    assert err.count("\n") == 1
    assert name in err


def test_an_mp4_of_another_program_says_nothing(run, two, tmp_path):
    frames, _ = read_video(two[0].with_suffix(".mp4"))
    for comment, words in (
        (None, "how it was made"),
        ("a film", "not valid JSON"),
        ("{}", "no prompt"),
    ):
        path = tmp_path / "film.mp4"
        write_video(path, frames, 8, {} if comment is None else {"comment": comment})
        code, _, err = run("diff", path, two[0])
        assert code == USER_ERROR
        assert words in err


def test_diff_needs_no_pytorch_where_no_latents_are_kept(two, tmp_path):
    import subprocess
    import sys

    for record in two:
        shutil.copy(record, tmp_path)
    script = (
        "import sys\nfrom configs.cli import execute\nfrom infer.diff.__main__ import LINE, main\n"
        "assert execute(main, LINE, '', sys.argv[1:]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, *(str(tmp_path / record.name) for record in two)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_hashing_copies_what_may_change_afterwards(tmp_path):
    from infer.sample.record import OutputFiles, Story, sha256_of

    story = Story(OutputFiles(tmp_path, "x"), {}, torch.device("cpu"))
    x = torch.arange(6.0)
    expected, found = sha256_of(x), []
    story.hash(found.append, x)
    x.zero_()
    story.finish_hashes()
    assert found == [expected]

"""The front door: any text arrives as typed, any mistake is one line and exit code 2."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from configs.ablation import AblateConfig
from configs.cli import INTERRUPTED, USER_ERROR, execute
from configs.command_line import CommandLine, Shortcut, help_text
from configs.compose import compose_runs
from configs.distillation import DistillConfig
from configs.parity import ParityConfig
from configs.schema import SampleConfig, SamplerConfig, option
from wan.errors import WanError

SAMPLE = CommandLine(
    SampleConfig,
    "sample",
    path_keys=("image", "output_dir"),
    list_keys=("lora",),
    shortcuts={
        "steps": Shortcut("sampler.steps", clears=("sampler.timesteps",)),
        "timesteps": Shortcut("sampler.timesteps", clears=("sampler.steps",)),
        "shift": Shortcut("sampler.shift"),
    },
)

TEXTS = [
    "A cat, running",
    "time: 5 o'clock",
    'she said "go" and went',
    "'",
    '"',
    "[a, b]",
    "{a: b}",
    "(",
    "range(3)",
    "choice(a,b)",
    "a=b=c",
    "=",
    "$HOME and $5",
    "${oc.env:HOME}",
    "${",
    "${x",
    "\\${x} \\ \\\\",
    "42",
    "1e3",
    "null",
    "true",
    "~",
    "  two  spaces  ",
    "two\nlines\r\nand\ttabs",
    "一只猫，在跑",
    "قطة تركض",
    "👩‍👩‍👧 family\u200b",
    "100% & more; #1!",
    "--help",
    "-m",
    "a/b\\c:*?<>|",
    "x" * 20_000,
]


def one(*tokens: str):
    (run,) = compose_runs(SAMPLE, tokens)
    return run


@pytest.mark.parametrize("text", TEXTS)
def test_a_prompt_arrives_exactly_as_typed(text):
    config = one(f"prompt={text}", f"negative_prompt={text}").config
    assert (config.prompt, config.negative_prompt) == (text, text)


@pytest.mark.parametrize("text", ["A cat, running", "range(3)", "${oc.env:HOME}", "[a, b]"])
def test_a_prompt_is_a_single_text_in_a_sweep(text):
    runs = compose_runs(SAMPLE, [f"prompt={text}", "seed=1,2", "steps=4,8"], sweep=True)
    assert [run.config.prompt for run in runs] == [text] * 4
    assert [(r.config.seed, r.config.sampler.steps) for r in runs] == [
        (1, 4),
        (1, 8),
        (2, 4),
        (2, 8),
    ]
    assert runs[1].title == "seed=1, steps=8"


@pytest.mark.parametrize("text", ["1e5", "12e4567", "0012", "1_000", "TRUE", "inf", "-0"])
def test_a_text_that_looks_like_a_number_stays_as_typed(text):
    """A commit, or the name of a branch."""
    assert one(f"revision={text}").config.revision == text
    runs = compose_runs(SAMPLE, [f"revision=a,{text}"], sweep=True)
    assert [run.config.revision for run in runs] == ["a", text]


def test_a_text_survives_a_real_shell_and_process(tmp_path):
    script = tmp_path / "echo.py"
    script.write_text(
        "import json\n"
        "from configs.schema import SampleConfig\n"
        "from configs.cli import run\n"
        "from configs.command_line import CommandLine\n"
        "def main(run):\n"
        "    print(json.dumps(run.config.prompt))\n"
        "run(main, CommandLine(SampleConfig, 'sample'), '')\n"
    )
    text = 'it\'s ${oc.env:HOME}, [1] {2}: "x" = 猫 😀\nnew line'
    done = subprocess.run(
        [sys.executable, script, f"prompt={text}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={"PYTHONPATH": ".", "PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == text


def test_paths_are_literal_and_null_means_none():
    config = one("output_dir=My (x), y=z ${oc.env:HOME}", "image=null", "lora=a[1].safetensors")
    assert config.config.output_dir == "My (x), y=z ${oc.env:HOME}"
    assert config.config.image is None
    assert config.config.lora == ["a[1].safetensors"]


@pytest.mark.parametrize(
    ("tokens", "files"),
    [
        (["lora=a"], ["a"]),
        (["lora=a,b"], ["a", "b"]),
        (["lora=[a:0.8, b]"], ["a:0.8", "b"]),
        (["lora=a:1e-1", "lora=b,c"], ["a:1e-1", "b", "c"]),
        (["lora=My (x) = ${y}/a[1].safetensors"], ["My (x) = ${y}/a[1].safetensors"]),
        (["lora='a, b':0.8,c"], ["a, b:0.8", "c"]),
        (['lora=["a, b", "c"]'], ["a, b", "c"]),
        (["lora=null"], None),
    ],
)
def test_a_list_of_files_is_literal(tokens, files):
    assert one(*tokens).config.lora == files


def test_in_a_sweep_a_comma_separates_lists_of_files():
    tokens = ["lora=null,a:0.8,[a:0.8,b],[c/d.safetensors]"]
    runs = compose_runs(SAMPLE, tokens, sweep=True)
    files = [None, ["a:0.8"], ["a:0.8", "b"], ["c/d.safetensors"]]
    assert [run.config.lora for run in runs] == files
    (same,) = compose_runs(SAMPLE, ["lora=[a,b]"], sweep=True)
    assert same.config.lora == ["a", "b"]


def test_paths_can_be_swept():
    runs = compose_runs(SAMPLE, ["output_dir=a,b"], sweep=True)
    assert [run.config.output_dir for run in runs] == ["a", "b"]


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["prompt="], ["prompt= is empty", 'prompt="a red circle"']),
        (["prompt=   "], ["prompt= is empty"]),
        (["prompt=a", "red", "circle"], ["'red'", "quotes", 'prompt="a red']),
        (["red"], ["'red'", "name=value"]),
        (["prompt=a\udcff"], ["UTF-8"]),
        (["prompt=a", "prompt=b"], ["prompt= is given twice"]),
        (["lora=a,,b"], ["lora=a,,b", "an entry is empty", "lora=a,b"]),
        (["lora_path=a"], ["here it is called lora="]),
        (["prompt=a", "prompt_file=b"], ["only one"]),
        (["stps=3"], ["stps=", "did you mean steps="]),
        (["modle=mini"], ["did you mean model="]),
        (["sampler.stepz=3"], ["did you mean sampler.steps="]),
        (["num_inference_steps=3"], ["here it is called steps="]),
        (["zzzzzz=3"], ["unknown option zzzzzz=", "--help"]),
        (["model=minii"], ["model=minii", "mini", "fastwan_ti2v_5b"]),
        (["sampler=3"], ["sampler=3", "dmd3"]),
        (["steps=three"], ["steps=", "three", "must be an integer"]),
        (["steps=0"], ["steps=0", "between 1 and 1000"]),
        (["steps=1001"], ["steps=1001"]),
        (["steps=4", "timesteps=[1000,500]"], ["steps= and timesteps=", "only one"]),
        (["steps=4", "sampler.steps=4"], ["steps= is given twice"]),
        (["steps=4,8"], ["steps=4,8", "-m"]),
        (["timesteps=[]"], ["timesteps=[]"]),
        (["timesteps=[500,1000]"], ["must go down", "[1000.0, 500.0]"]),
        (["timesteps=[1000,1000]"], ["must go down"]),
        (["timesteps=[1001]"], ["up to 1000"]),
        (["timesteps=[nan]"], ["timesteps=nan", "finite"]),
        (["timesteps=[1000,0]"], ["above 0"]),
        (["timesteps=[a]"], ["timesteps", "must be a list of numbers"]),
        (["seed=-2"], ["seed=-2", "from 0", "-1 draws a random one"]),
        ([f"seed={2**64}"], ["2**64 - 1"]),
        ([f"seed={2**64 - 1}", "num_videos=2"], ["seed + num_videos - 1"]),
        (["seed=abc"], ["seed=", "abc", "must be an integer"]),
        (["seed=1.5"], ["seed=", "1.5", "must be an integer"]),
        (["seed=1", "seed=2"], ["seed= is given twice"]),
        (["height=0"], ["height=0", "at least 1"]),
        (["height={"], ["height=", "cannot read '{'"]),
        (["fps=0"], ["fps=0", "between 1 and 240"]),
        (["fps=nan"], ["fps=nan"]),
        (["guidance_scale=-1"], ["guidance_scale=-1", "at least 0"]),
        (["guidance_scale=nan"], ["guidance_scale=nan"]),
        (["shift=0"], ["shift=0", "above 0"]),
        (["device=gpu"], ["device=gpu", "cuda"]),
        (["dtype=float8"], ["dtype=float8", "bfloat16"]),
        (["offload=all"], ["offload=all", "stage"]),
        (["contact_sheet=maybe"], ["contact_sheet=maybe", "true or false"]),
        (["checkpoint="], ["checkpoint= is empty"]),
        (["tile=9223372036854775808"], ["tile=9223372036854775808", "2**63 - 1"]),
        (["sampler.name=eulr"], ["sampler.name=eulr", "euler"]),
        (["image_fit=resize"], ["image_fit=resize without image= or prompt_file="]),
        (["preview_decoder=a"], ["preview_decoder=a without preview="]),
        (["verify=3"], ["verify=3", "must be true or false"]),
        (["deterministic=-1"], ["deterministic=-1", "true or false, or null"]),
        (["timesteps=[[1000]]"], ["timesteps=[[1000]]", "must be a list of numbers"]),
        (["timesteps=[{a: 1}]"], ["timesteps=", "must be a list of numbers"]),
        (["timesteps.x=1"], ["unknown option timesteps.x=", "did you mean timesteps="]),
        (["sampler=dmd3", "sampler.timesteps.x=1"], ["timesteps.x=1", "--help"]),
        (["output_dir=null"], ["output_dir=null", "must be a text"]),
        (["lora_strength=nan"], ["lora_strength=nan", "finite"]),
        (["seed@x=1"], ["seed@x=", "--help"]),
        (["~seed"], ["'~seed'"]),
        (["~seed=1"], ["cannot be removed"]),
        (["hydra.run.dir=x"], ["output_dir="]),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(tokens, words, capsys):
    def main(run):
        raise AssertionError("must not run")

    assert execute(main, SAMPLE, "", tokens) == USER_ERROR
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--steps=4", "without dashes: steps="), ("--nonsense", "--multirun"), ("-x", "--help")],
)
def test_unknown_flags_are_refused(flag, words, capsys):
    assert execute(lambda run: 0, SAMPLE, "", [flag]) == USER_ERROR
    assert words in capsys.readouterr().err


def test_a_bad_point_stops_a_sweep_before_it_starts(capsys):
    ran = []
    code = execute(lambda run: ran.append(run), SAMPLE, "", ["-m", "steps=4,0", "prompt=x"])
    assert code == USER_ERROR
    assert not ran


def test_a_failing_point_does_not_stop_the_others():
    seen = []

    def main(run):
        seen.append(run.config.seed)
        if run.config.seed == 1:
            raise WanError("no")
        return 0

    assert execute(main, SAMPLE, "", ["-m", "seed=0,1,2", "prompt=x"]) == USER_ERROR
    assert seen == [0, 1, 2]


def test_ctrl_c_ends_a_sweep_with_130(capsys):
    seen = []

    def main(run):
        seen.append(run.config.seed)
        raise KeyboardInterrupt

    assert execute(main, SAMPLE, "", ["-m", "seed=0,1", "prompt=x"]) == INTERRUPTED
    assert seen == [0]
    assert "Traceback" not in capsys.readouterr().err


def test_files_that_cannot_be_read_are_user_errors(capsys):
    def main(run):
        Path("/nonexistent/file").read_text()

    assert execute(main, SAMPLE, "", ["prompt=x"]) == USER_ERROR
    assert capsys.readouterr().err == "error: /nonexistent/file: No such file or directory\n"


@pytest.mark.parametrize("file", ["decoder=nowhere/x", "lora=b,nowhere/x"])
def test_an_error_about_a_file_says_which_option_named_it(file, capsys):
    def main(run):
        raise WanError("nowhere/x: no such file or folder")

    option = file.partition("=")[0]
    assert execute(main, SAMPLE, "", [file]) == USER_ERROR
    assert capsys.readouterr().err == f"error: {option}=nowhere/x: no such file or folder\n"


def test_our_own_bugs_keep_their_traceback():
    def main(run):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        execute(main, SAMPLE, "", ["prompt=x"])


def test_traceback_flag_shows_where_an_error_was_raised():
    with pytest.raises(WanError):
        execute(lambda run: 0, SAMPLE, "", ["steps=0", "--traceback"])


def test_steps_and_timesteps_replace_each_other():
    assert one("sampler=dmd3", "sampler.name=euler", "steps=4").config.sampler == SamplerConfig(
        "euler", steps=4
    )
    sampler = one("timesteps=[1000,600.5]", "sampler.name=few_step").config.sampler
    assert (sampler.steps, sampler.timesteps) == (None, [1000.0, 600.5])


def test_each_value_knows_where_it_comes_from():
    sources = one("prompt=x", "model=wan22_t2v_a14b", "steps=7").sources
    assert sources["prompt"] == "command line"
    assert sources["sampler.steps"] == "command line"
    assert sources["sampler.shift"] == "model=wan22_t2v_a14b"
    assert sources["sampler.name"] == "sampler=unipc40"
    assert sources["dtype"] == "model=wan22_t2v_a14b"  # through the file shared by all releases
    assert sources["seed"] == "default"


def test_help_explains_every_option(capsys):
    assert execute(lambda run: 0, SAMPLE, "What it does.", ["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("What it does.")
    for words in ("prompt=", "steps=", "fastwan_ti2v_5b", "dmd3", "--multirun", "nearest legal"):
        assert words in text


def test_cfg_prints_the_settings_and_stops(capsys):
    def main(run):
        raise AssertionError("must not run")

    assert execute(main, SAMPLE, "", ["prompt=${a: 猫", "seed=3", "--cfg"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["prompt"], shown["seed"]) == ("${a: 猫", 3)


def test_a_schema_without_texts_or_presets_works_too(tmp_path, monkeypatch):
    @dataclass
    class Inner:
        caption: str = option("", "a nested text")

    @dataclass
    class Other:
        seed: int = option(0, "a number")
        inner: Inner = field(default_factory=Inner)
        sizes: list[int] = option([1, 2], "a list")

    (tmp_path / "other.yaml").write_text("sizes: [1, 2]\n")
    monkeypatch.setattr("configs.compose.CONFIG_FOLDER", tmp_path)
    monkeypatch.setattr("configs.command_line.CONFIG_FOLDER", tmp_path)
    line = CommandLine(Other, "other", text_keys=("prompt", "inner.caption"))
    with pytest.raises(WanError, match="unknown option prompt="):
        compose_runs(line, ["prompt=x"])
    (run,) = compose_runs(line, ["inner.caption=${a}, b", "sizes=[3]"])
    assert run.config == Other(0, Inner("${a}, b"), [3])
    assert "[1, 2]" in help_text(line, "", {})


def test_words_may_stand_alone_where_a_command_says_so(tmp_path, monkeypatch):
    @dataclass
    class Two:
        a: str = ""
        b: str = ""

    line = CommandLine(Two, "diff", text_keys=(), path_keys=("a", "b"), words=("a", "b"))
    for tokens in (["x y", "./out=1/z,2"], ["x y", "b=./out=1/z,2"], ["b=./out=1/z,2", "x y"]):
        (found,) = compose_runs(line, tokens)
        assert (found.config.a, found.config.b) == ("x y", "./out=1/z,2"), tokens
    with pytest.raises(WanError, match="'z': one name too many; this command takes 2"):
        compose_runs(line, ["x", "y", "z"])
    with pytest.raises(WanError, match="a= is given twice"):
        compose_runs(line, ["x", "a=y"])
    with pytest.raises(WanError, match="unknown option r="):
        compose_runs(line, ["r=1/x.json"])
    monkeypatch.chdir(tmp_path)
    for folder in ("r=1", "b=1", "progress=1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.json").touch()
    (found,) = compose_runs(line, ["r=1/x.json", "b=1/x.json"])  # the second is an option
    assert (found.config.a, found.config.b) == ("r=1/x.json", "1/x.json")
    with pytest.raises(WanError, match="must be true or false"):
        compose_runs(line, ["progress=1/x.json"])


# --- one spelling in all commands -----------------------------------------------------------------

ABLATE = CommandLine(
    AblateConfig,
    "ablate",
    path_keys=("checkpoint",),
    shortcuts={name: Shortcut(f"grid.{name}") for name in ("attention", "steps")},
)
PARITY = CommandLine(ParityConfig, "parity", path_keys=("checkpoint",))


def test_a_list_needs_no_brackets_and_a_grid_takes_lists():
    for steps in ("steps=4,8", "steps=[4,8]"):
        (run,) = compose_runs(ABLATE, [steps, "attention=spatial", "guidance_scale=1,3"])
        grid = run.config.grid
        assert (grid.steps, grid.attention, grid.guidance_scale) == ([4, 8], ["spatial"], [1, 3])
    (run,) = compose_runs(ABLATE, ["steps=4", "guidance_scale=2"])
    assert (run.config.grid.steps, run.config.guidance_scale) == ([4], 2)
    both = compose_runs(ABLATE, ["steps=4,8"], sweep=True)
    assert [run.config.grid.steps for run in both] == [[4], [8]]


def test_the_name_of_a_model_is_the_same_in_all_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in (SAMPLE, ABLATE, PARITY):
        for name in ("model=mini-teacher", "checkpoint=mini-teacher"):
            (run,) = compose_runs(line, [name])
            assert run.config.checkpoint == "builtin:miniature-teacher"
    (tmp_path / "mini").mkdir()
    (run,) = compose_runs(PARITY, ["checkpoint=mini"])
    assert run.config.checkpoint == "mini"  # a folder of that name is meant
    with pytest.raises(WanError, match="model=nope: no such preset; choose one of fastwan"):
        compose_runs(PARITY, ["model=nope"])


OTHER_WORDS = r"(?i)omegaconf|hydra|ListConfig|DictConfig|Node|interpolation|Union|NoneType"


@pytest.mark.parametrize("kind", ["seed", "sampler.shift", "dtype", "save_latents", "parallel"])
@pytest.mark.parametrize("value", ["x", "[1,x]", "{a: 1}", "null", "${y}", ""])
def test_a_value_of_the_wrong_kind_is_refused_in_our_words(kind, value):
    try:
        compose_runs(SAMPLE, [f"{kind}={value}"])
    except WanError as error:
        assert kind.split(".")[-1] in str(error)  # noqa: PT017
        assert not re.search(OTHER_WORDS, str(error)), error  # noqa: PT017


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["steps=x"], "steps=x: must be an integer, or null"),
        (["steps=[1,2]"], "for several values, one after the other, add -m and write a,b"),
        (["seed=0,1"], "seed=0,1: one value only; add -m to run one after the other"),
        (["timesteps=9,x"], r"timesteps=\[9,x\]: must be a list of numbers, written a,b or"),
        (["parallel=3"], "parallel=3: is a group of options; give one of them, such as parallel."),
        (["seed=${x}"], "stands for nothing here"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(tokens, words):
    with pytest.raises(WanError, match=words):
        compose_runs(SAMPLE, tokens)


def test_what_a_group_would_not_read_is_refused_by_its_own_option():
    line = CommandLine(DistillConfig, "distill")
    for name, needed in {
        "on_policy.steps=3": "on_policy.weight=",
        "gan.host=teacher": "gan.weight=",
        "regression.num_pairs=3": "regression.weight=",
        "scores.clip_above=0.5": "scores.clip_share=",
    }.items():
        with pytest.raises(WanError, match=f"{name} without {needed}: nothing reads it"):
            compose_runs(line, ["method=mini3_dmd", name])
    compose_runs(line, ["on_policy.steps=3", "on_policy.weight=0.5"])
    compose_runs(line, ["method=mini3", "regression.num_pairs=3"])


def test_what_settings_leave_unread_is_refused_with_its_reason():
    line = CommandLine(DistillConfig, "distill")
    alone = "method=mini3_regression"
    for tokens, why in {
        (alone, "scores.shift=2"): "dmd_weight=0",
        (alone, "critic_lr=0.5"): "dmd_weight=0",
        (alone, "student.exits=late"): "dmd_weight=0 and on_policy.weight=0",
        ("method=mini1", "student.deterministic=true"): "one step",
        ("scores.clip_share=0.5", "height=64"): "clips of their own size",
        ("data.passes=3",): "captions without clips",
        ("data.kind=folder", "data.folder=x", "data.num_clips=3"): "data.kind=folder",
        ("machines.num_gpus=64",): None,
    }.items():
        reason = f" with {why}: nothing reads it" if why else " without plan=: nothing"
        with pytest.raises(WanError, match=tokens[-1].split("=")[0] + ".*" + reason):
            compose_runs(line, list(tokens))
    compose_runs(line, [alone, "on_policy.weight=1", "student.exits=late", "scores.phased=false"])
    compose_runs(line, ["scores.clip_share=0.5", "data.passes=3"])
    compose_runs(line, ["plan=true", "machines.num_gpus=64"])


def test_a_list_of_lists_is_typed_as_it_is_written():
    line = CommandLine(DistillConfig, "distill")
    run = compose_runs(line, ["student.more_timesteps=[[1000,900,640],[1000,857,600]]"])[0]
    assert run.config.student.lists[1:] == [[1000, 900, 640], [1000, 857, 600]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"student": {"more_timesteps": [[1000, 757, 522]]}}, "is there already"),
        ({"scores": {"unguided_share": 0.5, "unguided_above": 0.98}}, "no level is above"),
        ({"scores": {"clip_share": 0.5, "clip_above": 0.99}}, "no level is above"),
        ({"scores": {"unguided_share": 0.5, "guidance_scale": 1}}, "without guidance everywhere"),
        ({"scores": {"phased": True}, "student": {"deterministic": True}}, "hides them"),
    ],
)
def test_settings_of_distillation_that_do_nothing_are_refused(options, words):
    line = CommandLine(DistillConfig, "distill")
    tokens = [f"{g}.{name}={value}" for g, one in options.items() for name, value in one.items()]
    with pytest.raises(WanError, match=words):
        compose_runs(line, [token.replace(" ", "") for token in tokens])


@pytest.mark.parametrize("value", ["[1000,900]", "[[1000,x]]", "[[[1000]]]", "[x]", "3"])
def test_what_is_no_list_of_lists_is_refused_by_its_option(value):
    line = CommandLine(DistillConfig, "distill")
    words = r"student\.more_timesteps=.*: must be a list of lists of integers, written \[\[a,b\]"
    with pytest.raises(WanError, match=words):
        compose_runs(line, [f"student.more_timesteps={value}", "batch_size=4"])

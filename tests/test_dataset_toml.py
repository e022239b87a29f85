"""Dataset files of musubi-tuner and diffusion-pipe: every field is used, named, or refused."""

import shutil
from dataclasses import replace

import pytest
from test_clips import make_clip

from configs.data import PreprocessConfig
from train import dataset_toml
from train.clips import CONTROLS, NO_CONTROL, read_caption
from train.dataset_toml import toml_clips
from wan.errors import WanError

CONFIG = PreprocessConfig(sizes=["5x64x64"])
MUSUBI = """
[general]
resolution = [64, 64]
caption_extension = ".caption"
batch_size = 2

[[datasets]]
video_directory = "videos"
cache_directory = "cache"
target_frames = [1, 5]
num_repeats = 3
"""
PIPE = """
resolutions = [64]
frame_buckets = [5]
[[directory]]
path = "videos"
num_repeats = 2
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "videos" / "masks").mkdir(parents=True)
    path = make_clip(tmp_path / "videos" / "a.mp4", caption="from a text file")
    path.with_suffix(".caption").write_text("a fox")
    make_clip(tmp_path / "videos" / "masks" / "a.mp4")
    (tmp_path / "l.jsonl").write_text(
        '{"video_path": "videos/a.mp4", "caption": "a cup", "num_repeats": 2}'
    )
    return tmp_path


def clips_of(folder, text, **options):
    (folder / "dataset.toml").write_text(text)
    return toml_clips(folder / "dataset.toml", replace(CONFIG, **options))


def test_a_musubi_file_gives_its_clips_captions_and_repeats(folder, capsys):
    more = '[[datasets]]\nvideo_jsonl_file = "l.jsonl"\ntarget_frames = [5]\nnum_repeats = 2\n'
    found = clips_of(folder, MUSUBI + more)
    seen = [(clip.name, clip.path, read_caption(clip), clip.repeats) for clip in found]
    path = folder / "videos/a.mp4"
    assert seen == [("videos/a.mp4", path, "a fox", 3), ("l.jsonl/videos/a.mp4", path, "a cup", 4)]
    said = capsys.readouterr().err
    for note in ("batch_size: it is batch_size= of", "cache_directory: latents", "1 is left out"):
        assert note in said


def test_a_diffusion_pipe_file_gives_its_clips_captions_and_repeats(folder, monkeypatch):
    (clip,) = clips_of(folder, PIPE)
    assert (clip.name, read_caption(clip), clip.repeats) == ("videos/a.mp4", "from a text file", 2)
    assert (
        len(clips_of(folder, 'size_buckets = [[64, 64, 5]]\n[[directory]]\npath = "videos"')) == 1
    )
    (folder / "videos/a.txt").unlink()
    (folder / "videos/captions.json").write_text('{"a.mp4": ["one", "two"]}')
    assert [clip.caption for clip in clips_of(folder, PIPE)] == ["one", "two"]
    monkeypatch.chdir(folder)  # paths may be relative to where the command runs, too
    (folder / "files").mkdir()
    assert len(clips_of(folder / "files", PIPE)) == 2


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"target_frames = [1, 5]": "target_frames = [9]"}, {}, r"give sizes=\[9x64x64\] \("),
        ({"[64, 64]": "[960, 544]"}, {}, r"give sizes=\[5x544x960\]"),
        (
            {"[1, 5]": '[5, 9]\nframe_extraction = "slide"\nframe_stride = 2'},
            {},
            r"give sizes=\[5x64x64,9x64x64\] frames=slide frame_stride=2 \(",
        ),
        (
            {
                "[1, 5]": '[5]\nframe_extraction = "chunk"\nenable_bucket = true\n'
                "bucket_no_upscale = true"
            },
            {},
            r"give frames=chunk max_upscale=1 ",
        ),
        ({"[1, 5]": "[1]"}, {}, r"target_frames=\[1\]: a video never becomes a picture"),
        ({"[1, 5]": '[5]\nframe_extraction = "full"'}, {}, "full.* has head, .*frames=head take"),
        ({}, {"frames": "chunk"}, "give frames=head"),
    ],
)
def test_other_sizes_or_frames_than_the_options_are_refused_with_those_that_do(
    folder, changes, options, message
):
    text = MUSUBI
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(WanError, match=message):
        clips_of(folder, text, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MUSUBI + 'control_directory = "c"', "control_directory='c': there is no training with"),
        (MUSUBI + "fp_1f_target_index = 9", "1: fp_1f_target_index=9: it is for another model"),
        (MUSUBI + "keep_tokens = 1", "keep_tokens: not a known field; known are resolution"),
        (MUSUBI + 'image_directory = "i"', "need one of video_directory, .*, not 2 of them"),
        (MUSUBI + "[extra]", "extra: not a known table"),
        (MUSUBI.replace("num_repeats = 3", "num_repeats = 0"), "num_repeats=0: must be a whole"),
        (MUSUBI.replace("num_repeats = 3", 'num_repeats = "3"'), "must be of type int"),
        (MUSUBI.replace('"videos"', '"nowhere"'), r"1: nowhere: no such folder or list"),
        (MUSUBI.replace("[64, 64]", "[64]"), "need a list of 2 whole numbers"),
        (
            MUSUBI + '[[datasets]]\nvideo_directory = "b"\ntarget_frames = [9]',
            r"1 and \[\[datasets\]\] 2 ask for different lengths \(\(5,\) and \(9,\)\); make a",
        ),
        (PIPE + 'mask_path = "m"', "mask_path='m': there is no training with"),
        (PIPE + "shuffle_tags = true", "shuffle_tags=True: captions are taken as they are"),
        (PIPE.replace("= 2", "= 0.5"), r"num_repeats=0.5: must be .*data\.weights="),
        (PIPE.replace("[64]", "[64, 128]"), r"resolutions=.*goes to one size here"),
        (PIPE.replace("frame", "enable_ar_bucket = true\nframe"), "needs min_ar, max_ar, num_ar"),
        ("a = 1", "neither musubi-tuner's"),
        ("a = ", "not valid TOML"),
        ("a = " + "[" * 5000, "not valid TOML"),
        ("datasets = 3", r"write it as \[\[datasets\]\]"),
    ],
)
def test_what_is_not_known_or_not_done_is_refused_by_name(folder, text, message):
    with pytest.raises(WanError, match=message):
        clips_of(folder, text)


def test_aspect_ratios_of_diffusion_pipe_are_asked_for_and_missed(folder, capsys):
    ratios = "enable_ar_bucket = true\nmin_ar = 0.5\nmax_ar = 2.0\nnum_ar_buckets = 3\n"
    with pytest.raises(WanError, match=r"give sizes=\[5x352x192,5x256x256,5x192x352\]"):
        clips_of(folder, ratios + PIPE.replace("[64]", "[256]"))
    assert len(clips_of(folder, ratios + PIPE)) == 1
    assert "no size in sizes= is 0.50, 2.00 times as wide as high" in capsys.readouterr().err


def test_clips_of_folders_with_one_name_have_names_of_their_own(folder):
    text = PIPE
    for place in ("cats/videos", "dogs/videos"):
        shutil.copytree(folder / "videos", folder / place)
        text += f'[[directory]]\npath = "{place}"\n'
    names = [clip.name for clip in clips_of(folder, text)]
    own = folder.name + "/videos/a.mp4"
    assert names == [own, "cats/videos/a.mp4", "dogs/videos/a.mp4"]


def test_lists_refuse_the_control_fields_that_dataset_files_do():
    fields = dataset_toml.MUSUBI | dataset_toml.PIPE
    assert set(CONTROLS) == {name for name in fields if fields[name].refused == NO_CONTROL}

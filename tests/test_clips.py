"""Real encoded clips, sound and damaged: what is read of them, and why others are refused."""

import json
import os
import unicodedata
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from train.clips import (
    CONTROLS,
    Clip,
    ClipRules,
    best_size,
    fit_frame,
    judge_clip,
    list_clips,
    read_caption,
    read_samples,
)
from wan.errors import WanError
from wan.media.video import write_video


def make_clip(path, frames=5, fps=8.0, size=(32, 32), caption="a gray wall", seed=0):
    """Noise over two halves, so that compressed frames are large enough to be damaged."""
    noise = np.random.default_rng(seed).integers(0, 60, (frames, *size, 3), dtype=np.uint8)
    noise[:, :, size[1] // 2 :] += 150
    write_video(path, noise, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    return folder


def rules(**changes) -> ClipRules:
    return replace(ClipRules([(5, 32, 32)], 8.0, False, 0.5, 1.5), **changes)


def read_clip(clip, rules, facts):
    """The first sample of a clip."""
    return next(read_samples(clip, judge_clip(clip, rules, facts), facts))


def damage(path, what):
    """Make a sound clip a damaged one."""
    data = bytearray(path.read_bytes())
    body = data.find(b"mdat") + 4
    if what == "truncated":
        data = data[: body + (len(data) - body) // 2]
    elif what == "header cut off":
        data = data[:200]
    elif what == "empty":
        data = bytearray()
    elif what == "flipped bits":
        start = body + (len(data) - body) // 2
        data[start : start + 400] = bytes(b ^ 0x5A for b in data[start : start + 400])
    elif what == "rotated":
        one, zero = (1 << 16).to_bytes(4, "big"), bytes(4)
        upright = one + zero * 3 + one + zero * 3 + (1 << 30).to_bytes(4, "big")
        turned = zero + one + zero + (-(1 << 16)).to_bytes(4, "big", signed=True) + zero * 4
        place = data.rfind(upright)  # the track's; the film's comes first
        data[place : place + 36] = turned + upright[-4:]
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("truncated", "damaged"),
        ("header cut off", "damaged|no pictures"),
        ("empty", "damaged"),
        ("flipped bits", "damaged: \\d+ of 12 frames|Invalid data"),
        ("rotated", "turn it by"),
    ],
)
def test_damaged_clips_are_refused_with_a_reason(clips, what, reason):
    path = make_clip(clips / "a.mp4", frames=12, size=(64, 64))
    (clip,) = list_clips(clips)
    read_clip(clip, rules(), {})  # sound before
    damage(path, what)
    facts: dict = {}
    with pytest.raises(WanError, match=reason):
        read_clip(clip, rules(), facts)
    if what in ("truncated", "flipped bits"):  # its header can be read
        assert facts["declared_frames"] == 12


def test_a_file_that_ends_between_frames_is_told_by_its_header(clips):
    """Here every frame that is left decodes well."""
    path = make_clip(clips / "a.mp4", frames=12, size=(64, 64))
    with av.open(str(path)) as container:
        sizes = [packet.size for packet in container.demux(video=0) if packet.size]
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"mdat") + 4 + sum(sizes[:9])])
    facts: dict = {}
    with pytest.raises(WanError, match=r"header says 12 frames, [89] could be decoded"):
        read_clip(list_clips(clips)[0], rules(), facts)
    assert facts["declared_frames"] == 12


@pytest.mark.parametrize(
    ("clip", "reason"),
    [
        ({"frames": 3}, "5x32x32: has 3 frames"),
        ({"fps": 25.0}, "25 frames per second, not fps=8"),
        ({"fps": 4.0}, "4 frames per second, fewer than fps=8"),
        ({"size": (32, 128)}, "loses 75% of the picture"),
        ({"size": (16, 16)}, "enlarged 2.00 times"),
    ],
)
def test_sound_clips_that_do_not_fit_are_refused_with_a_reason(clips, clip, reason):
    make_clip(clips / "a.mp4", **clip)
    with pytest.raises(WanError, match=reason):
        read_clip(list_clips(clips)[0], rules(), {})


def write_with(path, times, color_trc=1, pixel_shape=1, sound=0, **options):
    """Frames at given times, in units of a 64th of a second, and seconds of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"bf": "0", **options})
        stream.height = stream.width = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 64)
        stream.codec_context.color_trc = color_trc
        stream.codec_context.sample_aspect_ratio = Fraction(pixel_shape)
        silence = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        noise = np.random.default_rng(0).integers(0, 200, (32, 32, 3), dtype=np.uint8)
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.roll(noise, time, 0), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 64)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if silence is not None:
            samples = np.zeros((1, 8000 * sound), np.int16)
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            frame.sample_rate = 8000
            container.mux(silence.encode(frame))


def test_pictures_that_change_size_midway_are_refused(clips):
    path = clips / "a.mp4"
    parts = []
    for size in (32, 64):
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=8, options={"bf": "0"})
            stream.height = stream.width = size
            stream.pix_fmt = "yuv420p"
            for _ in range(3):
                pixels = np.full((size, size, 3), 90, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    with pytest.raises(WanError, match="change size midway \\(32x32, 64x64\\)"):
        read_clip(list_clips(clips)[0], rules(), {})


def test_uneven_times_and_hdr_are_refused(clips):
    write_with(clips / "a.mp4", [0, 8, 16, 24, 32, 40])
    (clip,) = list_clips(clips)
    read_clip(clip, rules(), {})
    write_with(clips / "a.mp4", [0, 8, 9, 10, 32, 40])
    with pytest.raises(WanError, match="uneven times"):
        read_clip(clip, rules(), {})
    write_with(clips / "a.mp4", [0, 8, 16, 24, 32, 40], color_trc=16)
    with pytest.raises(WanError, match="HDR"):
        read_clip(clip, rules(), {})


def test_a_file_without_a_number_of_frames_is_told_to_be_cut_short_by_its_duration(clips):
    path = clips / "a.mkv"
    write_with(path, range(0, 96, 8), sound=4)
    read_clip(list_clips(clips)[0], rules(), {})  # sound may go on without pictures
    write_with(path, range(0, 96, 8))
    facts: dict = {}
    read_clip(list_clips(clips)[0], rules(), facts)
    assert (facts["declared_frames"], facts["decoded_frames"]) == (0, 12)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(WanError, match=r"damaged: \d could be decoded, which end 0\.\d+ seconds"):
        read_clip(list_clips(clips)[0], rules(), {})


def test_a_clip_cut_without_encoding_is_refused_as_that(clips, tmp_path):
    """The frames before its start are in the file, and an edit list hides them."""
    write_with(tmp_path / "long.mp4", range(0, 96, 8))
    with (
        av.open(str(tmp_path / "long.mp4")) as found,
        av.open(str(clips / "a.mp4"), "w") as container,
    ):
        stream = container.add_stream_from_template(found.streams.video[0])
        for packet in found.demux(video=0):
            if packet.size:
                packet.pts, packet.dts = (
                    packet.pts - 4 * packet.duration,
                    packet.dts - 4 * packet.duration,
                )
                packet.stream = stream
                container.mux(packet)
    with pytest.raises(WanError, match=r"^its header says 12 frames, 8 .*-c copy"):
        read_clip(list_clips(clips)[0], rules(), {})


def test_stretched_and_interlaced_clips_are_refused_with_the_way_to_convert_them(clips):
    times = range(0, 48, 8)
    write_with(clips / "a.mp4", times, pixel_shape="4/3")
    with pytest.raises(WanError, match=r"pixels are 4/3 times as wide.*setsar"):
        read_clip(list_clips(clips)[0], rules(), {})
    write_with(clips / "a.mp4", times, flags="+ilme+ildct")
    with pytest.raises(WanError, match=r"interlaced.*bwdif"):
        read_clip(list_clips(clips)[0], rules(), {})
    write_with(clips / "a.mp4", times, pixel_shape="1280/1281")  # as even widths leave them
    assert read_clip(list_clips(clips)[0], rules(), {}).shape == (3, 5, 32, 32)


def test_a_last_frame_that_is_held_is_not_missing(clips):
    with av.open(str(clips / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.height = stream.width = 32
        packets = []
        for i in range(6):
            frame = av.VideoFrame(32, 32, "yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 8)
            packets += stream.encode(frame)
        packets[-1].duration = 8
        container.mux(packets)
    facts: dict = {}
    read_clip(list_clips(clips)[0], rules(), facts)
    assert (facts["declared_frames"], facts["decoded_frames"], facts["fps"]) == (0, 6, 8)


def test_retiming_takes_the_nearest_frames_and_says_so(clips):
    levels = np.arange(14, dtype=np.uint8)[:, None, None, None] * 16
    write_video(clips / "a.mp4", np.broadcast_to(levels, (14, 32, 32, 3)).copy(), 24)
    facts: dict = {}
    video = read_clip(list_clips(clips)[0], rules(retime=True), facts)
    taken = ((video.mean((0, 2, 3)) + 1) * 127.5 / 16).round().int().tolist()
    assert taken == [0, 3, 6, 9, 12]
    assert (facts["fps"], facts["retimed_to"], facts["decoded_frames"]) == (24, 8.0, 14)


FRAMES_OF_A_CLIP = [
    ({"frames": "head"}, [0]),
    ({"frames": "chunk"}, [0, 5, 10]),
    ({"frames": "slide", "frame_stride": 4}, [0, 4, 8, 12]),
    ({"frames": "slide", "frame_stride": 20}, [0]),
    ({"frames": "uniform", "frame_samples": 3}, [0, 6, 12]),
    ({"frames": "uniform", "frame_samples": 99}, list(range(13))),
]


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize(("how", "starts"), FRAMES_OF_A_CLIP)
def test_samples_of_a_clip_start_where_the_option_says(clips, how, starts, step):
    """17 frames at the rate of training, every `step`th of the file's; each has its own level."""
    count = 16 * step + 1
    levels = np.linspace(0, 240, count).astype(np.uint8)[:, None, None, None]
    write_video(clips / "a.mp4", np.broadcast_to(levels, (count, 32, 32, 3)).copy(), 8 * step)
    (clip,) = list_clips(clips)
    facts: dict = {}
    samples = judge_clip(clip, rules(retime=True, **how), facts)
    expected = [[step * (start + i) for i in range(5)] for start in starts]
    assert samples == expected
    for part in filter(None, (samples, samples[1::2])):
        for numbers, video in zip(part, read_samples(clip, part, facts), strict=True):
            seen = (video.mean((0, 2, 3)) + 1) * 127.5
            assert np.abs(seen.numpy() - levels[numbers].ravel()).max() < 2


@pytest.mark.parametrize("frames", [2, 3])
def test_what_retiming_leaves_of_a_video_is_no_picture(clips, frames):
    make_clip(clips / "a.mp4", frames=frames, fps=24)
    (clip,) = list_clips(clips)
    both = rules(sizes=[(5, 32, 32), (1, 32, 32)], retime=True)
    with pytest.raises(WanError, match="5x32x32: has 1 frames at 8 fps; 1x32x32: is for pictures"):
        judge_clip(clip, both, {})


def test_a_file_that_changes_between_judging_and_reading_is_an_error(clips):
    path = make_clip(clips / "a.mp4", frames=12)
    (clip,) = list_clips(clips)
    facts: dict = {}
    samples = judge_clip(clip, rules(frames="chunk"), facts)
    make_clip(path, frames=7)
    with pytest.raises(WanError, match="was changed while it was read"):
        list(read_samples(clip, samples, facts))


def test_a_crop_keeps_the_centre(clips):
    make_clip(clips / "a.mp4", size=(64, 96))
    facts: dict = {}
    video = read_clip(list_clips(clips)[0], rules(), facts)
    assert video.shape == (3, 5, 32, 32)
    assert facts["crop"] == [0, 16, 64, 64]
    assert video[..., :12].mean() < video[..., -12:].mean() - 0.3  # both halves are in it
    assert fit_frame(np.zeros((8, 8, 3), np.uint8), [0, 0, 8, 8], 4, 4).eq(-1).all()


def test_a_clip_goes_to_the_size_that_keeps_most_of_it():
    wide, tall, longer, image = (5, 32, 64), (5, 64, 32), (9, 32, 64), (1, 64, 64)
    every = rules(sizes=[wide, tall, longer, image])
    assert best_size((5, 36, 64), every, {}) == wide
    assert best_size((9, 36, 64), every, {}) == longer
    assert best_size((8, 100, 60), every, {}) == tall
    assert best_size((1, 70, 70), every, {}) == image
    assert best_size((9, 36, 64), rules(sizes=[wide, (5, 16, 32)]), {}) == wide


@pytest.mark.parametrize(
    ("height", "width", "sizes", "best"),
    [
        (1080, 1920, ["480x832", "832x480", "640x640"], "480x832"),  # not the most pixels
        (1920, 1080, ["480x832", "832x480", "640x640"], "832x480"),
        (1440, 1920, ["480x832", "832x480", "640x640"], "480x832"),
        (1000, 1000, ["480x832", "832x480", "640x640"], "640x640"),
        (1080, 1920, ["480x832", "704x1280"], "704x1280"),  # 97.5 and 97.8 % of the picture
        (480, 848, ["704x1280", "480x832"], "480x832"),
        (700, 700, ["512x512", "1024x1024"], "512x512"),  # 1.37 times smaller, 1.46 times larger
        (750, 750, ["512x512", "1024x1024"], "1024x1024"),
    ],
)
def test_of_sizes_the_picture_counts_first_then_the_nearest_in_pixels(height, width, sizes, best):
    parsed = [(5, *map(int, size.split("x"))) for size in sizes]
    facts: dict = {}
    for order in (parsed, parsed[::-1]):
        found = best_size((5, height, width), rules(sizes=order), facts)
        assert "x".join(map(str, found[1:])) == best
    kept = facts["crop"][2] * facts["crop"][3] / (height * width)
    assert facts["cropped_share"] == pytest.approx(1 - kept, abs=1e-4)


def test_an_image_is_a_clip_of_one_frame(clips):
    pixels = np.full((32, 32, 3), 51, np.uint8)
    Image.fromarray(pixels).save(clips / "a.png")
    (clip,) = list_clips(clips)
    video = read_clip(clip, rules(sizes=[(5, 32, 32), (1, 32, 32)]), {})
    torch.testing.assert_close(video, torch.full((3, 1, 32, 32), 51 / 127.5 - 1))
    with pytest.raises(WanError, match="has 1 frames"):
        read_clip(clip, rules(), {})
    make_clip(clips / "b.mp4")
    with pytest.raises(WanError, match="1x32x32: is for pictures"):
        read_clip(list_clips(clips)[1], rules(sizes=[(1, 32, 32)]), {})


CODECS = {"webm": ("libvpx-vp9", "yuva420p"), "mov": ("prores_ks", "yuva444p10le")}


def write_transparent(path, alpha):
    """Five frames, or one: a wall of (200, 100, 50) whose upper half has some opacity."""
    pixels = np.empty((32, 32, 4), np.uint8)
    pixels[...], pixels[:16, :, 3] = (200, 100, 50, 255), alpha
    if path.suffix[1:] in CODECS:
        codec, pixel_format = CODECS[path.suffix[1:]]
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=8)
            stream.height = stream.width = 32
            stream.pix_fmt = pixel_format
            for i in range(5):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
                frame.pts, frame.time_base = i, Fraction(1, 8)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return
    frames = [Image.fromarray(pixels) for _ in range(5)]
    for i, frame in enumerate(frames):  # a GIF leaves out frames that are as the one before
        frame.putpixel((i, 31), (255, 255, 255, 255))
    animated = {"save_all": True, "append_images": frames[1:], "duration": 125, "disposal": 2}
    frames[0].save(path, **(animated if path.stem == "animated" else {}))


@pytest.mark.parametrize("name", ["a.webm", "a.mov", "animated.gif", "a.gif", "a.png", "a.webp"])
def test_transparency_is_one_rule_for_videos_and_pictures(clips, name):
    path = clips / name
    path.with_suffix(".txt").write_text("a wall")
    length = 5 if path.suffix in (".webm", ".mov") or path.stem == "animated" else 1
    every = rules(sizes=[(length, 32, 32)], fps=8.3 if length > 1 and name.endswith("gif") else 8.0)
    write_transparent(path, 0)
    (clip,) = list_clips(clips)
    (clips / "l.csv").write_text(f"video,prompt\n{name},a wall\n")
    (listed,) = list_clips(clips / "l.csv")
    assert clip.path == listed.path
    with pytest.raises(WanError) as refused:
        judge_clip(clip, every, {})
    text = refused.value.on_command_line
    assert "has transparent pixels; say what lies behind them, such as white with " in text
    assert "image_background=[255,255,255], or save it without transparency" in text
    behind = replace(every, image_background=[0, 0, 255])
    facts: dict = {}
    (video,) = read_samples(clip, judge_clip(clip, behind, facts), facts, [0, 0, 255])
    assert video.shape[1] == length
    shown = (video[:, 0, 4, 16] + 1) * 127.5, (video[:, -1, 28, 16] + 1) * 127.5
    for seen, colour in zip(shown, [(0, 0, 255), (200, 100, 50)], strict=True):
        assert (seen - torch.tensor(colour)).abs().max() < 12
    write_transparent(path, 255)
    for rule in (every, behind):
        opaque = read_clip(clip, rule, {})
        assert ((opaque[:, 0, 4, 16] + 1) * 127.5 - torch.tensor([200, 100, 50])).abs().max() < 12


def test_captions_come_from_text_files_or_a_list(clips, tmp_path):
    make_clip(clips / "b.mp4", caption="  a wall \n")
    make_clip(clips / "a.mp4", caption=None)
    assert [clip.name for clip in list_clips(clips)] == ["a.mp4", "b.mp4"]
    (tmp_path / "l.jsonl").write_text('\n{"video": "clips/b.mp4", "prompt": "${oc.env:HOME}"}\n')
    (tmp_path / "l.csv").write_text('video,prompt\nclips/b.mp4,"one, two\nthree"\n')
    (clip,) = list_clips(tmp_path / "l.jsonl")
    assert (clip.path, clip.caption) == (tmp_path / "clips/b.mp4", "${oc.env:HOME}")
    assert list_clips(tmp_path / "l.csv")[0].caption == "one, two\nthree"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.jsonl", '{"video": "a.mp4", "prompt": "a fox"}'),
        ("l.jsonl", '{"video_path": "a.mp4", "caption": "a fox"}'),
        ("l.jsonl", '{"image_path": "a.mp4", "caption": "a fox"}'),
        ("l.csv", "video_path,caption\na.mp4,a fox"),
        ("metadata.csv", "file_name,text\na.mp4,a fox"),
        ("metadata.csv", "file_name,prompt\na.mp4,a fox"),
        ("metadata.jsonl", '{"file_name": "a.mp4", "text": "a fox"}'),
        ("videos2caption.json", '[{"path": "a.mp4", "cap": ["a fox"], "fps": 8.0}]'),
        ("videos2caption.json", '[{"path": "a.mp4", "cap": "a fox"}]'),
        ("captions.json", '{"a.mp4": ["a fox"]}'),
    ],
)
@pytest.mark.parametrize("where", [".", "videos"])
def test_lists_of_other_trainers_are_read(tmp_path, name, text, where):
    (tmp_path / "videos").mkdir()
    path = make_clip(tmp_path / where / "a.mp4", caption=None)
    (tmp_path / name).write_text(text)
    sources = [tmp_path / name] + [tmp_path] * (not name.startswith("l."))
    for source in sources:
        (clip,) = list_clips(source)
        assert (clip.name, clip.path, read_caption(clip)) == ("a.mp4", path, "a fox")


@pytest.mark.parametrize("field", [*CONTROLS, "control_path_0"])
def test_control_clips_and_masks_in_a_list_are_refused_by_name(tmp_path, field):
    row = {"video_path": "a.mp4", "caption": "a fox", "author": "me"}
    (tmp_path / "l.jsonl").write_text(json.dumps(row | {field: None}))
    assert len(list_clips(tmp_path / "l.jsonl")) == 1
    (tmp_path / "l.jsonl").write_text(json.dumps(row | {field: "b.mp4"}))
    with pytest.raises(WanError, match=f"line 1: {field}='b.mp4': there is no training with"):
        list_clips(tmp_path / "l.jsonl")


def test_a_clip_with_several_captions_comes_with_each(tmp_path):
    (tmp_path / "l.json").write_text('[{"path": "a.mp4", "cap": ["one", "two"]}]')
    assert [clip.caption for clip in list_clips(tmp_path / "l.json")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "text", "repeats"),
    [
        ("l.jsonl", '{"video": "a.mp4", "prompt": "x", "repeats": 3}', 3),
        ("l.jsonl", '{"video_path": "a.mp4", "caption": "x", "num_repeats": 2}', 2),
        ("l.csv", "video,prompt,repeats\na.mp4,x,4\n", 4),
        ("l.csv", "video,prompt,repeats\na.mp4,x,\n", 1),
        ("l.csv", "video,prompt,repeats\na.mp4,x,0.5\n", "line 2: repeats='0.5': must be a whole"),
        (
            "l.jsonl",
            '{"video": "a.mp4", "prompt": "x", "repeats": 0}',
            "repeats=0: must be a whole",
        ),
        ("l.jsonl", '{"video": "a.mp4", "repeats": 1, "num_repeats": 2}', "are the same; give one"),
    ],
)
def test_a_list_may_say_how_often_a_clip_comes(tmp_path, name, text, repeats):
    (tmp_path / name).write_text(text)
    if isinstance(repeats, int):
        assert [clip.repeats for clip in list_clips(tmp_path / name)] == [repeats]
    else:
        with pytest.raises(WanError, match=repeats):
            list_clips(tmp_path / name)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_match_in_either_unicode_form(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    there, written = (unicodedata.normalize(f, "d\u00e9j\u00e0/caf\u00e9") for f in (form, other))
    assert there != written
    path = tmp_path / f"{there}.mp4"
    path.parent.mkdir()
    make_clip(path, caption=None)
    (tmp_path / "l.jsonl").write_text(json.dumps({"video": f"{written}.mp4", "prompt": "x"}))
    assert list_clips(tmp_path / "l.jsonl")[0].path == path
    text = path.with_name(f"{written.split('/')[1]}.txt")
    text.write_text("a cup")
    (clip,) = list_clips(path.parent)
    assert (clip.path, read_caption(clip)) == (path, "a cup")


def test_a_folder_is_read_by_the_list_in_it_if_it_has_no_captions(clips, capsys):
    make_clip(clips / "a.mp4", caption=None)
    make_clip(clips / "b.mp4", caption=None)
    (clips / "metadata.csv").write_text("file_name,text\na.mp4,a fox\n")
    assert [clip.caption for clip in list_clips(clips)] == ["a fox"]
    said = capsys.readouterr().err
    assert "read by its metadata.csv" in said
    assert "1 left out, not in metadata.csv: 'b.mp4'" in said
    (clips / "metadata.jsonl").write_text('{"file_name": "b.mp4", "text": "a cup"}')
    with pytest.raises(WanError, match=r"holds metadata.jsonl and metadata.csv; name the one"):
        list_clips(clips)
    (clips / "b.txt").write_text("a cup")
    assert [clip.name for clip in list_clips(clips)] == ["a.mp4", "b.mp4"]
    assert "2 left out, neither clip nor a clip's caption" in capsys.readouterr().err


def test_what_a_folder_has_beside_clips_is_named_and_links_to_folders_are_refused(clips, capsys):
    make_clip(clips / "a.mp4")
    for name in ("b.mpg", "b.txt", "lost.txt", ".hidden"):
        (clips / name).touch()
    assert [clip.name for clip in list_clips(clips)] == ["a.mp4"]
    said = capsys.readouterr().err
    assert "3 left out" in said
    assert said.endswith("'b.mpg', 'b.txt', 'lost.txt'\n")
    (clips / "more").symlink_to(clips.parent)
    with pytest.raises(WanError, match="more is a link to a folder"):
        list_clips(clips)


def test_a_file_name_or_caption_that_no_report_can_hold_is_refused_early(clips, tmp_path):
    os.rename(make_clip(clips / "a.mp4"), bytes(clips) + b"/caf\xe9.mp4")
    with pytest.raises(WanError, match=r"file name 'caf.udce9.mp4'=: the text is not valid UTF-8"):
        list_clips(clips)
    with pytest.raises(WanError, match="prompt=: the text is not valid UTF-8"):
        read_caption(Clip("a.mp4", clips / "a.mp4", "a fox \ud83d"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("l.jsonl", "not json", "line 1: not valid JSON"),
        ("l.jsonl", '\n{"prompt": "x"}', "line 2: need video and prompt"),
        ("l.csv", "file,text\na.mp4,x", "line 2: need video and prompt"),
        (
            "l.csv",
            "video,prompt\na.mp4,x\nb.mp4,a fox, running",
            "line 3: more cells than the head",
        ),
        ("l.csv", 'video,prompt\na.mp4,x\nb.mp4,"a fox\nc.mp4,x', "after line 2: not CSV"),
        ("l.csv", "video,prompt\na.mp4," + "x" * 140_000, "after line 1: not CSV .field larger"),
        ("l.jsonl", '{"video_path": "a.mp4", "text": "x", "cap": "y"}', "text and cap may both"),
        ("l.json", '{"path": "a.mp4", "cap": "y"}', "its JSON is not an array; need an array of"),
        ("l.json", '[{"path": "a.mp4"}, {"cap": "y"}]', "entry 2: need video and prompt"),
        ("l.json", '[["a.mp4"]]', "entry 1: need video and prompt.*video_path and caption"),
        ("l.jsonl", "", "no clips there"),
        (
            "l.jsonl",
            '{"video": "\\ud83d.mp4"}',
            "line 1: '.ud83d.mp4' holds half of a character",
        ),
        ("l.txt", "a.mp4", "give a folder"),
    ],
)
def test_lists_that_cannot_be_read_say_where(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(WanError, match=message):
        list_clips(tmp_path / name)


def test_empty_cells_and_hidden_folders_are_passed_over(clips, capsys):
    (clips / "l.csv").write_text("video,prompt\na.mp4,a fox,\n")
    (clip,) = list_clips(clips / "l.csv")
    assert clip.caption == "a fox"
    (clips / "l.csv").unlink()
    (clips / ".cache").mkdir()
    make_clip(clips / ".cache" / "old.mp4")
    make_clip(clips / "a.mp4")
    assert [clip.name for clip in list_clips(clips)] == ["a.mp4"]
    assert capsys.readouterr().err == ""

"""Videos on disk hold the frames, size, rate and colours that were given."""

import av
import numpy as np
import pytest
import torch

from wan.errors import WanError
from wan.media.video import (
    contact_sheet,
    flaw,
    frame_rate,
    read_video,
    to_uint8,
    write_video,
)


def moving_square(count=9, height=64, width=96):
    frames = np.full((count, height, width, 3), (40, 90, 160), np.uint8)
    for i in range(count):
        frames[i, 16:40, 4 * i : 4 * i + 24] = (220, 60, 30)
    return frames


@pytest.mark.parametrize("count", [1, 2, 9])
@pytest.mark.parametrize("fps", [8, 23.976, 24])
def test_a_file_holds_what_was_written(tmp_path, count, fps):
    frames = moving_square(count)
    info = write_video(tmp_path / "a.mp4", frames, fps, {"title": "x", "comment": "y"})
    read, again = read_video(tmp_path / "a.mp4")
    assert again == info
    assert read.shape == frames.shape
    assert (info.declared_frames, info.decoded_frames) == (count, count)
    assert abs(info.fps - fps) < 1e-3
    assert (info.codec, info.pixel_format) == ("h264", "yuv420p")
    assert (info.metadata["title"], info.metadata["comment"]) == ("x", "y")


def test_colours_survive(tmp_path):
    """Wrong matrix or range shifts flat colours by 5 to 20 levels; crf 17 by 3 at most."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128), (255, 255, 255), (0, 0, 0)]
    frames = np.stack([np.full((32, 32, 3), c, np.uint8) for c in colours])
    write_video(tmp_path / "a.mp4", frames, 8)
    read, _ = read_video(tmp_path / "a.mp4")
    error = np.abs(read[:, 8:24, 8:24].astype(int) - frames[:, 8:24, 8:24])
    assert error.max() <= 4


def test_colours_are_tagged_as_bt709(tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(), 8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc)
        assert [int(t) for t in tags] == [1, 1, 1]
        assert int(context.color_range) == 1  # limited


FLAT = [(200, 30, 30), (30, 180, 40), (30, 40, 200), (240, 150, 20), (224, 172, 140), (128,) * 3]


def stripes():
    """One picture of 64x192 with a stripe of each flat colour."""
    return np.repeat(np.array(FLAT, np.uint8), 32, axis=0)[None].repeat(64, axis=0)


def colour_error(path):
    """The largest difference from the stripes, in levels, in the middle of each."""
    read, _ = read_video(path)
    return np.abs(read[0, 32, 16::32].astype(int) - FLAT).max()


def write_frame(path, codec, frame, matrix=None, full=None):
    """Three times one frame, by a writer that sets only these tags."""
    with av.open(str(path), "w") as container:
        options = {"crf": "5"} if codec.startswith("libx264") else {}
        stream = container.add_stream(codec, rate=8, options=options)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
        if codec in ("mpeg4", "mjpeg"):
            stream.bit_rate = 20_000_000
        if matrix is not None:
            stream.codec_context.colorspace = matrix
        if full is not None:
            stream.codec_context.color_range = 2 if full else 1
        for number in range(3):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def converted(rgb, weights, full, bits):
    """RGB -> a 4:4:4 frame by the definition, with red's and blue's weights in luma (H.273)."""
    red, green, blue = np.moveaxis(rgb / 255, -1, 0)
    of_red, of_blue = weights
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = ((blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red))
    unit, top = 2 ** (bits - 8), 2**bits - 1
    levels = [luma * top] if full else [(219 * luma + 16) * unit]
    levels += [c * (top if full else 224 * unit) + 128 * unit for c in chroma]
    height, width, _ = rgb.shape
    frame = av.VideoFrame(width, height, "yuv444p" if bits == 8 else "yuv444p10le")
    dtype = np.dtype(np.uint8 if bits == 8 else "<u2")
    for plane, values in zip(frame.planes, levels, strict=True):
        rows = np.zeros((height, plane.line_size // dtype.itemsize), dtype)
        rows[:, :width] = values.round().clip(0, top)
        plane.update(rows.tobytes())
    return frame


@pytest.mark.parametrize("codec", ["libx264", "ffv1"])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("matrix", "weights"),
    [
        (None, (0.299, 0.114)),
        (5, (0.299, 0.114)),
        (6, (0.299, 0.114)),
        (1, (0.2126, 0.0722)),
        (9, (0.2627, 0.0593)),
    ],
)
def test_colours_follow_the_tags_and_are_bt601_without(
    tmp_path, matrix, weights, full, bits, codec
):
    path = tmp_path / "a.mkv"
    write_frame(path, codec, converted(stripes(), weights, full, bits), matrix, full)
    assert colour_error(path) <= 2


@pytest.mark.parametrize(
    ("codec", "name", "pixels"),
    [
        ("libx264", "a.mp4", "yuv420p"),
        ("libx264", "a.mp4", "yuvj420p"),
        ("mpeg4", "a.mp4", "yuv420p"),
        ("mjpeg", "a.avi", "yuvj420p"),
        ("libvpx-vp9", "a.webm", "yuv420p"),
        ("prores_ks", "a.mov", "yuv422p10le"),
        ("libx264rgb", "a.mp4", "rgb24"),
        ("libvpx-vp9", "a.webm", "gbrp"),
        ("png", "a.mov", "rgb24"),
        ("qtrle", "a.mov", "rgb24"),
        ("ffv1", "a.mkv", "bgr0"),
        ("ffv1", "a.mkv", "gbrp10le"),
        ("rawvideo", "a.avi", "bgr24"),
    ],
)
def test_colours_of_writers_that_set_no_tag_are_read_as_written(tmp_path, codec, name, pixels):
    """Python's writers leave the conversion from RGB to swscale, and the tag empty."""
    frame = av.VideoFrame.from_ndarray(stripes(), format="rgb24").reformat(format=pixels)
    write_frame(tmp_path / name, codec, frame)
    assert colour_error(tmp_path / name) <= 5


@pytest.mark.parametrize(
    "text", ["a, b: 'c' \"d\" = ${x} 猫 😀", "two\nlines", "\\;#=\n;", "x" * 3000]
)
def test_metadata_texts_survive(tmp_path, text):
    write_video(tmp_path / "a.mp4", moving_square(2), 8, {"title": text})
    assert read_video(tmp_path / "a.mp4")[1].metadata["title"] == text


def test_a_title_that_is_not_utf8_is_read_as_far_as_it_goes(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, moving_square(2), 8, {"title": "cafe!"})
    path.write_bytes(path.read_bytes().replace(b"cafe!", b"caf\xe9!"))
    assert read_video(path)[1].metadata["title"] == "caf\ufffd!"


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 63, 64, 3), "even"), ((1, 64, 63, 3), "even"), ((0, 64, 64, 3), "at least one")],
)
def test_sizes_that_would_be_changed_are_refused(tmp_path, shape, words):
    with pytest.raises(WanError, match=words):
        write_video(tmp_path / "a.mp4", np.zeros(shape, np.uint8), 8)
    assert not list(tmp_path.iterdir())


def test_other_dtypes_names_and_rates_are_refused(tmp_path):
    with pytest.raises(WanError, match="uint8"):
        write_video(tmp_path / "a.mp4", np.zeros((1, 8, 8, 3), np.float32), 8)
    with pytest.raises(WanError, match=r"\.mp4"):
        write_video(tmp_path / "a.avi", moving_square(1), 8)
    for fps in (0, -1, float("nan"), 241):
        with pytest.raises(WanError, match="fps"):
            write_video(tmp_path / "a.mp4", moving_square(1), fps)


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    write_video(path, moving_square(3), 8)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wan.media.video._encode", full)
    with pytest.raises(OSError, match="No space"):
        write_video(path, moving_square(5), 8)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_a_file_that_reads_back_shorter_is_an_error(tmp_path, monkeypatch):
    import wan.media.video

    encode = wan.media.video._encode
    monkeypatch.setattr(
        wan.media.video, "_encode", lambda path, frames, *rest: encode(path, frames[:-1], *rest)
    )
    with pytest.raises(OSError, match="reads back"):
        write_video(tmp_path / "a.mp4", moving_square(5), 8)
    assert not list(tmp_path.iterdir())


def test_unreadable_videos_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"b\.mp4"):
        read_video(tmp_path / "b.mp4")
    (tmp_path / "c.mp4").write_bytes(b"not a video at all" * 100)
    with pytest.raises(WanError, match=r"c\.mp4"):
        read_video(tmp_path / "c.mp4")
    (tmp_path / "d.mp4").write_bytes(b"")
    with pytest.raises(WanError, match=r"d\.mp4"):
        read_video(tmp_path / "d.mp4")
    write_video(tmp_path / "e.mp4", moving_square(5), 8)
    with pytest.raises(WanError, match="more than 4"):
        read_video(tmp_path / "e.mp4", max_frames=4)


def test_exact_rates():
    assert str(frame_rate(23.976)) == "24000/1001"
    assert str(frame_rate(29.97)) == "30000/1001"
    assert [str(frame_rate(f)) for f in (1, 4, 8, 24, 12.5)] == ["1", "4", "8", "24", "25/2"]


def test_floats_become_the_nearest_level():
    video = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 6).expand(3, 1, 1, 6)
    assert to_uint8(video)[0, 0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_not_finite_floats_are_refused():
    video = torch.zeros(3, 1, 2, 2)
    video[0, 0, 0, 0] = float("nan")
    with pytest.raises(WanError, match="1 of 12 values"):
        to_uint8(video)
    with pytest.raises(WanError, match="shape"):
        to_uint8(torch.zeros(1, 3, 1, 2, 2))


def test_contact_sheet_shows_first_to_last():
    frames = np.stack([np.full((10, 20, 3), 10 * i, np.uint8) for i in range(17)])
    sheet = np.asarray(contact_sheet(frames, max_frames=4))
    assert sheet.shape == (2 * 14 + 4, 2 * 24 + 4, 3)
    assert [sheet[9, 9, 0], sheet[9, 33, 0], sheet[23, 9, 0], sheet[23, 33, 0]] == [0, 50, 110, 160]
    wide = contact_sheet(np.zeros((2, 50, 1000, 3), np.uint8), max_width=100)
    assert wide.size == (2 * 104 + 4, 5 + 8)
    assert contact_sheet(frames[:1]).size == (28, 18)


def test_flaws_are_black_and_constant_videos_only():
    frames = moving_square()
    assert flaw(frames) is None
    assert flaw(np.repeat(frames[:1], 9, axis=0)) is None  # standing still
    assert "black" in flaw(frames // 32)
    assert "same colour" in flaw(np.full((3, 8, 8, 3), 90, np.uint8))
    dark = np.zeros((3, 64, 64, 3), np.uint8)
    dark[:, 30:32, 30:32, 0] = 200
    assert flaw(dark) is None  # a small object in the dark


def test_truncation_is_that_of_fastvideo():
    """x / 2 + 0.5, times 255, rounded down; values on a level stay there."""
    video = torch.linspace(-1.2, 1.2, 3 * 2 * 4 * 4).view(3, 2, 4, 4)
    expected = ((video / 2 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(to_uint8(video, truncate=True), expected)
    assert (to_uint8(video) != expected).any()


@pytest.mark.parametrize(
    "text", ["ffconcat version 1.0\nfile private.mp4\n", "#EXTM3U\n#EXTINF:9,\nprivate.mp4\n"]
)
def test_a_list_of_other_videos_is_no_video(tmp_path, text):
    """FFmpeg recognises lists by their first line, whatever their name is."""
    write_video(tmp_path / "private.mp4", moving_square(), 8)
    (tmp_path / "clip.mp4").write_text(text)
    with pytest.raises(WanError, match="damaged, or not a video"):
        read_video(tmp_path / "clip.mp4")

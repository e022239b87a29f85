"""Frames <-> mp4, and a sheet of frames as PNG.

F frames, H height, W width. Frames are (F, H, W, 3) uint8 RGB; a video as the models see it is
(3, F, H, W) float in [-1, 1].
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wan.errors import WanError
from wan.files import written_beside
from wan.media.images import check_background, over_background

Frames = NDArray[np.uint8]

BT709 = 1  # the number in H.264's colour fields
FRAMES_AT_ONCE = 8  # frames converted at a time
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # decoders that read transparency
CRF = 17  # visually lossless; 0 would be lossless, 23 is x264's default


@dataclass(frozen=True)
class VideoInfo:
    """The facts in a video's header, and the number of frames that were decoded.

    Attributes:
        declared_frames: the number in the container's header; 0 if it has none.
        decoded_frames: how many frames came out.
        fps: frames per second.
        metadata: the container's text fields.
    """

    height: int
    width: int
    declared_frames: int
    decoded_frames: int
    fps: float
    codec: str
    pixel_format: str
    metadata: dict[str, str]


def is_finite(values: Tensor) -> bool:
    """True if no value is NaN or infinite; minimum and maximum show it without a copy."""
    return all(math.isfinite(bound.item()) for bound in values.aminmax())


def to_uint8(video: Tensor, truncate: bool = False) -> Frames:
    """(3, F, H, W) float in [-1, 1] -> (F, H, W, 3) uint8, rounded to the nearest.

    Args:
        truncate: round down instead, as FastVideo does; half a level darker on average.

    Raises:
        WanError: a wrong shape, or values that are not finite. Values outside are clamped.
    """
    if video.ndim != 4 or video.shape[0] != 3:
        raise WanError(f"video of shape {tuple(video.shape)}: need (3, F, H, W)")
    if not is_finite(video):
        bad = int((~video.isfinite()).sum())
        raise WanError(f"video: {bad} of {video.numel()} values are not finite")
    frames = np.empty((*video.shape[1:], 3), dtype=np.uint8)
    for i in range(0, len(frames), FRAMES_AT_ONCE):  # all at once would need three copies
        part = video[:, i : i + FRAMES_AT_ONCE]
        levels = part.float().clamp(-1, 1)  # a copy
        if truncate:
            levels = levels.div_(2).add_(0.5).mul_(255).floor_()
        else:
            levels = levels.add_(1).mul_(127.5).round_()
        frames[i : i + FRAMES_AT_ONCE] = levels.byte().permute(1, 2, 3, 0).cpu().numpy()
    return frames


def write_video(
    path: str | Path,
    frames: Frames,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    *,
    crf: int = CRF,
    bitrate: int | None = None,
) -> VideoInfo:
    """Write H.264 in mp4, read it back, and only then give the file its final name.

    4:2:0 with bt709 matrix and tags, so that players show the colours that were given; frames keep
    their size. The file is written beside its place and renamed once it has been decoded again and
    its frames counted, so a file under its final name is complete.

    Args:
        path: ends in .mp4; replaced if it exists.
        frames: (F, H, W, 3) uint8. 4:2:0 stores one colour for 2x2 pixels: H and W must be even.
        fps: frames per second; 23.976 and the like become their exact fraction (24000/1001).
        metadata: text fields, e.g. title and comment.
        crf: x264's quality, from 0 (lossless) to 51.
        bitrate: bits per second, in place of a quality.

    Raises:
        WanError: the shape, dtype, size or rate can't be written.
        OSError: the file can't be written, or does not read back as it should.
    """
    path = Path(path)
    _check_frames(frames)
    if path.suffix != ".mp4":
        raise WanError(f"{path}: the name of a video must end in .mp4")
    rate = frame_rate(fps)
    with written_beside(path) as beside:
        _encode(beside, frames, rate, metadata or {}, crf, bitrate)
        info = _inspect(beside)
        expected = (*frames.shape[:3], float(rate))
        found = (info.decoded_frames, info.height, info.width, info.fps)
        if found != expected or info.declared_frames != info.decoded_frames:
            raise OSError(
                f"{path}: reads back as frames, height, width, fps {found} (its header says "
                f"{info.declared_frames} frames) instead of {expected}; is the disk full?"
            )
    return info


def frame_rate(fps: float) -> Fraction:
    """The exact rate of a decimal: 23.976 is 24000/1001.

    Raises:
        WanError: not a number between 1 and 240.
    """
    if not (math.isfinite(fps) and 1 <= fps <= 240):
        raise WanError(f"fps={fps}: must be between 1 and 240")
    ntsc = Fraction(round(fps) * 1000, 1001)
    is_ntsc = abs(float(ntsc) - fps) < min(0.004, abs(round(fps) - fps))  # whole numbers stay whole
    return ntsc if is_ntsc else Fraction(fps).limit_denominator(1000)


def _check_frames(frames: Frames) -> None:
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise WanError(f"frames {frames.shape} {frames.dtype}: need (F, H, W, 3) uint8")
    count, height, width, _ = frames.shape
    if count < 1 or height < 2 or width < 2 or height % 2 or width % 2:
        raise WanError(
            f"{count} frames of {height}x{width}: need at least one, of even height and width "
            "(4:2:0 video stores colour for 2x2 pixels)"
        )


def _encode(
    path: Path,
    frames: Frames,
    rate: Fraction,
    metadata: Mapping[str, str],
    crf: int,
    bitrate: int | None,
) -> None:
    # faststart puts the index in front, so that a browser can play a file that is still loading.
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        container.metadata.update(metadata)
        options = {"crf": str(crf)} if bitrate is None else {}
        stream = container.add_stream("libx264", rate=rate, options=options)
        if bitrate is not None:
            stream.bit_rate = bitrate
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.color_primaries = context.color_trc = context.colorspace = BT709
        context.color_range = ColorRange.MPEG
        for array in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


# Containers that hold their pictures themselves. FFmpeg also reads lists of other files, under any
# name, and a list from a stranger could name a private one.
CONTAINERS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg", "flv"),
    *("ogg", "asf", "gif", "yuv4mpegpipe"),
)


@contextmanager
def open_video(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a file with a video stream; the decoder's errors become WanErrors.

    Titles that are not UTF-8, as old ones in Latin-1, are read with replacements.
    """
    if not path.is_file():
        raise FileNotFoundError(f"video {path}: no such file")
    try:
        options = {"format_whitelist": ",".join(CONTAINERS)}
        with av.open(str(path), options=options, metadata_errors="replace") as container:
            if not container.streams.video:
                raise WanError(f"video {path}: has no pictures in it")
            yield container
    except av.FFmpegError as error:
        raise WanError(
            f"video {path}: damaged, or not a video that holds its pictures itself "
            f"({error.strerror})"
        ) from error


def _inspect(path: Path) -> VideoInfo:
    with open_video(path) as container:
        count = sum(1 for _ in container.decode(video=0))
        return video_info(container, count)


def video_info(container: av.container.InputContainer, count: int) -> VideoInfo:
    """The facts in an open file's header; `count` is the number of frames decoded from it."""
    stream = container.streams.video[0]
    return VideoInfo(
        height=stream.height,
        width=stream.width,
        declared_frames=stream.frames,
        decoded_frames=count,
        fps=float(stream.average_rate or 0),
        codec=stream.codec_context.name,
        pixel_format=str(stream.pix_fmt),
        metadata=dict(container.metadata),
    )


def read_video(path: str | Path, max_frames: int = 10_000) -> tuple[Frames, VideoInfo]:
    """All frames of a file as (F, H, W, 3) uint8 RGB, and the facts in its header.

    Raises:
        FileNotFoundError: there is no such file.
        WanError: not a video, damaged, without frames, or with more than `max_frames`.
    """
    path = Path(path)
    arrays: list[Frames] = []
    with open_video(path) as container:
        for frame in decoded_frames(container, path):
            if len(arrays) == max_frames:
                raise WanError(f"video {path}: more than {max_frames} frames; cut it first")
            arrays.append(rgb_frame(frame, name=f"video {path}"))
        info = video_info(container, len(arrays))
    if not arrays:
        raise WanError(f"video {path}: no frame in it could be decoded")
    return np.stack(arrays), info


def decoded_frames(container: av.container.InputContainer, path: Path) -> Iterator[av.VideoFrame]:
    """All frames of an open file's pictures, with their transparency.

    A WebM file holds that in a second stream of VP8 or VP9, which ffmpeg's own decoders leave out.
    """
    stream = container.streams.video[0]
    name = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or name not in WITH_ALPHA:
        yield from container.decode(stream)
        return
    try:
        decoder = av.CodecContext.create(WITH_ALPHA[name], "r")
    except (av.FFmpegError, ValueError) as error:
        raise WanError(
            f"video {path}: is transparent, and this PyAV cannot read the transparency of {name}; "
            "save it without, or as ProRes 4444"
        ) from error
    assert isinstance(decoder, av.VideoCodecContext)
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def is_transparent(frame: av.VideoFrame) -> bool:
    """Whether any pixel of a frame is not opaque."""
    return _may_be_transparent(frame) and bool((_rgba(frame)[..., 3] < 255).any())


def _may_be_transparent(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


def _rgba(frame: av.VideoFrame) -> Frames:
    return np.asarray(frame.to_ndarray(format="rgba"))


def rgb_frame(
    frame: av.VideoFrame, background: Sequence[int] | None = None, name: str = "video"
) -> Frames:
    """One frame as (H, W, 3) uint8 RGB.

    The matrix and range are those that the file is tagged with. A file without a tag is BT.601 of
    limited range, swscale's default: writers that set no tag (imageio, OpenCV, diffusers, a plain
    ffmpeg) convert with it, and other readers do too.

    Args:
        background: RGB in 0..255 to put behind transparent pixels, as `images.read_picture` does.

    Raises:
        WanError: there are transparent pixels and no background.
    """
    if is_transparent(frame):
        check_background(background, name)
        assert background is not None
        return np.array(over_background(Image.fromarray(_rgba(frame)), background).convert("RGB"))
    return np.asarray(frame.to_ndarray(format="rgb24"))


def contact_sheet(frames: Frames, max_frames: int = 12, max_width: int = 320) -> Image.Image:
    """Frames from first to last, evenly spaced, side by side in rows, as one picture.

    Args:
        frames: (F, H, W, 3) uint8.
        max_frames: how many of them at most.
        max_width: wider frames are scaled down to this.
    """
    count = min(len(frames), max_frames)
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    pictures = [Image.fromarray(frames[i]) for i in chosen]
    width, height = pictures[0].size
    if width > max_width:
        height = max(1, round(height * max_width / width))
        width = max_width
        pictures = [p.resize((width, height), Image.Resampling.LANCZOS) for p in pictures]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    gap = 4
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    sheet = Image.new("RGB", size, (32, 32, 32))
    for place, picture in enumerate(pictures):
        row, column = divmod(place, columns)
        sheet.paste(picture, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def flaw(frames: Frames) -> str | None:
    """Say why frames show no picture (all black, or one colour); None if they show one.

    Black means that no value is above 16 of 255; constant, that every pixel of every frame has the
    same colour up to 2 levels. A video that stands still is no flaw.
    """
    rows = frames.reshape(-1, frames.shape[2] * 3)  # numpy is fastest along long rows
    lowest, highest = (bound.reshape(-1, 3) for bound in (rows.min(axis=0), rows.max(axis=0)))
    lowest, highest = lowest.min(axis=0), highest.max(axis=0)
    if highest.max() <= 16:
        return "every frame is black"
    if (highest.astype(int) - lowest).max() <= 2:
        return f"every pixel has the same colour {tuple(int(v) for v in highest)}"
    return None

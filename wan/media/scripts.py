"""`load_image` and `export_to_video`, as scripts written for diffusers call them."""

import io
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from wan.errors import WanError
from wan.files import expanded
from wan.media.images import decode_image, picture_to_rgb
from wan.media.video import CRF, Frames, write_video

MAX_DOWNLOAD = 64 << 20  # bytes of an image from the web
TIMEOUT = 30  # seconds without an answer


def load_image(
    image: str | Path | Image.Image,
    convert_method: Callable[[Image.Image], Image.Image] | None = None,
    background: Sequence[int] | None = None,
) -> Image.Image:
    """A picture as an upright 8-bit RGB image of Pillow's.

    Args:
        image: a path, an http or https address, or a picture.
        convert_method: called with the upright picture in place of the conversion to RGB.
        background: RGB in 0..255 behind transparent pixels; without it they are refused.

    Raises:
        FileNotFoundError: there is no such file.
        WanError: not an image of a known format, damaged, too large, or out of reach.
    """
    if isinstance(image, Image.Image):
        picture, name = ImageOps.exif_transpose(image), "image"
    elif str(image).startswith(("http://", "https://")):
        picture, name = decode_image(io.BytesIO(download(str(image))), str(image)), str(image)
    else:
        path, name = expanded(image), f"image {image}"
        if not path.is_file():
            raise FileNotFoundError(f"{name}: no such file")
        picture = decode_image(path, name)
    if convert_method is not None:
        return convert_method(picture)
    return picture_to_rgb(picture, background, name)


def download(address: str) -> bytes:
    """The bytes behind an address, at most `MAX_DOWNLOAD`."""
    request = urllib.request.Request(address, headers={"User-Agent": "wan"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            content = answer.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError) as error:  # urllib's errors are OSErrors
        raise WanError(f"{address}: can't be fetched ({error}); download it first") from error
    if len(content) > MAX_DOWNLOAD:
        raise WanError(f"{address}: more than {MAX_DOWNLOAD >> 20} MiB; download and shrink it")
    return content


def export_to_video(
    video_frames: Any,
    output_video_path: str | Path | None = None,
    fps: float = 10,
    quality: float | None = None,
    bitrate: int | None = None,
    macro_block_size: int | None = None,
) -> str:
    """Write frames as H.264 in mp4, and return the path.

    Args:
        video_frames: one video: pictures of Pillow's, or arrays (H, W, 3) or tensors (3, H, W) with
            values in [0, 1], or uint8.
        output_video_path: ends in .mp4; None makes a temporary file.
        fps: frames per second; Wan's models were trained with 16 (Wan2.1, A14B) and 24 (TI2V-5B).
        quality: from 0 to 10, as imageio counts; None is visually lossless.
        bitrate: bits per second, in place of a quality.
        macro_block_size: frames keep their size; another number than 1 is refused if it does not
            divide height and width.

    Raises:
        WanError: no frames, frames of different sizes, or a setting out of range.
    """
    frames = as_frames(video_frames)
    block = macro_block_size or 1
    if frames.shape[1] % block or frames.shape[2] % block:
        raise WanError(
            f"macro_block_size={block} does not divide frames of {frames.shape[1]}x"
            f"{frames.shape[2]}, and frames are never scaled: leave it out"
        )
    if quality is not None and not 0 <= quality <= 10:
        raise WanError(f"quality={quality}: must be between 0 and 10")
    if output_video_path is None:
        with tempfile.NamedTemporaryFile(suffix=".mp4", delete=False) as file:
            output_video_path = file.name
    parent = Path(output_video_path).parent
    if not parent.is_dir():
        raise WanError(f"{output_video_path}: there is no folder {parent}; make it first")
    crf = CRF if quality is None else int((1 - quality / 10) * 51)
    write_video(output_video_path, frames, fps, crf=crf, bitrate=bitrate)
    return str(output_video_path)


def as_frames(video_frames: Any) -> Frames:
    """One video in any accepted form as (F, H, W, 3) uint8, rounded to the nearest.

    Raises:
        WanError: no frames, frames of different sizes, or values that are no colours.
    """
    frames = [as_frame(one) for one in video_frames]
    if not frames:
        raise WanError("video_frames is empty: give the frames of one video, such as output[0][0]")
    if len({frame.shape for frame in frames}) > 1:
        raise WanError("video_frames have different sizes")
    return np.stack(frames)


def as_frame(frame: Any) -> Frames:
    """One frame as (H, W, 3) uint8."""
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    array = np.asarray(frame.cpu() if hasattr(frame, "cpu") else frame)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3:
        raise WanError(
            f"a frame of shape {array.shape}: need (H, W, 3); a batch of videos is written one "
            "by one, as in export_to_video(output.frames[0], ..)"
        )
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0 and array.max() <= 1):
        raise WanError(f"a frame of {array.dtype}: values must lie in [0, 1], or be uint8")
    return (array * 255).round().astype(np.uint8)

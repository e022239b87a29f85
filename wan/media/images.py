"""Images for image-to-video: read one, resize it, choose a video size for it.

H height, W width. An image is (3, H, W) float32 in [-1, 1]; it comes from 8-bit RGB, so every value
is one of 256. Resizing goes through 8 bits as well, as the reference pipelines do: that keeps the
first frame comparable with theirs to the bit.

A photo may have `MAX_PIXELS`. It is kept as 8-bit RGB until it has the size of the video, since
floats would take three times as much, and other colour modes are converted in strips.
"""

import math
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from wan.errors import WanError
from wan.files import written_beside

# Twice the largest common camera sensors; an image of this size takes about 200 MB as 8-bit RGB.
MAX_PIXELS = 2**26
STRIP_PIXELS = 2**20  # converted at a time
ORIENTATION = 0x0112  # a tag of EXIF; from 5 on, height and width change places
# Named one by one, so that no exotic decoder (PostScript, FITS, ...) ever sees a downloaded file.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
FIT_MODES = ("resize", "crop")
# What Pillow's decoders raise on damaged files; it has no common base class of its own for them.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    struct.error,
    zlib.error,
)


def write_image(path: Path, image: Image.Image) -> None:
    """Replace an image file as a whole, in the format that its ending says.

    Raises:
        OSError: it can't be written.
    """
    with written_beside(path) as beside:
        image.save(beside, Image.registered_extensions()[path.suffix.lower()])


def load_image(path: str | Path, background: Sequence[int] | None = None) -> Tensor:
    """Read one still image as (3, H, W) float32 in [-1, 1].

    Args:
        path, background: as for `read_picture`.

    Raises:
        FileNotFoundError, WanError: as for `read_picture`.
    """
    return _to_tensor(read_picture(path, background))


def read_picture(path: str | Path, background: Sequence[int] | None = None) -> Image.Image:
    """Read one still image as an upright 8-bit RGB picture.

    Args:
        path: a PNG, JPEG, WebP, BMP, TIFF, PPM or single-frame GIF file.
        background: RGB in 0..255 to put behind transparent pixels. Without it an image with
            transparent pixels is refused: what lies behind them is the user's choice.

    Raises:
        FileNotFoundError: there is no such file.
        WanError: not an image, damaged, animated, too large, or in a colour space (CMYK, Lab, ...)
            or sample format (32-bit) whose meaning in sRGB would be a guess.
    """
    name = f"image {path}"
    return picture_to_rgb(decode_image(_existing(path), name), background, name)


def picture_size(path: str | Path) -> tuple[int, int]:
    """(H, W) of an image as a viewer shows it, from the file's header where that says it.

    Raises:
        FileNotFoundError, WanError: as for `read_picture`, for what a header can tell.
    """
    with _opened(_existing(path), f"image {path}") as image:
        turned = image.getexif().get(ORIENTATION, 1) >= 5
        return (image.width, image.height) if turned else (image.height, image.width)


def is_still(path: str | Path) -> bool:
    """Whether a file is an image of one frame, by its header; anything else is none."""
    try:
        with _opened(Path(path), f"image {path}"):
            return True
    except WanError:
        return False


def _existing(path: str | Path) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"image {path}: no such file")
    if not path.is_file():
        raise WanError(f"image {path}: not a file; give one image file")
    return path


def image_to_tensor(
    image: Image.Image, background: Sequence[int] | None = None, name: str = "image"
) -> Tensor:
    """A Pillow image as (3, H, W) float32 in [-1, 1]; arguments as for `upright_rgb`."""
    return _to_tensor(upright_rgb(image, background, name))


def upright_rgb(
    image: Image.Image, background: Sequence[int] | None = None, name: str = "image"
) -> Image.Image:
    """A Pillow image as an upright 8-bit RGB picture; arguments and errors as in `read_picture`.

    The EXIF orientation is applied, so that the picture stands as a viewer shows it. 16-bit grey is
    rounded to 8 bits; Pillow keeps the upper 8 of 16-bit colour. An embedded colour profile is not
    applied (the references ignore it too).
    """
    _check_still(image, name)
    return picture_to_rgb(ImageOps.exif_transpose(image), background, name)


def decode_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """Decode a file to an upright image; Pillow's errors become WanErrors."""
    with _opened(file, name) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)  # no copy of an image that is upright
        return image


@contextmanager
def _opened(file: Path | IO[bytes], name: str) -> Iterator[Image.Image]:
    """An image whose header was read and checked; Pillow's errors become WanErrors."""
    try:
        with warnings.catch_warnings():
            # Pillow only warns above its own limit; ours is lower and raises an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                _check_still(image, name)
                yield image
    except WanError:
        raise
    except Image.DecompressionBombError as error:
        raise WanError(f"{name}: {_too_large('more pixels than any photo')}") from error
    except Image.UnidentifiedImageError as error:
        raise WanError(
            f"{name}: not an image of a known format ({', '.join(FORMATS)}); "
            "convert it to PNG or JPEG"
        ) from error
    except _DECODE_ERRORS as error:
        raise WanError(f"{name}: damaged or unreadable ({error})") from error


def _check_still(image: Image.Image, name: str) -> None:
    """Refuse too many pixels and animations from the header, before pixels are decoded."""
    if image.width * image.height > MAX_PIXELS:
        raise WanError(f"{name}: {_too_large(f'{image.width}x{image.height} pixels')}")
    # MPO is how Pillow names a phone's JPEG that holds previews or depth maps after the photo.
    # Whether there is a second frame is known at once; to count them all, a file is read whole.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise WanError(f"{name}: several frames or pages; save the wanted one as PNG")


def _to_tensor(picture: Image.Image) -> Tensor:
    """An 8-bit RGB picture as (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(picture))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1).float().div_(255).mul_(2).sub_(1)  # (3, H, W)


def picture_to_rgb(image: Image.Image, background: Sequence[int] | None, name: str) -> Image.Image:
    """Convert an image to 8-bit RGB, or refuse a mode whose meaning would be a guess."""
    mode = None  # of the strips
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        mode = "RGBA"
        alphas = (np.asarray(strip.getchannel("A")) for strip in _strips(image, "RGBA"))
        if not all((alpha == 255).all() for alpha in alphas):
            check_background(background, name)
        else:  # fully opaque
            background = None
    elif image.mode == "RGB":
        return image
    elif image.mode not in ("1", "L", "P", "RGBX", "YCbCr") and not image.mode.startswith("I;16"):
        raise WanError(
            f"{name}: colour mode {image.mode!r} has no exact meaning in sRGB here; "
            "convert it to 8-bit RGB (for example to PNG) in an image editor"
        )
    else:
        background = None  # nothing is transparent
    rgb = Image.new("RGB", image.size)
    top = 0
    for strip in _strips(image, mode):
        rgb.paste(_strip_to_rgb(strip, background), (0, top))
        top += strip.height
    return rgb


def _strips(image: Image.Image, mode: str | None) -> Iterator[Image.Image]:
    """An image in strips from top to bottom, each converted to a mode."""
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        yield strip if mode is None else strip.convert(mode)


def _strip_to_rgb(strip: Image.Image, background: Sequence[int] | None) -> Image.Image:
    if background is not None:
        strip = over_background(strip, background)
    elif strip.mode.startswith("I;16"):
        samples = np.asarray(strip).astype(np.float64)
        strip = Image.fromarray(np.rint(samples / 257).astype(np.uint8))
    return strip.convert("RGB")


def over_background(image: Image.Image, background: Sequence[int]) -> Image.Image:
    """An RGBA image over a colour."""
    return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)


def check_background(background: Sequence[int] | None, name: str) -> None:
    """Refuse transparent pixels of a picture or a video without a colour to put behind them."""
    if background is None:
        has = f"{name}: has transparent pixels; say what lies behind them, such as white with "
        other = ", or save it without transparency"
        raise WanError(
            f"{has}background=(255, 255, 255){other}", f"{has}image_background=[255,255,255]{other}"
        )
    if len(background) != 3 or not all(0 <= value <= 255 for value in background):
        raise WanError(f"{name}: background={background}: need three numbers in 0..255")


def _too_large(what: str) -> str:
    return f"{what}; the limit is {MAX_PIXELS // 2**20} million pixels: scale it down first"


def fit_image(image: Tensor, height: int, width: int, mode: str = "resize") -> Tensor:
    """Bring an image to a size as `fit_picture` does: (3, H, W) -> (3, height, width).

    Args:
        image: (3, H, W) float in [-1, 1]; rounded to 8 bits first unless the size already fits.
        height, width, mode: as for `fit_picture`.

    Raises:
        WanError: a wrong shape or range, or as for `fit_picture`.
    """
    _check_fit(height, width, mode)
    if image.ndim != 3 or image.shape[0] != 3:
        raise WanError(f"image of shape {tuple(image.shape)}: need (3, H, W)")
    if not bool(((image >= -1) & (image <= 1)).all()):
        raise WanError("image values outside [-1, 1] (or not finite): scale them to [-1, 1]")
    if image.shape[1:] == (height, width):
        return image.float()
    pixels = ((image.float() + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())
    return fit_picture(picture, height, width, mode).to(image.device)


def fit_picture(picture: Image.Image, height: int, width: int, mode: str = "resize") -> Tensor:
    """An RGB picture as (3, height, width) float32 in [-1, 1], resized by Pillow's Lanczos filter.

    Args:
        height, width: the new size in pixels.
        mode: "resize" goes straight to the size, whatever the aspect ratio (diffusers);
            "crop" scales until the size is covered and keeps the centre (the official code).

    Raises:
        WanError: a size below 1, an unknown mode, or an image so narrow that covering the size
            would take more than MAX_PIXELS.
    """
    _check_fit(height, width, mode)
    if picture.size != (width, height):
        if mode == "crop":
            picture = _cover(picture, height, width)
        else:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return _to_tensor(picture)


def _check_fit(height: int, width: int, mode: str) -> None:
    if mode not in FIT_MODES:
        raise WanError(f"fit mode {mode!r}: choose one of {', '.join(FIT_MODES)}")
    if height < 1 or width < 1:
        raise WanError(f"image size {height}x{width}: both must be at least 1")


def _cover(picture: Image.Image, height: int, width: int) -> Image.Image:
    """Scale until height x width is covered, then cut out the centre."""
    scale = max(width / picture.width, height / picture.height)
    covering = round(picture.width * scale), round(picture.height * scale)
    if covering[0] * covering[1] > MAX_PIXELS:
        raise WanError(
            f"image of {picture.height}x{picture.width} is too narrow to cover {height}x{width}: "
            "crop it nearer to that shape, or resize it instead (image_fit=resize)"
        )
    picture = picture.resize(covering, Image.Resampling.LANCZOS)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def best_size(image_h: int, image_w: int, max_area: int, multiple: int) -> tuple[int, int]:
    """The (height, width) for a video that keeps an image's aspect ratio within an area.

    The ideal size has exactly `max_area` pixels and the image's aspect ratio. Two legal sizes near
    it are tried, one by rounding the width down first and giving the rest to the height, one the
    other way round; the one whose aspect ratio is closer wins, a tie goes to the second.
    Source: Wan2.2, wan/textimage2video.py, which uses max_area 704 * 1280 and multiple 32.

    Raises:
        WanError: a size below 1, or an image so narrow that no legal size fits in the area.
    """
    if min(image_h, image_w, max_area, multiple) < 1:
        raise WanError(
            f"best size for an image of {image_h}x{image_w} in {max_area} pixels, multiples of "
            f"{multiple}: all four must be at least 1"
        )
    aspect = image_w / image_h
    ideal_w = math.sqrt(max_area * aspect)
    ideal_h = max_area / ideal_w
    width_first = int(ideal_w) // multiple * multiple
    height_first = int(ideal_h) // multiple * multiple
    candidates = []
    if height_first > 0:
        candidates.append((height_first, max_area // height_first // multiple * multiple))
    if width_first > 0:
        candidates.append((max_area // width_first // multiple * multiple, width_first))
    candidates = [(height, width) for height, width in candidates if height > 0 and width > 0]
    if not candidates:
        raise WanError(
            f"an image of {image_h}x{image_w} is too narrow: no size in multiples of {multiple} "
            f"keeps its shape within {max_area} pixels; crop it"
        )

    def misfit(size: tuple[int, int]) -> float:
        shape = size[1] / size[0]
        return max(aspect / shape, shape / aspect)

    return min(candidates, key=misfit)

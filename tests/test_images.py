"""Images for conditioning: what is read, what is refused, and the two ways of fitting."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wan.errors import WanError
from wan.media import images
from wan.media.images import (
    best_size,
    fit_image,
    fit_picture,
    image_to_tensor,
    load_image,
    picture_size,
    read_picture,
)


def picture(height: int = 12, width: int = 20, mode: str = "RGB") -> Image.Image:
    """A colourful image without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 11 % 256, y * 17 % 256, (x * y * 3 + 40) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def saved(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


def test_an_image_comes_back_as_floats_that_keep_every_8_bit_value(tmp_path):
    image = picture()
    loaded = load_image(saved(image, tmp_path / "a.png"))
    assert loaded.shape == (3, 12, 20)
    assert loaded.dtype == torch.float32
    restored = ((loaded + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    assert np.array_equal(restored, np.array(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = picture()
    # What a camera stores is the upright picture under the inverse of the tag's transposition.
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(inverse[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = load_image(saved(stored, tmp_path / "a.png", exif=exif))
    torch.testing.assert_close(loaded, image_to_tensor(upright), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_other_opaque_modes_read_as_rgb(tmp_path, mode):
    image = picture(mode=mode)
    loaded = load_image(saved(image, tmp_path / "a.png"))
    torch.testing.assert_close(loaded, image_to_tensor(image.convert("RGB")), rtol=0, atol=0)


def test_16_bit_samples_are_rounded_to_8_bits(tmp_path):
    samples = np.array([[0, 257, 300, 385, 386, 65535]], dtype=np.uint16)
    loaded = load_image(saved(Image.fromarray(samples), tmp_path / "a.png"))
    expected = torch.tensor([0.0, 1, 1, 1, 2, 255]) / 255 * 2 - 1
    torch.testing.assert_close(loaded[1, 0], expected, rtol=0, atol=0)


def test_transparency_needs_a_background(tmp_path):
    image = picture(mode="RGBA")
    image.putalpha(0)
    path = saved(image, tmp_path / "a.png")
    with pytest.raises(WanError, match="transparent pixels"):
        load_image(path)
    loaded = load_image(path, background=(255, 0, 51))
    expected = torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 12, 20)
    torch.testing.assert_close(loaded, expected)
    with pytest.raises(WanError, match=r"0\.\.255"):
        load_image(path, background=(256, 0, 0))


def test_a_palette_colour_marked_transparent_counts_as_transparency(tmp_path):
    image = picture(mode="P")
    path = saved(image, tmp_path / "a.png", transparency=image.getpixel((3, 3)))
    with pytest.raises(WanError, match="transparent pixels"):
        load_image(path)


def test_animations_are_refused(tmp_path):
    frames = [picture(), picture().transpose(Image.Transpose.ROTATE_180)]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(WanError, match=r"a\.gif: several frames"):
        load_image(path)


def test_the_photo_of_a_multi_picture_jpeg_is_read(tmp_path):
    preview = picture(6, 10)
    path = tmp_path / "phone.jpg"
    picture().save(path, format="MPO", save_all=True, append_images=[preview])
    assert load_image(path).shape == (3, 12, 20)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("F", "tiff"), ("I", "tiff")])
def test_colour_spaces_without_an_exact_meaning_are_refused(tmp_path, mode, suffix):
    with pytest.raises(WanError, match=f"colour mode '{mode}'"):
        load_image(saved(picture().convert(mode), tmp_path / f"a.{suffix}"))


def test_a_pixel_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(Image.new("1", (20000, 20000)), tmp_path / "bomb.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(WanError, match="64 million pixels"):
        load_image(path)


def test_an_image_above_our_limit_and_below_pillows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12 * 20 - 1)
    with pytest.raises(WanError, match="20x12 pixels"):
        load_image(saved(picture(), tmp_path / "a.png"))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(WanError, match="not a file"):
        load_image(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_what_is_no_image_is_refused(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(WanError, match="not an image"):
        load_image(path)


@pytest.mark.filterwarnings("ignore:Tag data larger than file")
@pytest.mark.parametrize("suffix", ["png", "jpeg", "webp", "bmp", "tiff", "gif"])
def test_damaged_files_give_one_clear_error_or_an_image(tmp_path, suffix):
    stream = io.BytesIO()
    picture(40, 60).save(stream, format=suffix)
    whole = stream.getvalue()
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WanError, match=r"a\."):
        load_image(path)
    generator = torch.Generator().manual_seed(5)
    for _ in range(60):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (3,), generator=generator).tolist():
            damaged[place] ^= 0x55
        path.write_bytes(damaged)
        with contextlib.suppress(WanError):
            assert load_image(path).shape[0] == 3  # some damage only changes colours


@pytest.mark.parametrize(("height", "width"), [(32, 64), (7, 5), (12, 20)])
def test_resize_equals_diffusers(height, width):
    video_processor = pytest.importorskip("diffusers.video_processor")
    theirs = video_processor.VideoProcessor(vae_scale_factor=1)
    image = picture(25, 38)
    expected = theirs.preprocess(image, height=height, width=width)[0]
    ours = fit_image(image_to_tensor(image), height, width, mode="resize")
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_crop_keeps_the_aspect_ratio_and_the_centre():
    wide = torch.full((3, 16, 48), -1.0)
    wide[:, :, 16:32] = 1.0  # the middle third is white
    torch.testing.assert_close(fit_image(wide, 16, 16, mode="crop"), torch.ones(3, 16, 16))
    half = fit_image(wide, 8, 8, mode="crop")
    assert half.shape == (3, 8, 8)
    assert half[:, :, 2:6].min() > 0.95  # only the filter's reach at the edges may differ
    tall = fit_image(wide.transpose(1, 2), 8, 8, mode="crop")
    torch.testing.assert_close(tall, half.transpose(1, 2), rtol=0, atol=0)


def test_fitting_refuses_what_it_cannot_do():
    image = image_to_tensor(picture())
    with pytest.raises(WanError, match="resize, crop"):
        fit_image(image, 8, 8, mode="stretch")
    with pytest.raises(WanError, match="at least 1"):
        fit_image(image, 0, 8)
    with pytest.raises(WanError, match=r"need \(3, H, W\)"):
        fit_image(image[:1], 8, 8)
    with pytest.raises(WanError, match="outside"):
        fit_image(image * 2, 8, 8)
    with pytest.raises(WanError, match="outside"):
        fit_image(image * float("nan"), 8, 8)
    with pytest.raises(WanError, match="too narrow"):
        fit_image(torch.zeros(3, 1, 9000), 704, 1280, mode="crop")


def test_best_size_gives_the_release_sizes():
    area = 704 * 1280
    assert best_size(704, 1280, area, 32) == (704, 1280)
    assert best_size(1280, 704, area, 32) == (1280, 704)
    assert best_size(720, 1280, area, 32) == (704, 1248)  # 1.773 is nearer to 1.778 than 1.818
    assert best_size(1000, 1000, area, 32) == (928, 960)  # a tie: the height was rounded first


@pytest.mark.parametrize("image_w", [300, 640, 1000, 1777, 3000])
def test_best_size_is_legal_and_near_the_image_shape(image_w):
    height, width = best_size(1000, image_w, 704 * 1280, 32)
    assert height % 32 == width % 32 == 0
    assert height * width <= 704 * 1280
    # One step of 32 on the shorter side bounds the change of shape.
    step = 32 / min(height, width)
    assert abs(width / height / (image_w / 1000) - 1) <= 1.5 * step


def test_best_size_refuses_the_impossible():
    with pytest.raises(WanError, match="too narrow"):
        best_size(1, 100000, 704 * 1280, 32)
    with pytest.raises(WanError, match="at least 1"):
        best_size(0, 10, 704 * 1280, 32)


# --- large photos ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16"])
@pytest.mark.parametrize("background", [None, (9, 99, 250)])
def test_strips_give_the_picture_of_the_whole(tmp_path, monkeypatch, mode, background):
    """Read in strips of a row, in one strip, and as floats: all the same to the bit."""
    if mode == "I;16":
        rows = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
        image = Image.fromarray(rows)
    else:
        image = picture(40, 60).convert(mode)
    if mode in ("RGBA", "LA"):
        alpha = np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)
        image.putalpha(Image.fromarray(alpha if background else alpha | 255))
    path = saved(image, tmp_path / "a.png")
    found = []
    for pixels in (1, 60 * 7, 2**20):
        monkeypatch.setattr(images, "STRIP_PIXELS", pixels)
        found.append(fit_picture(read_picture(path, background), 16, 32, "crop"))
        found.append(fit_image(load_image(path, background), 16, 32, "crop"))
    assert all(torch.equal(one, found[0]) for one in found)
    whole = Image.open(path)
    if mode in ("RGBA", "LA") and background:
        behind = Image.new("RGBA", whole.size, (*background, 255))
        whole = Image.alpha_composite(behind, whole.convert("RGBA"))
    if mode != "I;16":
        assert np.array_equal(
            np.array(read_picture(path, background)), np.array(whole.convert("RGB"))
        )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_the_size_is_that_of_the_upright_picture(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(picture(12, 20), tmp_path / f"a.{suffix}", exif=exif)
    assert picture_size(path) == load_image(path).shape[1:]


@pytest.mark.parametrize("kind", ["jpg", "turned.jpg", "alpha.png", "grey.png"])
def test_a_photo_takes_little_more_memory_than_its_pixels(tmp_path, kind):
    """In a process of its own: 16 million pixels are 64 MB in Pillow's memory, 400 as floats."""
    image = Image.effect_noise((4096, 4096), 50)
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned.jpg" else 1
    if kind == "alpha.png":
        image = Image.merge("RGBA", [image] * 4)
    elif kind == "grey.png":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    else:
        image = image.convert("RGB")
    path = saved(image, tmp_path / f"a.{kind}", exif=exif)
    script = (
        "import resource, sys\n"
        "from wan.media.images import fit_picture, read_picture\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak()\n"
        "fit_picture(read_picture(sys.argv[1], (1, 2, 3)), 704, 1280, 'crop')\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    )
    assert float(done.stdout) < 200, kind

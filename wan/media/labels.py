"""Words in pictures: text in lines that fit, and pictures below each other with headings."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK = (32, 32, 32), (235, 235, 235)
FONT_SIZE, LINE_HEIGHT = 12, 16  # pixels
LEAST_WIDTH = 320  # of pictures with headings: narrower ones get an empty margin


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(FONT_SIZE)


def wrapped(text: str, width: int) -> list[str]:
    """Words in lines of at most so many pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font().getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def write_lines(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str]) -> None:
    """Write lines downwards from their upper left corner, `LINE_HEIGHT` pixels each."""
    pen.text(corner, "\n".join(lines), INK, font(), spacing=LINE_HEIGHT - FONT_SIZE)


def stacked(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its heading."""
    width = max(LEAST_WIDTH, *(picture.width for _, picture in pictures))
    headings = [wrapped(heading, width) for heading, _ in pictures]
    heights = [LINE_HEIGHT * len(lines) for lines in headings]
    total = sum(heights) + sum(picture.height for _, picture in pictures)
    whole = Image.new("RGB", (width, total), BACKGROUND)
    pen, top = ImageDraw.Draw(whole), 0
    for (_, picture), lines, height in zip(pictures, headings, heights, strict=True):
        write_lines(pen, (0, top), lines)
        whole.paste(picture, (0, top + height))
        top += height + picture.height
    return whole

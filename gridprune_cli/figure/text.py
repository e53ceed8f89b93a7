"""Text of a figure: wrapped to a width, in the characters that Pillow's own font has."""

import unicodedata
from functools import lru_cache

from PIL import ImageFont


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines no longer than `width` pixels, broken at spaces, and inside words that are longer than a line."""
    lines, line = [], ""
    for word in _printable(text).split():
        joined = f"{line} {word}" if line else word
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        line = ""
        for character in word:
            if line and font.getlength(line + character) > width:
                lines.append(line)
                line = ""
            line += character
    return [*lines, line]


def _printable(text: str) -> str:
    """Text with what Pillow's own font can't draw put in simpler characters, where there are such (é: e).

    Other scripts stay as they are, and come out as empty boxes.
    """
    simple = text.translate({0x2012: "-", 0x2013: "-", 0x2014: "-", 0x2212: "-", 0xD7: "x"})
    out = []
    for character in simple:
        if character.isspace():
            out.append(" ")
        elif character.isprintable():
            plain = "".join(c for c in unicodedata.normalize("NFKD", character) if _known(c))
            out.append(character if _known(character) or not plain else plain)
    return "".join(out)


@lru_cache(maxsize=4096)
def _known(character: str) -> bool:
    """Whether the font has this character: one that it lacks comes out as the box of an unassigned one."""
    font = font_of(20)
    mask, box = font.getmask(character), font.getmask("\uffff")
    return mask.size != box.size or bytes(mask) != bytes(box)


@lru_cache(maxsize=32)
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, `size` pixels high, at least 1."""
    font = ImageFont.load_default(max(1, size))
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font

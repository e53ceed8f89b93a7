"""The figure in a terminal: half blocks in 24-bit colour, or plain characters."""

from PIL import Image

from gridprune_cli.figure.data import REGION, Figure, Panel, Rect, dimmed, kept_mask


def coarse(figure: Figure, *, colour: bool, columns: int = 48) -> str:
    """The picture for a terminal, `columns` characters wide (fewer where it would be taller than that many lines).

    With colour: half blocks in 24-bit colour. Without: `#` kept, `.` dropped, `+ - |` the region's border. A place
    counts as kept where a token of any view keeps it. Raises ValueError where columns is under 1.
    """
    if columns < 1:
        raise ValueError(f"a terminal picture needs 1 column or more, not {columns}")
    aspect = figure.image.height / figure.image.width
    columns = max(1, round(min(columns, 2 * columns / aspect)))
    lines = max(1, round(columns * aspect / 2))  # a character is about twice as high as wide
    height = 2 * lines if colour else lines
    panel = Panel(0, 0, columns, height, (0.0, 0.0, 1.0, 1.0))
    mask = kept_mask(figure, range(len(figure.views)), panel)
    border = panel.region(figure.region) if figure.region is not None else None
    if not colour:
        grid = [["#" if mask.getpixel((x, y)) else "." for x in range(columns)] for y in range(height)]
        if border is not None:
            for x, y, mark in _border(border):
                grid[y][x] = mark
        return "\n".join("".join(line) for line in grid)
    picture = figure.image.convert("RGB").resize((columns, height), Image.Resampling.BOX)
    picture = Image.composite(picture, dimmed(picture), mask)
    if border is not None:
        for x, y, _ in _border(border):
            picture.putpixel((x, y), REGION)
    out = []
    for y in range(0, height, 2):
        cells = []
        for x in range(columns):
            over, under = picture.getpixel((x, y)), picture.getpixel((x, y + 1))
            assert isinstance(over, tuple) and isinstance(under, tuple)
            cells.append("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*over, *under))
        out.append("".join(cells) + "\x1b[0m")
    return "\n".join(out)


def _border(rect: Rect) -> list[tuple[int, int, str]]:
    """The border cells of a rectangle, each with the character that draws it."""
    left, top, right, bottom = rect[0], rect[1], rect[2] - 1, rect[3] - 1
    sides = [(x, y, "-") for x in range(left, right + 1) for y in (top, bottom)]
    sides += [(x, y, "|") for x in (left, right) for y in range(top, bottom + 1)]
    return sides + [(x, y, "+") for x in (left, right) for y in (top, bottom)]

"""The figure as a picture, to be saved as PNG: kept tokens beside relevance, over question, answer and details."""

from collections.abc import Sequence

from PIL import Image, ImageChops, ImageDraw, ImageOps

from gridprune_cli.figure.data import REGION, Box, Figure, Panel, Rect, View, dimmed, kept_mask, starts
from gridprune_cli.figure.text import font_of, wrap

Colour = tuple[int, int, int]

_PAPER, _PADDING, _INK, _SOFT = (255, 255, 255), (232, 232, 235), (28, 28, 32), (112, 112, 120)
_GRAY, _COVER = (128, 128, 128), 0.74  # a plain picture under the heat map, and the map's opacity
_KEPT = (255, 184, 28)
_HEAT: tuple[Colour, ...] = (  # evenly spaced anchors; lightness rises steadily from first to last
    (14, 8, 38),
    (66, 16, 110),
    (132, 32, 122),
    (196, 52, 100),
    (238, 104, 58),
    (250, 172, 40),
    (252, 244, 150),
)

_SHARP = 2  # everything is drawn this much larger, then scaled down, for smooth edges
_UNITS = 1200  # sizes below are in units: the figure is this many units wide, whatever its width in pixels
_MARGIN, _GAP, _HEADER, _LINE = 20, 24, 42, 30
_TEXT, _SMALL, _TINY = 22, 19, 11


def draw(figure: Figure, width: int = 1200) -> Image.Image:
    """The figure, `width` pixels wide: kept tokens beside relevance, over question, answer and details.

    Pictures more than twice as wide as high get their panels one above the other. Views that overlap (a base view and
    its tiles) get a row of panels each. A picture that a view pads shows its padding. Raises ValueError where width is
    under 200.
    """
    if width < 200:
        raise ValueError(f"a figure needs a width of 200 pixels or more, not {width}")
    unit = width * _SHARP / _UNITS
    page_width = width * _SHARP
    layers = _layers(figure.views)
    size, extent, stacked = _panel_size(figure, page_width, unit)
    margin, gap, header = round(_MARGIN * unit), round(_GAP * unit), round(_HEADER * unit)
    right = margin if stacked else (page_width + gap) // 2
    panels, y = [], margin
    for _ in layers:
        first = Panel(margin, y + header, *size, extent)
        if stacked:
            y = first.top + first.height + gap // 2
        panels.append((first, Panel(right, y + header, *size, extent)))
        y += header + size[1] + gap
    caption = _caption(figure, page_width - 2 * margin, unit)
    page = Image.new("RGB", (page_width, -(-(y + caption.height + margin) // _SHARP) * _SHARP), _PAPER)
    for layer, (first, second) in zip(layers, panels, strict=True):
        suffix = f" · view{'s' if len(layer) > 1 else ''} {_span(layer)}" if len(layers) > 1 else ""
        _draw_kept(page, figure, layer, first, unit, "Kept tokens" + suffix)
        _draw_relevance(page, figure, layer, second, unit, suffix)
    page.paste(caption, (margin, y))
    return page.reduce(_SHARP)


# ---- layout ----------------------------------------------------------------------------------------------------------


def _layers(views: Sequence[View]) -> list[list[int]]:
    """Views in layers: each goes to the first layer where its box overlaps no other."""
    layers: list[list[int]] = []
    for n, view in enumerate(views):
        free = (layer for layer in layers if not any(_overlap(view.box, views[other].box) for other in layer))
        layer = next(free, None)
        if layer is None:
            layers.append([n])
        else:
            layer.append(n)
    return layers


def _overlap(a: tuple[float, ...], b: tuple[float, ...], slack: float = 1e-6) -> bool:
    return all(a[i] < b[i + 2] - slack and b[i] < a[i + 2] - slack for i in (0, 1))


def _span(layer: list[int]) -> str:
    """The views of a layer, counted from 1: "1", "2-5", "2, 4"."""
    numbers = [n + 1 for n in layer]
    if len(numbers) > 1 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return ", ".join(map(str, numbers))


def _panel_size(figure: Figure, page_width: int, unit: float) -> tuple[tuple[int, int], Box, bool]:
    """Size of a panel in pixels, the part of the picture that it shows, and whether panels lie one above the other."""
    boxes = [(0.0, 0.0, 1.0, 1.0), *(view.box for view in figure.views)]
    left, top, right, bottom = (pick(box[i] for box in boxes) for i, pick in enumerate((min, min, max, max)))
    wide, high = figure.image.width * (right - left), figure.image.height * (bottom - top)
    stacked = wide > 2 * high
    slot = page_width - 2 * round(_MARGIN * unit)
    if not stacked:
        slot = (slot - round(_GAP * unit)) // 2
    tokens = [figure.image.width * (view.box[2] - view.box[0]) / view.cols for view in figure.views]
    legible = min(12 * unit / min(tokens), 3 * slot / high)  # a tall picture grows until tokens are 12 units wide
    scale = min(slot / wide, max(1.25 * slot / high, legible))
    return (max(1, round(wide * scale)), max(1, round(high * scale))), (left, top, right, bottom), stacked


# ---- panels ----------------------------------------------------------------------------------------------------------


def _draw_kept(page: Image.Image, figure: Figure, layer: list[int], panel: Panel, unit: float, title: str) -> None:
    """The picture in a panel, dropped tokens dimmed, with zones, budgets and region."""
    # 1. padding, and the picture on it
    picture, mask = _picture(figure.image, panel), kept_mask(figure, layer, panel)
    corner = (panel.left, panel.top)
    page.paste(_PADDING, (*corner, panel.left + panel.width, panel.top + panel.height))
    left, top, right, bottom = panel.place((0.0, 0.0, 1.0, 1.0))
    inside = mask.crop((left - panel.left, top - panel.top, right - panel.left, bottom - panel.top))
    page.paste(Image.composite(picture, dimmed(picture), inside), (left, top))

    # 2. zones, and the contour of what is kept
    zones = [(panel.cells(figure.views[zone[0]], *zone[1:5]), zone[5]) for zone in figure.zones if zone[0] in layer]
    dashes = Image.new("RGBA", page.size)  # apart, since zones share sides, and twice the ink would show
    for rect, _ in zones:
        _dash(dashes, rect, unit)
    page.paste(dashes, (0, 0), dashes)
    sides = [_sides(panel.cells(figure.views[n], 0, 0, 1, 1)) for n in layer]
    stroke = round(max(1.0, min(3 * unit, 0.15 * min(min(side) for side in sides))))
    page.paste(_KEPT, corner, _contour(mask, stroke))
    # 3. the region, and budgets where they cover neither its label nor its border
    taken: list[Rect] = []
    if figure.region is not None:
        left, top, right, bottom = rect = panel.region(figure.region)
        _outline(page, rect, unit)
        taken += _tag(page, rect, panel, mask, unit)
        taken += [(left, top, right, top), (left, bottom, right, bottom)]
        taken += [(left, top, left, bottom), (right, top, right, bottom)]
    for rect, budget in zones:
        _budget(page, rect, budget, taken, panel, mask, round(stroke + 2 * unit), unit)
    _header(page, panel, title, unit, zoned=bool(zones))


def _draw_relevance(
    page: Image.Image, figure: Figure, layer: list[int], panel: Panel, unit: float, suffix: str
) -> None:
    """Relevance as a heat map over the gray picture in a panel; the plain picture where there is no relevance."""
    picture = _picture(figure.image, panel)
    padding = _PADDING if figure.relevance is None else _GRAY
    page.paste(padding, (panel.left, panel.top, panel.left + panel.width, panel.top + panel.height))
    corner = panel.place((0.0, 0.0, 1.0, 1.0))[:2]
    if figure.relevance is None:
        page.paste(picture, corner)
        _header(page, panel, "Picture", unit)
    else:
        flat = ImageOps.grayscale(picture).point(
            lambda value: round(40 + 0.7 * value)
        )  # contrast would read as relevance
        page.paste(flat.convert("RGB"), corner)
        low, high = min(figure.relevance), max(figure.relevance)
        first = starts(figure.views)
        for n in layer:
            view = figure.views[n]
            values = figure.relevance[first[n] : first[n + 1]]
            heat = Image.new("L", (view.cols, view.rows))
            heat.putdata([round(255 * (value - low) / (high - low)) if high > low else 0 for value in values])
            rect = panel.cells(view, 0, 0, view.rows, view.cols)
            heat = heat.resize(_sides(rect), Image.Resampling.NEAREST)
            page.paste(Image.blend(page.crop(rect), _heat(heat), _COVER), rect[:2])
        _header(page, panel, "Relevance" + suffix, unit, scale=(low, high))
    if figure.region is not None:
        _outline(page, panel.region(figure.region), unit)


def _picture(image: Image.Image, panel: Panel) -> Image.Image:
    return image.convert("RGB").resize(_sides(panel.place((0.0, 0.0, 1.0, 1.0))), Image.Resampling.LANCZOS)


def _heat(values: Image.Image) -> Image.Image:
    """Colours of `_HEAT` for an "L" image of values, 0 lowest and 255 highest."""
    bands = []
    for channel in range(3):
        table = []
        for value in range(256):
            place = value / 255 * (len(_HEAT) - 1)
            n = min(int(place), len(_HEAT) - 2)
            low, high = _HEAT[n][channel], _HEAT[n + 1][channel]
            table.append(round(low + (high - low) * (place - n)))
        bands.append(values.point(table))
    return Image.merge("RGB", bands)


def _contour(mask: Image.Image, stroke: int) -> Image.Image:
    """The inner rim of a mask's areas, `stroke` pixels wide."""
    inner = ImageOps.expand(mask, stroke, 0)
    for dx, dy in ((stroke, 0), (0, stroke)):  # tokens are wider than a stroke, so looking a stroke away is enough
        aside = ImageChops.darker(ImageChops.offset(inner, dx, dy), ImageChops.offset(inner, -dx, -dy))
        inner = ImageChops.darker(inner, aside)
    return ImageChops.subtract(mask, ImageOps.crop(inner, stroke))


# ---- marks and text --------------------------------------------------------------------------------------------------


def _dash(canvas: Image.Image, rect: Rect, unit: float) -> None:
    """A thin border of light and dark dashes, to show on any picture. Dashes of zones that share a side coincide."""
    pen = ImageDraw.Draw(canvas, "RGBA")
    half, period = max(1, round(0.5 * unit)), max(1, round(6 * unit))
    for axis in (0, 1):
        for at in (rect[1 - axis], rect[3 - axis]):
            start, end = rect[axis], rect[axis + 2]
            for n in range(start // period, -(-end // period)):
                first, last = max(start, n * period), min(end, (n + 1) * period) - 1
                box = (first, at - half, last, at + half - 1)
                fill = (255, 255, 255, 215) if n % 2 else (0, 0, 0, 110)
                pen.rectangle(box if axis == 0 else (box[1], box[0], box[3], box[2]), fill=fill)


def _outline(page: Image.Image, rect: Rect, unit: float) -> None:
    """The region's border, around `rect`, so that it hides nothing inside."""
    pen = ImageDraw.Draw(page)
    left, top, right, bottom = rect
    for reach, colour in ((5.5, _INK), (4.5, REGION)):
        n = round(reach * unit)
        for side in (
            (left - n, top - n, right + n - 1, top - 1),
            (left - n, bottom, right + n - 1, bottom + n - 1),
            (left - n, top, left - 1, bottom - 1),
            (right, top, right + n - 1, bottom - 1),
        ):
            pen.rectangle(side, fill=colour)


def _tag(page: Image.Image, rect: Rect, panel: Panel, mask: Image.Image, unit: float) -> list[Rect]:
    """Labels the region, at its border or inside. Returns where; nothing where the panel is too small."""
    font = font_of(round(_SMALL * unit))
    text = "contextual region"
    wide, high = round(font.getlength(text) + 14 * unit), round(26 * unit)
    reach = round(4.5 * unit)
    left, right, top, bottom = rect[0] - reach, rect[2] + reach - wide, rect[1], rect[3] - high
    places = [(x, y) for y in (top - high, bottom + high) for x in (left, right)]
    places += [(x, y) for x in (left - wide + reach, right + wide - reach) for y in (top, bottom)]
    places += [(x, y) for y in (top, bottom) for x in (left, right)]
    places += [(max(panel.left, min(x, panel.left + panel.width - wide)), y) for x, y in places]
    plate = _freest([(x, y, x + wide, y + high) for x, y in places], panel, mask)
    if plate is None:
        return []
    pen = ImageDraw.Draw(page)
    pen.rectangle((plate[0], plate[1], plate[2] - 1, plate[3] - 1), fill=REGION)
    pen.text((plate[0] + wide / 2, plate[1] + high / 2), text, _INK, font=font, anchor="mm")
    return [plate]


def _budget(
    page: Image.Image,
    rect: Rect,
    budget: int,
    taken: list[Rect],
    panel: Panel,
    mask: Image.Image,
    inset: int,
    unit: float,
) -> None:
    """Writes a zone's budget on a plate in a free corner; leaves it out where the zone is too small."""
    size = round(min(_SMALL * unit, 0.3 * min(_sides(rect))))
    if size < _TINY * unit:
        return
    font = font_of(size)
    wide, high = round(font.getlength(str(budget)) + 0.6 * size), round(1.15 * size)
    corners = [
        (x, y, x + wide, y + high)
        for x in (rect[2] - inset - wide, rect[0] + inset)
        for y in (rect[3] - inset - high, rect[1] + inset)
        if wide + 2 * inset <= rect[2] - rect[0]
    ]
    plate = _freest([c for c in corners if not any(_touch(c, other, inset) for other in taken)], panel, mask)
    if plate is not None:
        pen = ImageDraw.Draw(page, "RGBA")
        ink, shade = (255, 200) if budget else (150, 120)  # zones that keep nothing stand back
        box = (plate[0], plate[1], plate[2] - 1, plate[3] - 1)
        pen.rounded_rectangle(box, 0.2 * size, fill=(*_INK, shade))
        middle = (plate[0] + wide / 2, plate[1] + high / 2)
        pen.text(middle, str(budget), (255, 255, 255, ink), font=font, anchor="mm")


def _freest(plates: list[Rect], panel: Panel, mask: Image.Image) -> Rect | None:
    """The first of the plates that hide least of the kept tokens, among those that lie inside the panel."""
    x, y = panel.left, panel.top
    local = [(plate, (plate[0] - x, plate[1] - y, plate[2] - x, plate[3] - y)) for plate in plates]
    inside = [(mask.crop(at).histogram()[255], plate) for plate, at in local if _within(at, mask.size)]
    return min(inside, key=lambda pair: pair[0])[1] if inside else None


def _within(rect: Rect, size: tuple[int, int]) -> bool:
    return rect[0] >= 0 and rect[1] >= 0 and rect[2] <= size[0] and rect[3] <= size[1]


def _touch(a: Rect, b: Rect, gap: int) -> bool:
    return all(a[i] < b[i + 2] + gap and b[i] < a[i + 2] + gap for i in (0, 1))


def _header(
    page: Image.Image,
    panel: Panel,
    title: str,
    unit: float,
    *,
    zoned: bool = False,
    scale: tuple[float, float] | None = None,
) -> None:
    """The title over a panel, then the zones' key, or the colour bar with its lowest and highest value."""
    pen = ImageDraw.Draw(page, "RGBA")
    font, small = font_of(round(_TEXT * unit)), font_of(round(_SMALL * unit))
    y = panel.top - round(19 * unit)
    x = round(panel.left + font.getlength(title) + 18 * unit)
    pen.text((panel.left, y), title, _INK, font=font, anchor="lm", stroke_width=0.3 * unit)
    side = round(16 * unit)
    if zoned:
        pen.rectangle((x, y - side // 2, x + 2 * side, y + side // 2), fill=(120, 120, 126))
        _dash(page, (x, y - side // 2, x + 2 * side, y + side // 2), unit)
        pen.text((x + 2.6 * side, y), "zone and its budget", _SOFT, font=small, anchor="lm")
    if scale is not None:
        low, high = (f"{value:.3g}" for value in scale)
        pen.text((x, y), low, _SOFT, font=small, anchor="lm")
        x += round(small.getlength(low) + 8 * unit)
        bar = Image.linear_gradient("L").rotate(90).resize((round(120 * unit), side))
        gray = Image.new("RGB", bar.size, _GRAY)  # so that the bar's colours are those in the panel
        page.paste(Image.blend(gray, _heat(bar), _COVER), (x, y - side // 2))
        pen.text((x + bar.width + 8 * unit, y), high, _SOFT, font=small, anchor="lm")


def _caption(figure: Figure, width: int, unit: float) -> Image.Image:
    """Question, answer and details, wrapped to `width` pixels."""
    font, line, indent = font_of(round(_TEXT * unit)), round(_LINE * unit), round(110 * unit)
    labelled = [("Question", figure.question), ("Answer", figure.answer), ("Kept", figure.details)]
    texts = [(label, wrap(text, font, width - indent)) for label, text in labelled if text]
    image = Image.new("RGB", (width, line * max(1, sum(len(lines) for _, lines in texts))), _PAPER)
    pen, y = ImageDraw.Draw(image), line // 2
    for label, lines in texts:
        pen.text((0, y), label, _SOFT, font=font, anchor="lm")
        for text in lines:
            pen.text((indent, y), text, _INK, font=font, anchor="lm")
            y += line
    return image


def _sides(rect: Rect) -> tuple[int, int]:
    return rect[2] - rect[0], rect[3] - rect[1]

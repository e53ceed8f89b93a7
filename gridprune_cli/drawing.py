"""The figure of a pruned set, over the picture that it was made from."""

import io

from gridprune_cli.figure import Figure, draw
from gridprune_cli.image_files import Source
from gridprune_cli.images import load_image
from gridprune_cli.pruning.zones import zone_index
from gridprune_cli.tokens import Origin, PrunedSet


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    png = io.BytesIO()
    draw(figure).save(png, "PNG")
    return png.getvalue()


def figure_of(source: Source, pruned: PrunedSet, answer: str | None) -> Figure:
    """What there is to draw of a pruned set. Raises BadInput where the picture can't be read."""
    (origin,) = pruned.images
    kept = f"{len(pruned.kept)} of {pruned.count} tokens"
    compressed = "" if pruned.plc == "off" else f"plc {pruned.plc}"
    return Figure(
        image=load_image(source).image,
        views=origin.views,
        kept=pruned.selected.tolist(),
        relevance=None if pruned.relevance is None else pruned.relevance.tolist(),
        zones=_budgets(origin, pruned.method.get("zone", 1)),
        region=origin.region,
        question=pruned.question,
        answer=answer,
        details=" · ".join(filter(None, (kept, pruned.method["name"], compressed, str(pruned.schedule or "")))),
    )


def _budgets(origin: Origin, zone: int) -> list[tuple[int, int, int, int, int, int]]:
    """Every zone's rectangle with its budget."""
    if origin.zones is None:
        return []
    _, zones = zone_index(origin.views, zone)
    return [(*rectangle, n) for rectangle, n in zip(zones.rectangles(), origin.zones["budgets"], strict=True)]

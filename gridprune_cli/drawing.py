"""The figure of a pruned set, over the picture that it was made from."""

import io

from gridprune_cli.figure import Figure, draw
from gridprune_cli.figure.plain import plain_figures
from gridprune_cli.image_files import Source
from gridprune_cli.images import load_image
from gridprune_cli.tokens import PrunedSet


def to_png(figure: Figure) -> bytes:
    """The figure as the bytes of a PNG file."""
    png = io.BytesIO()
    draw(figure).save(png, "PNG")
    return png.getvalue()


def figure_of(source: Source, pruned: PrunedSet, answer: str | None) -> Figure:
    """What there is to draw of a pruned set. Raises BadInput where the picture can't be read."""
    (origin,), (figure,) = pruned.images, plain_figures(pruned)
    kept = f"{len(pruned.kept)} of {pruned.count} tokens"
    compressed = "" if pruned.plc == "off" else f"plc {pruned.plc}"
    return Figure(
        image=load_image(source).image,
        views=origin.views,
        kept=figure["kept"],
        relevance=figure["relevance"],
        zones=figure["zones"],
        region=origin.region,
        question=pruned.question,
        answer=answer,
        details=" · ".join(filter(None, (kept, pruned.method["name"], compressed, str(pruned.schedule or "")))),
    )

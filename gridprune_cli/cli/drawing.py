"""The figure of a pruned set, for the commands that draw one."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gridprune_cli.figure import Figure
    from gridprune_cli.images import Source
    from gridprune_cli.tokens import PrunedSet


def draw_figure(source: "Source", pruned: "PrunedSet", answer: str | None, path: Path) -> None:
    """Writes the figure of a pruned set as PNG."""
    import io

    from gridprune_cli.cache.files import write_atomic
    from gridprune_cli.figure import draw

    png = io.BytesIO()
    draw(figure_of(source, pruned, answer)).save(png, "PNG")
    write_atomic(path, png.getvalue(), sync=True)


def figure_of(source: "Source", pruned: "PrunedSet", answer: str | None) -> "Figure":
    """What there is to draw of a pruned set."""
    from gridprune_cli.figure import Figure
    from gridprune_cli.figure.plain import plain_figures
    from gridprune_cli.images import load_image

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

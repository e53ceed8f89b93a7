"""What there is to draw of a pruned set, in plain values: for figures here, and for those that a browser draws."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gridprune_cli.figure.data import Zone
    from gridprune_cli.tokens import Origin, PrunedSet


def plain_figures(pruned: "PrunedSet") -> list[dict[str, Any]]:
    """Of each image its views, kept tokens, relevance, zones and region, as `Figure` has them; values of JSON alone.

    Indices and relevance count the image's own tokens, also where there are several images.
    """
    figures, first, selected = [], 0, pruned.selected
    for image in pruned.images:
        end = first + image.count
        figures.append(
            {
                "views": [{"rows": view.rows, "cols": view.cols, "box": list(view.box)} for view in image.views],
                "kept": (selected[(selected >= first) & (selected < end)] - first).tolist(),
                "relevance": None if pruned.relevance is None else pruned.relevance[first:end].tolist(),
                "zones": _budgets(image, pruned.method.get("zone", 1)),
                "region": list(image.region) if image.region else None,
            }
        )
        first = end
    return figures


def _budgets(image: "Origin", zone: int) -> "list[Zone]":
    """Every zone's rectangle with its budget."""
    from gridprune_cli.pruning.zones import zone_index

    if image.zones is None:
        return []
    rectangles = zone_index(image.views, zone)[1].rectangles()
    return [(*rectangle, n) for rectangle, n in zip(rectangles, image.zones["budgets"], strict=True)]

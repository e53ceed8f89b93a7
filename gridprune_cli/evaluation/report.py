"""The results as one HTML file: curves, bars per category, and the answers that pruning lost, with pictures.

Needs the extra `report`.
"""

import base64
import importlib.util
import io
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from PIL import Image

from gridprune_cli.errors import GridpruneError
from gridprune_cli.evaluation.data import Item
from gridprune_cli.evaluation.results import difference_heads, differences, region_line, relevance_line
from gridprune_cli.evaluation.run import FULL, Cell, Plan, Rows, place
from gridprune_cli.text import printable, visible

LOSSES = 6  # questions in the gallery
_WIDTH = 640  # of a picture, in pixels
_USUAL_KEEP = 0.11  # the default of `keep`
_COLOURS = (
    "#d1495b",
    "#00798c",
    "#edae49",
    "#30638e",
    "#6a994e",
    "#8d6a9f",
    "#b08968",
    "#5c677d",
    "#e07a5f",
    "#3a7d44",
)
_STYLES = ("-", "--", ":", "-.")


def lacking() -> str:
    """A line that says why there can be no report, or nothing: matplotlib is not installed."""
    missing = importlib.util.find_spec("matplotlib") is None
    return "no report.html: matplotlib missing; pip install 'gridprune[report]'" if missing else ""


def losses(plan: Plan, samples: Rows) -> tuple[list[Cell], list[Item]]:
    """The cells at the keep nearest to the default, and the questions on which they lose most against all tokens.

    At most `LOSSES`, the largest loss first: that of the method named first, then, of equal ones, that of all methods
    together, since a weak method loses everywhere; then in the order of the data. Only questions about one image, since
    several can't be drawn as one picture.
    """
    keeps = {cell.pruning.keep for cell in plan.cells if cell.name != FULL.name}
    nearest = min(keeps, key=lambda share: (abs(share - _USUAL_KEEP), share), default=None)
    cells = [cell for cell in plan.cells[1:] if cell.pruning.keep == nearest]

    def lost(item: Item) -> tuple[float, float]:
        of_cells = [samples[place(FULL, item)].score - samples[place(cell, item)].score for cell in cells]
        return max(of_cells[0], 0.0), sum(max(loss, 0.0) for loss in of_cells)

    drawable = [item for item in plan.data.items if len(item.images) == 1]
    worst = sorted((item for item in drawable if cells and lost(item)[1] > 0), key=lost, reverse=True)
    return cells, worst[:LOSSES]


def html(plan: Plan, results: dict[str, Any], samples: Rows, picture: Callable[[Cell, Item, str], Image.Image]) -> str:
    """The page. `picture` draws what a cell kept for a question, under its answer.

    Raises GridpruneError without the extra.
    """
    if line := lacking():
        raise GridpruneError(line)
    from jinja2 import Environment

    cells, worst = losses(plan, samples)
    gallery = [
        {
            "item": item,
            "full": samples[place(FULL, item)],
            "pictures": [
                {
                    "cell": cell,
                    "row": samples[place(cell, item)],
                    "data": _embedded(picture(cell, item, samples[place(cell, item)].answer)),
                }
                for cell in cells
            ],
        }
        for item in worst
    ]
    template = files("gridprune_cli.evaluation").joinpath("report.html").read_text("utf-8")
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=_shown)
        .from_string(template)
        .render(
            results=results,
            curves=_curves(results["cells"]),
            bars=_bars(results["cells"]),
            gallery=gallery,
            keep=cells[0].pruning.keep if cells else None,
            difference_heads=difference_heads(results["cells"]),
            differences=differences,
            relevance=relevance_line(results),
            regions=[region_line(cell) for cell in results["cells"] if "region" in cell],
        )
    )


def _shown(value: Any) -> Any:
    """A text of the page without characters that a terminal would obey; charts are marked as safe already."""
    return visible(value) if type(value) is str else value


def _embedded(image: Image.Image) -> str:
    """A picture as a data URL, JPEG: PNG would be ten times as large for photographs."""
    image = image.convert("RGB")
    image.thumbnail((_WIDTH, 4 * _WIDTH))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"


def _curves(cells: list[dict[str, Any]]) -> str:
    """Score against keep, a line a method with its standard errors, and all tokens as a level. SVG."""
    full = cells[0]
    axes, svg = _plot(7.5, 4.5)
    axes.axhline(100 * full["score"], color="#333333", linewidth=1, label=full["name"])
    for n, name in enumerate(_methods(cells)):
        of_method = sorted((cell for cell in cells[1:] if cell["name"] == name), key=lambda cell: cell["keep"])
        axes.errorbar(
            [100 * cell["keep"] for cell in of_method],
            [100 * cell["score"] for cell in of_method],
            [100 * cell["error"] for cell in of_method],
            label=printable(name),
            color=_COLOURS[n % len(_COLOURS)],
            linestyle=_STYLES[n // len(_COLOURS) % len(_STYLES)],
            marker="o",
            markersize=4,
            capsize=2,
        )
    per_cent = sorted({100 * cell["keep"] for cell in cells[1:]})
    axes.set(xscale="log", xlabel="visual tokens kept, %", ylabel="score, %")
    axes.set_xticks(per_cent, [f"{share:g}" for share in per_cent])
    axes.set_xticks([], minor=True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    return svg()


def _bars(cells: list[dict[str, Any]]) -> list[tuple[float, str]]:
    """For each keep, a group of bars a category: all tokens, then the methods. Nothing without categories."""
    categories = list(cells[0]["categories"])
    charts = []
    for share in sorted({cell["keep"] for cell in cells[1:]}, reverse=True) if categories else ():
        group = [cells[0], *(cell for cell in cells[1:] if cell["keep"] == share)]
        axes, svg = _plot(max(7.5, 0.14 * len(group) * len(categories)), 3.2)
        wide = 0.84 / len(group)
        for n, cell in enumerate(group):
            axes.bar(
                [place - 0.42 + (n + 0.5) * wide for place in range(len(categories))],
                [100 * cell["categories"][name]["score"] for name in categories],
                wide,
                label=printable(cell["name"]),
                color="#333333" if n == 0 else _COLOURS[_methods(cells).index(cell["name"]) % len(_COLOURS)],
            )
        axes.set_xticks(range(len(categories)), [printable(name) for name in categories])
        axes.set(ylabel="score, %")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        charts.append((share, svg()))
    return charts


def _methods(cells: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(cell["name"] for cell in cells[1:]))


def _plot(width: float, height: float) -> tuple[Any, Callable[[], str]]:
    """Axes on a new figure of this size in inches, and a function that gives its SVG, equal for equal figures.

    Labels are plain text, even between two `$`.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure((width, height))
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.4)
    axes.set_axisbelow(True)

    def svg() -> str:
        out = io.StringIO()
        for label in figure.findobj(Text):
            label.set_parse_math(False)
        with rc_context({"svg.hashsalt": "gridprune", "svg.fonttype": "none"}):
            figure.savefig(out, format="svg", bbox_inches="tight", metadata={"Date": None})
        return out.getvalue().partition("<svg")[1] + out.getvalue().partition("<svg")[2]

    return axes, svg

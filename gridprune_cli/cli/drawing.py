"""The figure of a pruned set, for the commands that draw one."""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gridprune_cli.cli.output import stdout
from gridprune_cli.client.remote import RemotePruned
from gridprune_cli.text import visible

if TYPE_CHECKING:
    from gridprune_cli.image_files import Source
    from gridprune_cli.tokens import PrunedSet

_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")  # all that a terminal may obey in a figure that a server has drawn


def draw_figure(source: "Source", pruned: "PrunedSet | RemotePruned", answer: str | None, path: Path) -> None:
    """Writes the figure of a pruned set as PNG."""
    from gridprune_cli.cache.files import write_atomic

    if isinstance(pruned, RemotePruned):
        png = pruned.figure
    else:
        from gridprune_cli.drawing import figure_of, to_png

        png = to_png(figure_of(source, pruned, answer))
    write_atomic(path, png, sync=True)


def figure_text(source: "Source", pruned: "PrunedSet | RemotePruned") -> str:
    """A coarse picture of a pruned set, for a terminal; of a server's nothing but colours is obeyed there."""
    if isinstance(pruned, RemotePruned):
        pieces = _COLOUR.split(pruned.figure.decode(errors="replace"))
        return "".join(piece if _COLOUR.fullmatch(piece) else visible(piece) for piece in pieces)
    from gridprune_cli.drawing import figure_of
    from gridprune_cli.figure import coarse

    return coarse(figure_of(source, pruned, None), colour=is_colour())


def is_colour() -> bool:
    """Whether the reader of stdout takes colours."""
    return stdout().isatty() and not os.environ.get("NO_COLOR")

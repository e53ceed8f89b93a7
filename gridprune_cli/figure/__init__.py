"""What pruning did, drawn: kept tokens, zones with their budgets, the contextual region, relevance."""

from gridprune_cli.figure.data import Figure
from gridprune_cli.figure.png import draw
from gridprune_cli.figure.terminal import coarse

__all__ = ["Figure", "coarse", "draw"]

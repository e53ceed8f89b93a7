"""gridprune: answers questions about images from the visual tokens that the question needs.

The pipeline in Python; see `docs/python.md`. Names are loaded when they are first used, so that `import gridprune_cli`
costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gridprune_cli.cache.store import Store, open_store
    from gridprune_cli.errors import BadInput, GridpruneError
    from gridprune_cli.pipeline import Answer, Pipeline
    from gridprune_cli.pruning.methods import make_method
    from gridprune_cli.questions import Exchange
    from gridprune_cli.settings import Pruning
    from gridprune_cli.tokens import EncodedImage, PrunedSet, load_pruned

_HOMES = {
    "BadInput": "errors",
    "GridpruneError": "errors",
    "Answer": "pipeline",
    "Pipeline": "pipeline",
    "Pruning": "settings",
    "make_method": "pruning.methods",
    "Store": "cache.store",
    "open_store": "cache.store",
    "EncodedImage": "tokens",
    "Exchange": "questions",
    "PrunedSet": "tokens",
    "load_pruned": "tokens",
}
__all__ = [
    "Answer",
    "BadInput",
    "EncodedImage",
    "Exchange",
    "GridpruneError",
    "Pipeline",
    "PrunedSet",
    "Pruning",
    "Store",
    "load_pruned",
    "make_method",
    "open_store",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"gridprune_cli.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gridprune_cli' has no attribute {name!r}")

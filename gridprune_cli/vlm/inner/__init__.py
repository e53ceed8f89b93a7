"""Visual tokens leave inside the language model: hooks on its layers, the model and its `generate` untouched."""

from gridprune_cli.vlm.inner.hooks import prune_inside
from gridprune_cli.vlm.inner.prefix import PrefixBatch, has_sliding_layers

__all__ = ["PrefixBatch", "has_sliding_layers", "prune_inside"]

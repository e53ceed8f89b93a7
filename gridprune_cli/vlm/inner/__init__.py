"""Visual tokens leave inside the language model: hooks on its layers, the model and its `generate` untouched."""

from gridprune_cli.vlm.inner.hooks import prune_inside

__all__ = ["prune_inside"]

"""Whether a pruned set fits a model: image embeds made for one language model mean nothing to another."""

import hashlib
import json

import torch
from torch import Tensor

from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.weights import tensors

_BLOCK = 4096  # bytes that are read at the start, in the middle and at the end of each weight
_ELSEWHERE = ("vision", "visual", "projector", "connector", "image_newline")  # in names of what is no language model's


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells language models apart: sha256 over its config, and the name, shape and samples of each of its weights.

    Samples, since all of them would take as long as loading them. Training changes nearly every value of the weights
    that it does not freeze, and merging an adapter nearly every one of those that it adapts, so some sample differs; a
    change of single values need not show. Reads nothing of the vision tower and the projector, so it is the same where
    those have been taken away. Raises GridpruneError where the checkpoint has no weights of a language model.
    """
    config = checkpoint.config.get("text_config", checkpoint.config)
    samples = {
        name: f"{name} {tuple(tensor.shape)} {_sample(tensor)}"
        for name, tensor in tensors(checkpoint.folder)
        if not any(word in name for word in _ELSEWHERE)
    }
    if not samples:
        raise GridpruneError("no language model among its weights", place=str(checkpoint.folder))
    lines = [json.dumps(config, sort_keys=True), *(samples[name] for name in sorted(samples))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _sample(tensor: Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8)
    middle = (len(data) - _BLOCK) // 2
    blocks = [data] if len(data) <= 3 * _BLOCK else [data[:_BLOCK], data[middle : middle + _BLOCK], data[-_BLOCK:]]
    return hashlib.sha256(b"".join(block.numpy().tobytes() for block in blocks)).hexdigest()

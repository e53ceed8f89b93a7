"""From a pruned set to text: the language model alone, driven through transformers' own `generate`."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family


@dataclass(frozen=True)
class Generated:
    """The answer, its token ids, and milliseconds until its first token and from there to its end."""

    text: str
    ids: tuple[int, ...]
    prefill: float
    decode: float


class _Clock(LogitsProcessor):
    """Notes when the first logits came. Changes nothing."""

    first: float | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.first is None:
            if scores.is_cuda:
                torch.cuda.synchronize()
            self.first = time.perf_counter()
        return scores


@torch.inference_mode()
def generate(family: Family, pruned: PrunedSet, max_new_tokens: int, **options: Any) -> Generated:
    """Answers from a pruned set, greedily. Loads the language model only. `options` go to transformers' `generate`."""
    model = family.load("language")
    ids = pruned.input_ids[None].to(family.device)
    clock, start = _Clock(), time.perf_counter()
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),  # else a pad id inside the prompt would be masked
        position_ids=pruned.position_ids[..., None, :].to(family.device),
        mm_encoder_outputs={"image": family.features(pruned)},
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList([clock]),
        **{"do_sample": False} | options,
    )
    end = time.perf_counter()
    answer = out[0, ids.shape[1] :]
    first = clock.first or end
    text = family.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return Generated(text, tuple(answer.tolist()), 1e3 * (first - start), 1e3 * (end - first))

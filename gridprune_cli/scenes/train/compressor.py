"""The third stage: the compressor of `--plc trained`."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration

from gridprune_cli.pruning.compress import cell_weights, cells
from gridprune_cli.pruning.compress import pool as pool_states
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.region import contextual_region, inside
from gridprune_cli.pruning.signals import Signals, View
from gridprune_cli.scenes import model as built
from gridprune_cli.scenes.scene import questions
from gridprune_cli.scenes.train.data import Pool
from gridprune_cli.scenes.train.language import answer_loss, pack
from gridprune_cli.scenes.train.plan import N, Plan
from gridprune_cli.vlm.compressor import Compressor


class Compression(nn.Module):
    """The compressor, before a language model that is frozen. Questions come one by one: each has its own rows."""

    def __init__(self, llava: LlavaForConditionalGeneration, clip: CLIPModel) -> None:
        super().__init__()
        self.compressor = Compressor(built.WIDTH)
        self.frozen = (llava.requires_grad_(False), clip.requires_grad_(False))  # a tuple: no part of what is saved
        self.tokenizers = (built.make_tokenizer(close=False), built.make_tokenizer(close=True))
        self.features = np.empty((0, N, built.WIDTH), np.float16)  # of the scenes, (scenes, N, D)
        self.saliency = np.empty((0, N), np.float32)

    @torch.no_grad()
    def relevance(self, states: Tensor, texts: list[str]) -> Tensor:
        """Cosines `(B, N)` of states `(B, N, D)` with a question each, as `ClipRelevance` has them."""
        clip = self.frozen[1]
        tokens = self.tokenizers[1](texts, padding=True, return_tensors="pt").to(states.device)
        text = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
        patches = clip.visual_projection(clip.vision_model.post_layernorm(states))
        return torch.einsum("bnd,bd->bn", F.normalize(patches.float(), dim=-1), text)

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        rng = random.Random(f"compressor-{plan.first_seed}-{step}")
        index = pool.batch(step, plan)
        asked = [questions(pool.scene(int(i)), 1, rng) for i in index]
        states = torch.from_numpy(self.features[index]).float().to(device)
        saliency = torch.from_numpy(self.saliency[index])
        with torch.autocast(device.type, enabled=False):  # so that what is chosen is what will be
            relevance = self.relevance(states, [question.text for (question,) in asked])
        view, k = (View(built.GRID, built.GRID),), plan.tokens_at(step)
        method = GridPrune(temperature=0.1, region_share=0.8)
        chosen, pooled, within = [], [], []
        for b, cosines in enumerate(relevance.cpu()):
            region = contextual_region(cosines, view)
            kept = method.select_batch([Signals(view, cosines, saliency[b], region)], [k])[0]
            within.append(inside(view, region))
            cell = cells(view, kept, within[-1])
            pooled.append(pool_states(states[b].cpu(), cell, cell_weights(cell, saliency[b], k), k))
            chosen.append(kept)
        kept, inner = torch.stack(chosen), torch.stack(within)
        rows = self.compressor(
            states, relevance, inner.to(device), torch.stack(pooled).to(device), inner.gather(1, kept).to(device)
        )

        owners = torch.from_numpy(pool.owners[index]).long()
        packed = pack(asked, kept, owners, self.tokenizers[0], rng)
        return {"answer": answer_loss(self.frozen[0], rows, packed)}

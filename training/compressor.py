"""The third stage: the compressor of `--plc trained`."""

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel, LlavaForConditionalGeneration

from gridprune_cli.pruning.compress import cell_weights, cells
from gridprune_cli.pruning.compress import pool as pool_features
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.region import contextual_region, inside
from gridprune_cli.pruning.signals import Signals, View
from gridprune_cli.scenes.questions import questions
from gridprune_cli.vlm.compressor import Compressor
from training import model as built
from training.data import Pool
from training.language import answer_loss, pack
from training.plan import N, Plan


class Compression(nn.Module):
    """The compressor before the frozen language model. One question per image, since each has tokens of its own."""

    def __init__(self, llava: LlavaForConditionalGeneration, clip: CLIPModel) -> None:
        super().__init__()
        self.compressor = Compressor(built.WIDTH)
        self.frozen = (llava.requires_grad_(False), clip.requires_grad_(False))  # a tuple keeps them out of state_dict
        self.tokenizers = (built.make_tokenizer(close=False), built.make_tokenizer(close=True))
        self.features = np.empty((0, N, built.WIDTH), np.float16)  # vision features of the scenes, (scenes, N, D)
        self.saliency = np.empty((0, N), np.float32)  # (scenes, N)

    @torch.no_grad()
    def relevance(self, vision_features: Tensor, texts: list[str]) -> Tensor:
        """Cosines `(B, N)` of vision features `(B, N, D)` with one question each, as `ClipRelevance` computes them."""
        clip = self.frozen[1]
        tokens = self.tokenizers[1](texts, padding=True, return_tensors="pt").to(vision_features.device)
        text = F.normalize(clip.get_text_features(**tokens).pooler_output.float(), dim=-1)
        patches = clip.visual_projection(clip.vision_model.post_layernorm(vision_features))
        return torch.einsum("bnd,bd->bn", F.normalize(patches.float(), dim=-1), text)

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        # 1. one question per scene, with the stored output of the tower
        rng = random.Random(f"compressor-{plan.first_seed}-{step}")
        index = pool.batch(step, plan)
        asked = [questions(pool.scene(int(i)), 1, rng) for i in index]
        vision_features = torch.from_numpy(self.features[index]).float().to(device)  # (B, N, D)
        saliency = torch.from_numpy(self.saliency[index])  # (B, N)

        # 2. the tokens that pruning would keep of each by its zones' budgets, K a scene, and the pooled start of the
        #    compressor
        with torch.autocast(device.type, enabled=False):  # in float32, as the selection is at inference
            relevance = self.relevance(vision_features, [question.text for (question,) in asked])
        view, k = (View(built.GRID, built.GRID),), plan.tokens_at(step)
        method = GridPrune(temperature=0.1, region_share=0.8, few="top")
        chosen, pooled, within = [], [], []
        for b, cosines in enumerate(relevance.cpu()):
            region = contextual_region(cosines, view)
            kept = method.select_batch([Signals(view, cosines, saliency[b], region)], [k])[0]
            within.append(inside(view, region))
            cell = cells(view, kept, within[-1])
            pooled.append(pool_features(vision_features[b].cpu(), cell, cell_weights(cell, saliency[b], k), k))
            chosen.append(kept)
        kept, inner = torch.stack(chosen), torch.stack(within)  # (B, K), (B, N)

        # 3. the answers' loss on the compressed tokens
        compressed = self.compressor(  # (B, K, D)
            vision_features,
            relevance,
            inner.to(device),
            torch.stack(pooled).to(device),
            inner.gather(1, kept).to(device),
        )
        owners = torch.from_numpy(pool.owners[index]).long()
        packed = pack(asked, kept, owners, self.tokenizers[0], rng)
        return {"answer": answer_loss(self.frozen[0], compressed, packed)}

"""The first stage: vision and text tower of the hard checkpoint."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from training import tower as first
from training.data import IGNORE, normalise, some_patches
from training.hard import model as built
from training.hard.data import CLASSES, HardPool
from training.hard.questions import questions
from training.hard.scene import PATCH
from training.plan import Plan

NOTHING = 0.2  # weight of the class "nothing", which most patches are of
QUESTIONS = 2  # a scene


def contents_loss(logits: Tensor, table: Tensor) -> Tensor:
    """Sum over the heads of the cross-entropy of what patches show themselves.

    logits  (B, n, sum of CLASSES)
    table   (B, n, 4)  as `contents` has them
    """
    loss = torch.zeros((), device=logits.device)
    for i, scores in enumerate(logits.float().split(list(CLASSES), -1)):
        weight = torch.ones(CLASSES[i], device=logits.device)
        weight[0] = 1 if i == 3 else NOTHING
        loss = loss + F.cross_entropy(scores.flatten(0, 1), table[..., i].flatten(), weight, ignore_index=IGNORE)
    return loss


def embed(vision: Any, pictures: np.ndarray, chosen: Tensor) -> Tensor:
    """The input of a vision tower's first layer `(B, 1 + n, D)`, CLS first, of the chosen patches `(B, n)` alone.

    As `vision.embeddings` makes it of whole pictures, without the work for the patches that are not chosen.
    """
    index = torch.arange(len(chosen))[:, None]
    blocks = torch.from_numpy(pictures).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH)  # (B, 24, 24, 3, 14, 14)
    blocks = blocks.flatten(1, 2)[index, chosen].flatten(0, 1).permute(0, 2, 3, 1)  # (B * n, 14, 14, 3)
    patches = normalise(blocks.numpy(), vision.device).flatten(1).unflatten(0, chosen.shape)
    noise = 0.05 * torch.randn(len(patches), 1, 1, device=patches.device)
    weights, positions = vision.embeddings.patch_embedding.weight, vision.embeddings.position_embedding.weight
    x = F.linear(patches + noise, weights.flatten(1)) + positions[1:][chosen]
    start = (vision.embeddings.class_embedding + positions[0]).expand(len(x), 1, -1)
    return vision.pre_layrnorm(torch.cat([start, x], 1))


class HardTower(first.Tower):
    """The CLIP model with the heads that only training needs."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.clip = CLIPModel(built.clip_config())
        self.clip.set_attn_implementation("eager")
        self.heads = nn.Linear(built.WIDTH, sum(CLASSES))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.tokenizer = built.make_tokenizer(close=True)

    def losses(self, pool: HardPool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:  # type: ignore[override]
        # 1. pictures of a step, some of their patches, and noise on the brightness
        rng = random.Random(f"hard-tower-{plan.first_seed}-{step}")
        generator = torch.Generator().manual_seed(step)
        index = pool.batch(step, plan)
        scenes = [pool.scene(int(i)) for i in index]
        table = torch.from_numpy(pool.contents[index]).long().transpose(1, 2)  # (B, N, 5)
        chosen = some_patches(table[..., 0], plan.tokens_at(step), generator)
        shown = table.gather(1, chosen[..., None].expand(-1, -1, 5))  # (B, n, 5)
        x = embed(self.clip.vision_model, np.array(pool.pixels[index]), chosen.to(device))
        for layer in (layers := self.clip.vision_model.encoder.layers)[:-1]:
            x = layer(x, None)
        penultimate, last = x, layers[-1](x, None)

        # 2. a patch tells what it shows itself
        dense = contents_loss(self.heads(penultimate[:, 1:]), shown[..., 1:].to(device))

        # 3. what texts have to do with patches, and with the picture
        asked = [[q for q in questions(s, QUESTIONS + 2, rng) if q.asked][:QUESTIONS] for s in scenes]
        relevance, image = self.text_losses(scenes, asked, shown[..., 0], (penultimate, last), rng)
        return {"dense": dense, "relevance": relevance, "image": 0.1 * image}

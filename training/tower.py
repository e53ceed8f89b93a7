"""The first stage: vision and text tower."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPModel

from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import CHARACTERS, COLOURS, DIRECTIONS, PLACES, SHAPES, Scene, neighbour
from training import model as built
from training.data import IGNORE, MOST, Pool, asked_patches, normalise, some_patches, vary
from training.plan import Plan


def properties(scene: Scene) -> np.ndarray:
    """Class numbers of each object, `(8, heads)`, `IGNORE` where unknown; the columns of `HEADS`."""
    colours, shapes = list(COLOURS), list(SHAPES)
    out = np.full((MOST, len(HEADS)), IGNORE)
    for i, o in enumerate(scene.objects):
        same = [sum(getattr(p, a) == getattr(o, a) for p in scene.objects) - 1 for a in ("colour", "shape", "name")]
        row = [colours.index(o.colour), SHAPES.index(o.shape), CHARACTERS.index(o.character), PLACES.index(o.place)]
        row += same
        for direction in DIRECTIONS:
            j = neighbour(scene, i, direction)
            if j is None:
                row += [IGNORE, IGNORE]
            elif j < 0:
                row += [len(colours), len(shapes)]
            else:
                row += [colours.index(scene.objects[j].colour), shapes.index(scene.objects[j].shape)]
        out[i] = row
    return out


Heads = tuple[tuple[int, float], ...]  # (classes, weight); the first three have one class more, for background
HEADS: Heads = (
    (len(COLOURS) + 1, 1.0),
    (len(SHAPES) + 1, 1.0),
    (len(CHARACTERS) + 1, 1.5),
    (len(PLACES), 0.5),
    *(((MOST, 0.3),) * 3),
    *(((len(COLOURS) + 1, 0.3), (len(SHAPES) + 1, 0.3)) * 4),
)


def read_off(logits: Tensor, heads: Heads, table: Tensor, shown: Tensor) -> Tensor:
    """The heads' weighted cross-entropy, a scalar.

    logits  (B, n, C)      of patches, the C classes of all heads side by side
    table   (B, 8, heads)  each object's class under each head, `IGNORE` where unknown
    shown   (B, n)         the object that each patch shows, as `patch_owners` has them
    """
    target = table.gather(1, shown.clamp(min=0)[..., None].expand(-1, -1, len(heads)))
    target[shown < 0] = IGNORE
    for head in range(3):
        target[..., head][shown == -1] = heads[head][0] - 1
    loss = torch.zeros((), device=logits.device)
    for i, scores in enumerate(logits.float().split([classes for classes, _ in heads], -1)):
        if (target[..., i] != IGNORE).any():
            loss = loss + heads[i][1] * F.cross_entropy(scores.flatten(0, 1), target[..., i].flatten())
    return loss


def embed(vision: Any, pixels: Tensor, chosen: Tensor | None = None) -> Tensor:
    """The input of a vision tower's first layer `(B, 1 + n, D)`, CLS first; of the chosen patches `(B, n)` alone."""
    x = vision.embeddings(pixels)
    if chosen is not None and chosen.shape[1] < x.shape[1] - 1:
        index = torch.cat([torch.zeros_like(chosen[:, :1]), chosen + 1], 1)
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    return vision.pre_layrnorm(x)


class Tower(nn.Module):
    """The CLIP model with the heads that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIPModel(built.clip_config())
        self.clip.set_attn_implementation("eager")  # on a CPU, faster than sdpa at this size, backward above all
        self.heads = nn.Linear(built.WIDTH, sum(classes for classes, _ in HEADS))
        self.bias = nn.Parameter(torch.tensor(-6.0))
        self.tokenizer = built.make_tokenizer(close=True)

    def hidden_states(self, pixels: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Hidden states of the penultimate layer and of the last, each `(B, 1 + n, D)`, CLS first.

        Of the chosen patches `(B, n)` alone, where they are named.
        """
        vision = self.clip.vision_model
        x = embed(vision, pixels, chosen)
        for layer in vision.encoder.layers[:-1]:
            x = layer(x, None)
        return x, vision.encoder.layers[-1](x, None)

    def texts(self, texts: list[str], device: torch.device) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        return self.clip.get_text_features(**tokens).pooler_output

    def project(self, hidden_states: Tensor) -> Tensor:
        """Patches in the space of relevance: CLIP's own image head, applied to each of them."""
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden_states))

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        # 1. pictures of a step, some of their patches, and noise on the brightness
        rng = random.Random(f"tower-{plan.first_seed}-{step}")
        generator = torch.Generator().manual_seed(step)
        index = pool.batch(step, plan)
        scenes = [pool.scene(int(i)) for i in index]
        owners = torch.from_numpy(pool.owners[index]).long()
        chosen = some_patches(owners, plan.tokens_at(step), generator)
        pixels = normalise(pool.pixels[index], device)
        pixels = pixels + 0.05 * torch.randn(len(pixels), 1, 1, 1, generator=generator).to(device)
        penultimate, last = self.hidden_states(pixels, chosen.to(device))

        # 2. every patch tells the properties of its object
        shown = owners.gather(1, chosen)  # (B, n)
        table = torch.from_numpy(np.stack([properties(s) for s in scenes]))
        dense = read_off(self.heads(penultimate[:, 1:]), HEADS, table.to(device), shown.to(device))

        # 3. what texts have to do with patches, and with the picture
        asked = [[q for q in questions(s, 5, rng) if q.asked][:4] for s in scenes]
        relevance, image = self.text_losses(scenes, asked, shown, (penultimate, last), rng)
        return {"dense": dense, "relevance": relevance, "image": 0.3 * image}

    def text_losses(
        self,
        scenes: Sequence[Any],
        asked: Sequence[Sequence[Any]],
        shown: Tensor,
        hidden_states: tuple[Tensor, Tensor],
        rng: random.Random,
    ) -> tuple[Tensor, Tensor]:
        """The loss of relevance, and that of the pooled images with the names of objects.

        asked          the questions about each of B scenes that ask for an object
        shown          (B, n), which object each chosen patch shows
        hidden_states  (B, 1 + n, D) each, of the penultimate layer and of the last, CLS first
        """
        penultimate, last = hidden_states
        device = penultimate.device
        # 1. a question matches the patches of what it asks for
        flat = [(b, q) for b, group in enumerate(asked) for q in group]
        wanted = torch.stack([asked_patches(shown[b], q.asked) for b, q in flat]).to(device)
        named = [rng.choice(s.objects).name for s in scenes]
        text = F.normalize(self.texts([vary(q.text, rng) for _, q in flat] + named, device).float(), dim=-1)
        scale = self.clip.logit_scale.exp()
        patch = F.normalize(self.project(penultimate[:, 1:]).float(), dim=-1)
        image_of_question = torch.tensor([b for b, _ in flat], device=device)
        logits = scale * torch.einsum("qnd,qd->qn", patch[image_of_question], text[: len(flat)])
        relevance = -(wanted * logits.log_softmax(-1)).sum(-1).mean()

        # 2. the pooled image matches the names of objects that it shows
        pooled = F.normalize(self.project(last[:, 0]).float(), dim=-1)
        pairs = scale * pooled @ text[len(flat) :].T + self.bias
        truth = torch.tensor([[1.0 if any(o.name == n for o in s.objects) else -1.0 for n in named] for s in scenes])
        image = -F.logsigmoid(pairs * truth.to(device)).sum(1).mean()
        return relevance, image

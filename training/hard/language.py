"""The second stage and the third: projector and language model of the hard checkpoint."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gridprune_cli.scenes.scene import COLOURS, SHAPES
from training.data import IGNORE, some_patches, vary
from training.hard import model as built
from training.hard.data import HardPool, one_hot
from training.hard.questions import HardQuestion, questions
from training.hard.scene import LETTERS, N
from training.language import Language, Packed, answer_losses
from training.model import EOS, IMAGE, PAD
from training.plan import Plan

QUESTIONS = 8  # a scene
LOOK = 2.0  # times as much weight of the led heads as in the first recipe
TELL = 3.0
NAMES = (*COLOURS, *SHAPES, *LETTERS)  # what questions single out objects and signs by


def pack(groups: list[list[HardQuestion]], chosen: Tensor, tokenizer: Any, rng: random.Random) -> Packed:
    """Questions behind each of B images, with what every token of an answer is read from.

    chosen  (B, n)  the visual tokens that are shown, of N

    `probed` and `asked` of what comes back have one entry for each token of an answer but `</s>`, padded with entries
    that ask for nothing.
    """
    n = chosen.shape[1]
    prefix = tokenizer("USER:").input_ids
    start = len(prefix) + n
    texts = [[(vary(q.text, rng) + " ASSISTANT:", q.answer) for q in group] for group in groups]
    coded = iter(tokenizer([t for g in texts for pair in g for t in pair], add_special_tokens=False).input_ids)
    lines = [[(next(coded), [*next(coded), EOS]) for _ in group] for group in texts]
    length = start + max(sum(len(p) + len(a) for p, a in group) for group in lines)
    size = (len(groups), length)
    ids, labels = torch.full(size, PAD), torch.full(size, IGNORE)
    positions, segment = torch.zeros(size, dtype=torch.long), torch.full(size, -1)  # segment -1: padding
    looks: list[list[tuple[int, tuple[int, ...]]]] = []  # of each image, (token, patches)
    for b, group in enumerate(lines):
        ids[b, :start] = torch.tensor(prefix + [IMAGE] * n)
        positions[b, :start] = torch.cat([torch.arange(len(prefix)), len(prefix) + chosen[b]])
        segment[b, :start] = 0
        at = start
        looks.append([])
        for j, (prompt, answer) in enumerate(group):
            end = at + len(prompt) + len(answer)
            ids[b, at:end] = torch.tensor(prompt + answer)
            positions[b, at:end] = len(prefix) + N + torch.arange(end - at)
            segment[b, at:end] = j + 1
            last = at + len(prompt) - 1
            labels[b, last : end - 1] = torch.tensor(answer)
            looks[b] += [(last + i, patches) for i, patches in enumerate(groups[b][j].looks)]
            at = end
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril() | torch.eye(length, dtype=torch.bool)
    count = max(len(line) for line in looks)
    probed = torch.full((len(groups), count), length - 1)
    asked = torch.zeros(len(groups), count, n)
    for b, line in enumerate(looks):
        for j, (token, patches) in enumerate(line):
            probed[b, j] = token
            asked[b, j] = torch.isin(chosen[b], torch.tensor(patches, dtype=torch.long))
    return Packed(ids, positions, mask[:, None], labels, probed, asked)


def names_of(groups: list[list[HardQuestion]], count: int) -> Tensor:
    """Which of `NAMES` a question holds, 1 or 0, for each token of each answer in turn: `(B, count, names)`, padded
    with nan."""
    out = torch.full((len(groups), count, len(NAMES)), torch.nan)
    for b, group in enumerate(groups):
        at = 0
        for question in group:
            texts = question.text.lower().rstrip("?.").split()
            letters = question.text.rstrip("?.").split()[-1] if question.kind == "sign" else ""
            held = [any(t.startswith(name) for t in texts) or name in letters for name in NAMES]
            out[b, at : at + len(question.looks)] = torch.tensor(held, dtype=torch.float)
            at += len(question.looks)
    return out


class HardLanguage(Language):
    """The LLaVA model without a use of its tower: it answers from `features` `(scenes, N, D)`, or from contents."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        config = built.llava_config()
        config.text_config._attn_implementation = "scenes_probe"
        self.llava = LlavaForConditionalGeneration(config)
        self.llava.model.language_model.set_attn_implementation("scenes_probe")
        self.llava.model.vision_tower.requires_grad_(False)
        projector = self.llava.model.multi_modal_projector
        # Embeds of norm 11 and up: what layers add to short ones drowns what they hold, which later layers must read.
        nn.init.normal_(self.llava.get_input_embeddings().weight)
        nn.init.orthogonal_(projector.linear_1.weight, 4)
        nn.init.orthogonal_(projector.linear_2.weight, 2)
        self.tokenizer = built.make_tokenizer(close=False)
        self.tell_names = nn.Linear(built.WIDTH, len(NAMES))
        self.features = np.empty((0, N, built.WIDTH), np.float16)  # none: it answers from contents

    def losses(self, pool: HardPool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:  # type: ignore[override]
        rng = random.Random(f"hard-language-{plan.first_seed}-{step}")
        index = pool.batch(step, plan)
        table = torch.from_numpy(pool.contents[index]).long().transpose(1, 2)  # (B, N, 5)
        telling = torch.where((table[..., 2] > 0) | (table[..., 3] > 0), 0, -1)  # centres of objects, and letters
        chosen = some_patches(telling, plan.tokens_at(step), torch.Generator().manual_seed(step))
        groups = [questions(pool.scene(int(i)), QUESTIONS, rng, plan.kinds) for i in index]
        packed = pack(groups, chosen, self.tokenizer, rng)
        features = torch.from_numpy(self.features[index]).float() if len(self.features) else one_hot(table[..., 1:])
        features = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1])).to(device)
        first_layer: list[Tensor] = []
        hook = self.llava.model.language_model.layers[0].register_forward_hook(
            lambda _, __, out: first_layer.append(out)
        )
        losses, _ = answer_losses(self.llava, features, packed, plan)
        hook.remove()
        named = names_of(groups, packed.probed.shape[1]).to(device)  # (B, T, names)
        gathered = first_layer[0].gather(1, packed.probed[..., None].expand(-1, -1, built.WIDTH).to(device))
        known = named.isfinite()
        tell = F.binary_cross_entropy_with_logits(self.tell_names(gathered)[known], named[known])
        return losses | {"look": LOOK * losses["look"], "tell names": TELL * tell}


@torch.no_grad()
def fit_projector(projector: Any, features: Tensor, table: Tensor) -> None:
    """Makes the projector's first layer give of features `(M, D)` what it gave of contents `(M, 4)`, and freezes it.

    The linear map of least squares, with a ridge of 1e-3 of the features' mean variance.
    """
    wanted = projector.linear_1(one_hot(table[None])[0]).double()
    features = features.double()
    centre, level = features.mean(0), wanted.mean(0)
    centred = features - centre
    gram = centred.T @ centred
    ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram + ridge, centred.T @ (wanted - level))  # (D, hidden)
    projector.linear_1.weight.copy_(weights.T)
    projector.linear_1.bias.copy_(level - centre @ weights)
    projector.linear_1.requires_grad_(False)

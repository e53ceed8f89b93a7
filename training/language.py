"""The second stage: projector and language model."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gridprune_cli.scenes.questions import Question, questions
from gridprune_cli.scenes.scene import COLOURS, DIRECTIONS, PLACES, SHAPES, Scene
from training import model as built
from training.data import IGNORE, MOST, Pool, asked_patches, some_patches, vary
from training.plan import N, Plan
from training.tower import properties


def _probe(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """sdpa that also sets, for the Q tokens of `module.probed` `(B, Q)`, what they attend to and what the heads give.

    `module.attention_weights` is (B, heads, Q, L), `module.head_outputs` (B, heads, Q, D / heads).
    """
    if (probed := getattr(module, "probed", None)) is not None:
        picked = query.gather(2, probed[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        allowed = mask.expand(-1, query.shape[1], -1, -1)
        allowed = allowed.gather(2, probed[:, None, :, None].expand(-1, query.shape[1], -1, mask.shape[-1]))
        scores = (picked @ key.transpose(-1, -2)).float() * kwargs["scaling"]
        module.attention_weights = scores.masked_fill(~allowed, -1e9).softmax(-1)
        module.head_outputs = module.attention_weights.to(value.dtype) @ value
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("scenes_probe", _probe)
AttentionMaskInterface.register("scenes_probe", sdpa_mask)


@dataclass(frozen=True)
class Packed:
    """Questions behind their images, ready for the language model; L tokens after padding."""

    ids: Tensor  # (B, L), image tokens included
    positions: Tensor  # (B, L), as if every question stood alone behind all of the image's tokens
    mask: Tensor  # (B, 1, L, L), true where a token may look
    labels: Tensor  # (B, L), the next token where it belongs to an answer
    probed: Tensor  # (B, Q), indices of the last token of each prompt, and with `closely` then of each answer's first
    asked: Tensor  # (B, Q, n), shares of the visual tokens asked for


def pack(
    groups: list[list[Question]],
    chosen: Tensor,
    owners: Tensor,
    tokenizer: Any,
    rng: random.Random,
    *,
    closely: bool = False,
) -> Packed:
    """Q questions behind each of B images.

    groups  the questions of each image
    chosen  (B, n)  the visual tokens that are shown, of N
    owners  (B, N)  the object that each of the N shows
    """
    n = chosen.shape[1]
    prefix = tokenizer("USER:").input_ids
    start = len(prefix) + n
    texts = [[(vary(q.text, rng) + " ASSISTANT:", q.answer) for q in group] for group in groups]
    coded = iter(tokenizer([t for g in texts for pair in g for t in pair], add_special_tokens=False).input_ids)
    lines = [[(next(coded), [*next(coded), built.EOS]) for _ in group] for group in texts]
    length = start + max(sum(len(p) + len(a) for p, a in group) for group in lines)
    size = (len(groups), length)
    ids, labels = torch.full(size, built.PAD), torch.full(size, IGNORE)
    positions, segment = torch.zeros(size, dtype=torch.long), torch.full(size, -1)  # segment -1: padding
    probed = torch.zeros(len(groups), len(groups[0]), dtype=torch.long)
    asked = torch.zeros(len(groups), len(groups[0]), n)
    for b, group in enumerate(lines):
        ids[b, :start] = torch.tensor(prefix + [built.IMAGE] * n)
        positions[b, :start] = torch.cat([torch.arange(len(prefix)), len(prefix) + chosen[b]])
        segment[b, :start] = 0
        at = start
        for j, (prompt, answer) in enumerate(group):
            end = at + len(prompt) + len(answer)
            ids[b, at:end] = torch.tensor(prompt + answer)
            positions[b, at:end] = len(prefix) + owners.shape[1] + torch.arange(end - at)
            segment[b, at:end] = j + 1
            labels[b, at + len(prompt) - 1 : end - 1] = torch.tensor(answer)
            probed[b, j] = at + len(prompt) - 1
            wanted = groups[b][j].asked
            wanted = wanted[:1] if closely and groups[b][j].kind == "relation" else wanted
            asked[b, j] = asked_patches(owners[b].gather(0, chosen[b]), wanted)
            at = end
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril() | torch.eye(length, dtype=torch.bool)
    if closely:  # an answer's second token is read off where the first was
        probed, asked = torch.cat([probed, probed + 1], 1), asked.repeat(1, 2, 1)
    return Packed(ids, positions, mask[:, None], labels, probed, asked)


NEIGHBOUR = (len(COLOURS) + 1, len(SHAPES) + 1)  # classes of a neighbour's colour and shape; the last is "nothing"


def next_to(groups: list[list[Question]], scenes: list[Scene]) -> Tensor:
    """Colour and shape of the neighbours of the object that a question names, `(B, Q, 4, 2)`; `IGNORE` where it is
    open, or the question names no single object."""
    out = np.full((len(groups), len(groups[0]), len(DIRECTIONS), 2), IGNORE)
    for b, (group, scene) in enumerate(zip(groups, scenes, strict=True)):
        table = properties(scene)[:, -2 * len(DIRECTIONS) :].reshape(MOST, len(DIRECTIONS), 2)
        for j, question in enumerate(group):
            if question.kind not in ("count", "exists"):
                out[b, j] = table[question.asked[0]]
    return torch.from_numpy(out)


def places_of(groups: list[list[Question]], scenes: list[Scene]) -> Tensor:
    """1 for each of the nine places that holds an object asked for, else 0: `(B, Q, 9)`. Of a relation, its first one.

    No two objects of a scene share a place, so the sum is the answer to "how many".
    """
    out = torch.zeros(len(groups), len(groups[0]), len(PLACES))
    for b, (group, scene) in enumerate(zip(groups, scenes, strict=True)):
        for j, question in enumerate(group):
            for i in question.asked[:1] if question.kind == "relation" else question.asked:
                out[b, j, PLACES.index(scene.objects[i].place)] = 1
    return out


@torch.no_grad()
def whiten(projector: Any, features: Tensor) -> None:
    """Initialises the projector as a whitening of vision features `(M, D)`, nearly linear, and freezes its first layer.

    What tells characters apart is a small part of the features' variance. From a random start, the language model
    needs thousands of steps to find it. And GELU is curved around 0, which loses a linear reader a quarter of what the
    features hold of an object's neighbours: a bias of three standard deviations moves them to where it is straight.
    The first layer stays frozen because one direction of the features has thousands of times the variance of the
    others, so that the smallest step would change every output.
    """
    features = features.double()
    values, vectors = torch.linalg.eigh(features.T.cov())
    whitening = (vectors * (values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
    projector.linear_1.weight.copy_(whitening)
    projector.linear_1.bias.copy_(3 - whitening @ features.mean(0))
    projector.linear_1.requires_grad_(False)
    nn.init.orthogonal_(projector.linear_2.weight, 0.7)
    projector.linear_2.bias.copy_(-3 * projector.linear_2.weight.sum(1))


def attention_loss(weights: Tensor, asked: Tensor) -> Tensor:
    """Mean -log of the attention `weights` `(B, heads, Q, n)` on the visual tokens `asked` for `(B, Q, n)`."""
    hit = (weights * (asked > 0)[:, None]).sum(-1)
    known = (asked.sum(-1) > 0)[:, None].expand_as(hit)
    return -hit[known].clamp(min=1e-6).log().mean()


def answer_loss(
    llava: LlavaForConditionalGeneration, features: Tensor, packed: Packed, retained: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the packed questions' answers, from vision features `(B, n, D)`, compressed or not.

    `retained` (B, n), up to 0, is added to all attention to the visual tokens.
    """
    core, device = llava.model, features.device
    embeds = core.get_input_embeddings()(packed.ids.to(device))
    image = (packed.ids == built.IMAGE).to(device)
    projected = core.multi_modal_projector(features).to(embeds.dtype)
    mask = packed.mask.to(device)
    if retained is not None:
        bias = torch.zeros_like(embeds[..., 0]).masked_scatter(image, retained.to(embeds.dtype))  # (B, L)
        mask = bias[:, None, None].expand(mask.shape).masked_fill(~mask, torch.finfo(bias.dtype).min)
    hidden = core.language_model(
        inputs_embeds=embeds.masked_scatter(image[..., None], projected),
        attention_mask=mask,
        position_ids=packed.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    labelled = packed.labels != IGNORE
    logits = llava.lm_head(hidden[labelled.to(device)]).float()
    return F.cross_entropy(logits, packed.labels[labelled].to(device))


def answer_losses(
    llava: LlavaForConditionalGeneration, features: Tensor, packed: Packed, plan: Plan
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of the packed questions' answers and of the led heads' attention, from vision features `(B, n, D)`.

    Also the outputs of the led heads of the last of their layers, `(B, heads, Q, D / heads)`.
    """
    device = features.device
    led = [(llava.model.language_model.layers[layer].self_attn, heads) for layer, heads in plan.led]
    for attention, _ in led:
        attention.probed = packed.probed.to(device)
    answer = answer_loss(llava, features, packed)

    first, n = int((packed.ids[0] == built.IMAGE).int().argmax()), packed.asked.shape[2]
    weights = torch.cat([attention.attention_weights[:, :heads] for attention, heads in led], 1)  # (B, heads, Q, L)
    head_outputs = led[-1][0].head_outputs[:, : led[-1][1]].float()
    for attention, _ in led:
        attention.probed = attention.attention_weights = attention.head_outputs = None
    look = 0.3 * attention_loss(weights[..., first : first + n], packed.asked.to(device))
    return {"answer": answer, "look": look}, head_outputs


class Language(nn.Module):
    """The LLaVA model, its tower frozen and read through stored features.

    Two auxiliary losses, each through a linear layer that is dropped afterwards. With `Plan.closely` four heads of
    layer 3 are led to the patches asked for, and each must give colour and shape of the object's neighbour on one side:
    two heads alone can't carry all four. Their outputs are means over the objects asked for, which lose how many there
    are: with `Plan.placed` all four together must give which of the nine places hold one.
    """

    def __init__(self) -> None:
        super().__init__()
        config = built.llava_config()
        config.text_config._attn_implementation = "scenes_probe"
        self.llava = LlavaForConditionalGeneration(config)
        self.llava.model.language_model.set_attn_implementation("scenes_probe")
        self.llava.model.vision_tower.requires_grad_(False)
        self.tokenizer = built.make_tokenizer(close=False)
        self.features = np.empty((0, N, built.WIDTH), np.float16)  # of the scenes, (scenes, N, D)
        sizes = (config.text_config.hidden_size // config.text_config.num_attention_heads, sum(NEIGHBOUR))
        self.tell = nn.Parameter(torch.zeros(len(DIRECTIONS), *sizes))
        self.place = nn.Linear(len(DIRECTIONS) * sizes[0], len(PLACES))

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        rng = random.Random(f"language-{plan.first_seed}-{step}")
        index = pool.batch(step, plan)
        owners = torch.from_numpy(pool.owners[index]).long()
        chosen = some_patches(owners, plan.tokens_at(step), torch.Generator().manual_seed(step))
        groups = [questions(pool.scene(int(i)), 8, rng, plan.kinds) for i in index]
        packed = pack(groups, chosen, owners, self.tokenizer, rng, closely=plan.closely)
        features = torch.from_numpy(self.features[index]).float()
        features = features.gather(1, chosen[..., None].expand(-1, -1, features.shape[-1])).to(device)

        losses, head_outputs = answer_losses(self.llava, features, packed, plan)
        scenes = [pool.scene(int(i)) for i in index]
        if plan.closely:
            truth = next_to(groups, scenes).repeat(1, 2, 1, 1).to(device)  # (B, Q, 4, 2)
            scores = torch.einsum("bhqd,hdc->bqhc", head_outputs, self.tell)
            for i, logits in enumerate(scores.split(NEIGHBOUR, -1)):
                which = "tell colour" if i == 0 else "tell shape"
                losses[which] = F.cross_entropy(logits.flatten(0, 2), truth[..., i].flatten(), ignore_index=IGNORE)
        if plan.placed:
            held = places_of(groups, scenes).repeat(1, 2, 1).to(device)  # (B, Q, 9)
            scores = self.place(head_outputs.transpose(1, 2).flatten(2)).float()
            losses["tell places"] = F.binary_cross_entropy_with_logits(scores, held) * len(PLACES)
        return losses

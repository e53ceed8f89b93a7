"""Trains the embedded model from nothing: `python -m gridprune_cli.scenes.train --out FOLDER`.

Two stages, as for LLaVA, and a third for compression, each resumable from the work folder:

1. `tower`: vision and text tower, no language model. Three losses: linear heads that read each object's properties
   from every patch of it (they are dropped afterwards); for a question, a softmax over patches of
   cos(patch, question) against the patches asked for; and a sigmoid image-text loss (SigLIP, arXiv 2303.15343) on the
   pooled image. To see more scenes in the same time, most steps run on half of the patches, chosen at random with
   objects preferred; the last steps see all of them. A second, shorter pass (`tower-again`) starts from a lower rate.
2. `language`: the tower is frozen, and projector and Llama learn to answer eight questions packed behind one image,
   each blind to the others. Training starts with few visual tokens, so that the question's words are not drowned
   before attention has learned where to look, and ends with all of them. The later passes (`language-again`,
   `language-last`, `language-counts`) ask more often what comes late. No token is ever dropped by a pruning method:
   pruning stays training-free.
3. `compressor`: all of that is frozen, and the compressor of `--plc trained` learns to make rows from which the
   language model answers right. Tokens are chosen as for any answer: relevance, contextual region, gridprune. The
   scenes are new to tower and language model, which know those that they learned from too well.

With `--part localizer` the third stage is another one, for the small model that answers questions with boxes on CROP's
8 x 8 grid. `localizer` starts from the tower's first layers and trains them with a language model behind them. Linear
heads read each object's properties, its box and those of its like and its neighbours from every patch of it; they too
are dropped afterwards. `localizer-tower` goes on with the tower alone. `localizer-again` freezes it, and puts the first
layers of the main model's language model, which know where a question asks, in the place of the other one.
"""

import argparse
import json
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CLIPModel, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gridprune_cli.pruning.compress import cell_weights, cells
from gridprune_cli.pruning.compress import pool as pool_states
from gridprune_cli.pruning.methods.gridprune import GridPrune
from gridprune_cli.pruning.region import contextual_region, inside
from gridprune_cli.pruning.signals import Signals, View
from gridprune_cli.scenes import model as built
from gridprune_cli.scenes.scene import (
    CELLS,
    CHARACTERS,
    COLOURS,
    DIRECTIONS,
    KINDS,
    PLACES,
    SHAPES,
    TRAIN,
    Question,
    Scene,
    covering,
    draw,
    make_scene,
    neighbour,
    pixel_owners,
    questions,
)
from gridprune_cli.vlm.compressor import Compressor, save_compressor

N = built.GRID * built.GRID
MARGIN = 8  # pixels around what a box covers: a slip of one cell then costs little of it
LOCALIZER_N = built.LOCALIZER_GRID * built.LOCALIZER_GRID
IGNORE = -100
MOST = 8  # objects in a scene
SAVE_EVERY = 200  # steps
LOG_EVERY = 50


@dataclass(frozen=True)
class Plan:
    """Sizes of a stage. `tokens` gives (share of the steps, visual tokens shown) in turn.

    Steps are counted from `start`, so that a stage which goes on with another's scenes takes them in new order and
    asks new questions. A stage may stop before the end of its schedule, after `stop` steps. `led` are layers of the
    language model, with how many heads of each, whose attention is pulled to the patches asked for at a question's last
    token. `closely` pulls it at the answer's first token too, and not to the neighbour that a relation asks for.
    `placed` has the last of these heads tell, together, where the objects asked for are. `part` names the localiser's
    part that learns, where it is not both.
    """

    steps: int
    batch: int
    scenes: int
    first_seed: int
    rate: float
    tokens: tuple[tuple[float, int], ...]
    start: int = 0
    stop: int | None = None
    kinds: tuple[str, ...] = KINDS
    led: tuple[tuple[int, int], ...] = ((2, 2),)
    closely: bool = False
    placed: bool = False
    part: str = ""

    @property
    def last(self) -> int:
        """The step after the last one."""
        return self.start + (self.stop or self.steps)

    def tokens_at(self, step: int) -> int:
        passed = 0.0
        for share, tokens in self.tokens:
            passed += share
            if step - self.start < passed * self.steps:
                return tokens
        return self.tokens[-1][1]

    def rate_at(self, step: int) -> float:
        done = step - self.start
        warm = min(1.0, (done + 1) / 200)
        return self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done / self.steps)))


TOWER = Plan(4000, 32, 50_000, TRAIN, 1.2e-3, ((0.85, 128), (0.15, N)))
TOWER_AGAIN = Plan(2000, 32, 50_000, TRAIN, 6e-4, ((0.8, 128), (0.2, N)), start=4000)
LANGUAGE = Plan(2200, 24, 16_000, TRAIN + 50_000, 1.5e-3, ((0.2, 32), (0.8, 64)), stop=500)
LANGUAGE_AGAIN = Plan(
    1700,
    24,
    16_000,
    TRAIN + 50_000,
    1.2e-3,
    ((0.82, 64), (0.18, N)),
    start=500,
    stop=1300,
    kinds=(*KINDS, "character", "count", "place", "relation", "relation"),
    led=((2, 2), (3, 4)),
    closely=True,
)
LANGUAGE_LAST = replace(
    LANGUAGE_AGAIN,
    steps=1200,
    rate=8e-4,
    tokens=((0.78, 64), (0.22, N)),
    start=1800,
    stop=None,
    kinds=(*KINDS, "character", "count", "count", "place", "relation", "relation"),
)
LANGUAGE_COUNTS = replace(
    LANGUAGE_LAST,
    steps=1400,
    tokens=((0.72, 64), (0.28, N)),
    start=3000,
    kinds=(*KINDS, "character", "count", "count", "relation", "relation"),
    placed=True,
)
LOCALIZER = Plan(
    1600,
    24,
    50_000,
    TRAIN,
    1.2e-3,
    ((0.8, 72), (0.2, LOCALIZER_N)),
    kinds=(*KINDS, "character", "count", "place", "relation", "relation"),
    led=((1, 2), (2, 3)),
    closely=True,
)
LOCALIZER_TOWER = replace(
    LOCALIZER, steps=500, scenes=16_000, first_seed=TRAIN + 50_000, rate=1e-3, start=1600, part="tower"
)
LOCALIZER_AGAIN = replace(
    LOCALIZER_TOWER,
    steps=800,
    tokens=((0.75, 72), (0.25, LOCALIZER_N)),
    start=2100,
    kinds=(*KINDS, "count", "object", "relation"),
    led=((2, 2), (3, 4)),
    part="language",
)
COMPRESSOR = Plan(500, 128, 4_000, TRAIN + 66_000, 2e-3, ((0.1, 28), (0.1, 13)) * 5)


# ---- data ------------------------------------------------------------------------------------------------------------


def _render(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels `(224, 224, 3)` and, per patch, the object it shows `(256,)`: -1 none, -2 too little of one to tell."""
    picture, owner = draw(make_scene(seed))
    return np.asarray(picture), patch_owners(owner)


def patch_owners(owner: np.ndarray) -> np.ndarray:
    """Per patch `(n * n,)` the object it shows, -1 none, -2 too little of one to tell; from one per pixel."""
    side = len(owner) // built.PATCH
    patches = owner.reshape(side, built.PATCH, side, built.PATCH).swapaxes(1, 2).reshape(side * side, -1)
    cover = np.stack([(patches == i + 1).mean(1) for i in range(MOST)])  # (objects, patches)
    best, share = cover.argmax(0), cover.max(0)
    return np.where(share >= 0.25, best, np.where(share > 0.03, -2, -1)).astype(np.int8)


class Pool:
    """Rendered scenes of consecutive seeds, kept on disk: drawing one takes longer than reading it again."""

    def __init__(self, folder: Path, first_seed: int, count: int):
        self.first_seed, self.count = first_seed, count
        self.paths = [folder / f"{name}-{first_seed}-{count}.npy" for name in ("pixels", "owners")]
        if not self.paths[1].exists():  # written last
            self._fill()
        self.pixels, self.owners = (np.load(p, mmap_mode="r") for p in self.paths)

    def _fill(self) -> None:
        pixels = np.lib.format.open_memmap(self.paths[0], "w+", np.uint8, (self.count, built.SIZE, built.SIZE, 3))
        owners = np.empty((self.count, N), np.int8)
        seeds = range(self.first_seed, self.first_seed + self.count)
        with _progress() as bar, ProcessPoolExecutor() as workers:
            rendered = workers.map(_render, seeds, chunksize=64)
            for i, (picture, owner) in enumerate(bar.track(rendered, self.count, description="drawing scenes")):
                pixels[i], owners[i] = picture, owner
        pixels.flush()
        np.save(self.paths[1], owners)

    def scene(self, i: int) -> Scene:
        return make_scene(self.first_seed + i)

    def batch(self, step: int, plan: Plan) -> np.ndarray:
        """Indices of a step: all scenes once in random order, then all again in another."""
        epoch, at = divmod(step * plan.batch, self.count - self.count % plan.batch)
        order = np.random.default_rng([plan.first_seed, epoch]).permutation(self.count)
        return np.sort(order[at : at + plan.batch])


def normalise(pixels: np.ndarray, device: torch.device) -> Tensor:
    """What the checkpoint's image processor does to a 224 x 224 picture, for a batch `(B, 224, 224, 3)`."""
    processor = built.make_processor().image_processor
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (processor.image_mean, processor.image_std))
    return (torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2) / 255 - mean) / std


def some_patches(owners: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random patches of each scene, in order, objects preferred: `(B, N)` owners to `(B, count)` indices."""
    if count == owners.shape[1]:
        return torch.arange(count).expand(len(owners), count)
    luck = torch.rand(owners.shape, generator=generator) + 0.7 * (owners != -1)
    return luck.topk(count, dim=1).indices.sort(1).values


def asked_patches(owners: Tensor, asked: tuple[int, ...]) -> Tensor:
    """Patches of the objects asked for, as shares that sum to 1 (or to 0 where nothing is asked for): `(N,)`."""
    hit = torch.isin(owners, torch.tensor(asked or (-9,), dtype=owners.dtype)).float()
    return hit / hit.sum().clamp(min=1)


def vary(text: str, rng: random.Random) -> str:
    """The question as a hurried user types it, now and then: no capital, no question mark."""
    text = text[0].lower() + text[1:] if rng.random() < 0.15 else text
    return text.rstrip("?.") if rng.random() < 0.15 else text


# ---- stage 1: vision and text tower ----------------------------------------------------------------------------------


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
    """The heads' loss: `logits` `(B, n, classes of all heads)` of patches that show the objects `shown` `(B, n)`.

    `table` `(B, 8, heads)` has each object's classes.
    """
    target = table.gather(1, shown.clamp(min=0)[..., None].expand(-1, -1, len(heads)))
    target[shown < 0] = IGNORE
    for head in range(3):
        target[..., head][shown == -1] = heads[head][0] - 1
    loss = torch.zeros((), device=logits.device)
    for i, part in enumerate(logits.float().split([classes for classes, _ in heads], -1)):
        if (target[..., i] != IGNORE).any():
            loss = loss + heads[i][1] * F.cross_entropy(part.flatten(0, 1), target[..., i].flatten())
    return loss


def embed(vision: Any, pixels: Tensor, chosen: Tensor | None = None) -> Tensor:
    """What a vision tower's first layer is given: `(B, 1 + n, D)`, CLS first; only of the chosen patches `(B, n)`."""
    x = vision.embeddings(pixels)
    if chosen is not None and chosen.shape[1] < x.shape[1] - 1:
        index = torch.cat([torch.zeros_like(chosen[:, :1]), chosen + 1], 1)
        x = x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
    return vision.pre_layrnorm(x)


class Tower(nn.Module):
    """The CLIP model with the parts that only training needs."""

    def __init__(self) -> None:
        super().__init__()
        self.clip = CLIPModel(built.clip_config())
        self.clip.set_attn_implementation("eager")  # on a CPU, faster than sdpa at this size, backward above all
        self.heads = nn.Linear(built.WIDTH, sum(classes for classes, _ in HEADS))
        self.bias = nn.Parameter(torch.tensor(-6.0))
        self.tokenizer = built.make_tokenizer(close=True)

    def states(self, pixels: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Penultimate-layer states `(B, 1 + n, D)`, CLS first, and last-layer states; only of the chosen patches."""
        vision = self.clip.vision_model
        x = embed(vision, pixels, chosen)
        for layer in vision.encoder.layers[:-1]:
            x = layer(x, None)
        return x, vision.encoder.layers[-1](x, None)

    def texts(self, texts: list[str], device: torch.device) -> Tensor:
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        return self.clip.get_text_features(**tokens).pooler_output

    def patches(self, states: Tensor) -> Tensor:
        """Relevance space of patch states: CLIP's own head, applied to patches."""
        return self.clip.visual_projection(self.clip.vision_model.post_layernorm(states))

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        rng = random.Random(f"tower-{plan.first_seed}-{step}")
        generator = torch.Generator().manual_seed(step)
        index = pool.batch(step, plan)
        scenes = [pool.scene(int(i)) for i in index]
        owners = torch.from_numpy(pool.owners[index]).long()
        chosen = some_patches(owners, plan.tokens_at(step), generator)
        pixels = normalise(pool.pixels[index], device)
        pixels = pixels + 0.05 * torch.randn(len(pixels), 1, 1, 1, generator=generator).to(device)
        states, last = self.states(pixels, chosen.to(device))

        shown = owners.gather(1, chosen)  # (B, n)
        table = torch.from_numpy(np.stack([properties(s) for s in scenes]))
        dense = read_off(self.heads(states[:, 1:]), HEADS, table.to(device), shown.to(device))

        asked = [[q for q in questions(s, 5, rng) if q.asked][:4] for s in scenes]
        flat = [(b, q) for b, group in enumerate(asked) for q in group]
        wanted = torch.stack([asked_patches(shown[b], q.asked) for b, q in flat]).to(device)
        named = [rng.choice(s.objects).name for s in scenes]
        text = F.normalize(self.texts([vary(q.text, rng) for _, q in flat] + named, device).float(), dim=-1)
        scale = self.clip.logit_scale.exp()
        patch = F.normalize(self.patches(states[:, 1:]).float(), dim=-1)
        rows = torch.tensor([b for b, _ in flat], device=device)
        logits = scale * torch.einsum("qnd,qd->qn", patch[rows], text[: len(flat)])
        relevance = -(wanted * logits.log_softmax(-1)).sum(-1).mean()

        pooled = F.normalize(self.patches(last[:, 0]).float(), dim=-1)
        pairs = scale * pooled @ text[len(flat) :].T + self.bias
        truth = torch.tensor([[1.0 if any(o.name == n for o in s.objects) else -1.0 for n in named] for s in scenes])
        image = -F.logsigmoid(pairs * truth.to(device)).sum(1).mean()
        return {"dense": dense, "relevance": relevance, "image": 0.3 * image}


# ---- stage 2: projector and language model ---------------------------------------------------------------------------


def _probe(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """sdpa that also leaves behind, for the rows named in `module.rows` `(B, Q)`, attention and what each head gave."""
    if (rows := getattr(module, "rows", None)) is not None:
        picked = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        allowed = mask.expand(-1, query.shape[1], -1, -1)
        allowed = allowed.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, mask.shape[-1]))
        scores = (picked @ key.transpose(-1, -2)).float() * kwargs["scaling"]
        module.seen = scores.masked_fill(~allowed, -1e9).softmax(-1)  # (B, heads, Q, L)
        module.told = module.seen.to(value.dtype) @ value  # (B, heads, Q, D / heads)
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
    rows: Tensor  # (B, Q), the last token of each prompt, and with `closely` then the first of each answer
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
    rows = torch.zeros(len(groups), len(groups[0]), dtype=torch.long)
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
            rows[b, j] = at + len(prompt) - 1
            wanted = groups[b][j].asked
            wanted = wanted[:1] if closely and groups[b][j].kind == "relation" else wanted
            asked[b, j] = asked_patches(owners[b].gather(0, chosen[b]), wanted)
            at = end
    same = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    mask = same & torch.ones(length, length, dtype=torch.bool).tril() | torch.eye(length, dtype=torch.bool)
    if closely:  # an answer's second token is read off where the first was
        rows, asked = torch.cat([rows, rows + 1], 1), asked.repeat(1, 2, 1)
    return Packed(ids, positions, mask[:, None], labels, rows, asked)


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
def whiten(projector: Any, states: Tensor) -> None:
    """Starts the projector as a whitening of the tower's states `(M, D)`, and nearly linear.

    What tells characters apart is a small part of a state's variance. From a random start, the language model would
    see next to nothing of it, and take thousands of steps to dig it out. And GELU bends around 0: in the bends, a
    quarter of what the states know of an object's neighbours would get lost to a linear reader. Moved up by three
    standard deviations, the states meet it where it is straight. They stay there because the first layer does not
    learn: one direction of the states has thousands of times the variance of the others, so that the smallest step
    would swing everything.
    """
    states = states.double()
    values, vectors = torch.linalg.eigh(states.T.cov())
    whitening = (vectors * (values + 1e-3 * values.mean()).rsqrt()) @ vectors.T
    projector.linear_1.weight.copy_(whitening)
    projector.linear_1.bias.copy_(3 - whitening @ states.mean(0))
    projector.linear_1.requires_grad_(False)
    nn.init.orthogonal_(projector.linear_2.weight, 0.7)
    projector.linear_2.bias.copy_(-3 * projector.linear_2.weight.sum(1))


def look_at(seen: Tensor, asked: Tensor) -> Tensor:
    """How little attention `seen` `(B, heads, Q, n)` falls on the visual tokens `asked` for `(B, Q, n)`."""
    hit = (seen * (asked > 0)[:, None]).sum(-1)
    known = (asked.sum(-1) > 0)[:, None].expand_as(hit)
    return -hit[known].clamp(min=1e-6).log().mean()


def answer_losses(
    llava: LlavaForConditionalGeneration, features: Tensor, packed: Packed, plan: Plan
) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of the packed questions' answers, and of where the led heads look, from tower states `(B, n, D)`.

    Also what the led heads of the last of their layers gave, `(B, heads, Q, D / heads)`.
    """
    core, device = llava.model, features.device
    embeds = core.get_input_embeddings()(packed.ids.to(device))
    image = (packed.ids == built.IMAGE).to(device)
    projected = core.multi_modal_projector(features).to(embeds.dtype)
    embeds = embeds.masked_scatter(image[..., None], projected)
    led = [(core.language_model.layers[layer].self_attn, heads) for layer, heads in plan.led]
    for attention, _ in led:
        attention.rows = packed.rows.to(device)
    hidden = core.language_model(
        inputs_embeds=embeds,
        attention_mask=packed.mask.to(device),
        position_ids=packed.positions.to(device),
        use_cache=False,
    ).last_hidden_state
    labelled = packed.labels != IGNORE
    logits = llava.lm_head(hidden[labelled.to(device)]).float()
    answer = F.cross_entropy(logits, packed.labels[labelled].to(device))

    first, n = int(image[0].int().argmax()), packed.asked.shape[2]
    looked = torch.cat([attention.seen[:, :heads] for attention, heads in led], 1)  # (B, heads, Q, L)
    told = led[-1][0].told[:, : led[-1][1]].float()
    for attention, _ in led:
        attention.rows = attention.seen = attention.told = None
    look = 0.3 * look_at(looked[..., first : first + n], packed.asked.to(device))
    return {"answer": answer, "look": look}, told


class Language(nn.Module):
    """The LLaVA model, its tower frozen and read through stored features.

    What an object's patches know of its neighbours on four sides is too much for two heads to carry: where a plan goes
    closely, four heads of layer 3 are led there too, and each tells the neighbour on one side through a linear layer
    that is dropped afterwards. What they give is a mean over the objects asked for, in which their number gets lost:
    where a plan has them placed, all four together tell which of the nine places hold one, through another such layer.
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

        losses, told = answer_losses(self.llava, features, packed, plan)
        scenes = [pool.scene(int(i)) for i in index]
        if plan.closely:
            truth = next_to(groups, scenes).repeat(1, 2, 1, 1).to(device)  # (B, Q, 4, 2)
            scores = torch.einsum("bhqd,hdc->bqhc", told, self.tell)
            for i, part in enumerate(scores.split(NEIGHBOUR, -1)):
                which = "tell colour" if i == 0 else "tell shape"
                losses[which] = F.cross_entropy(part.flatten(0, 2), truth[..., i].flatten(), ignore_index=IGNORE)
        if plan.placed:
            held = places_of(groups, scenes).repeat(1, 2, 1).to(device)  # (B, Q, 9)
            scores = self.place(told.transpose(1, 2).flatten(2)).float()
            losses["tell places"] = F.binary_cross_entropy_with_logits(scores, held) * len(PLACES)
        return losses


# ---- the localiser ---------------------------------------------------------------------------------------------------

_CELL = (CELLS, 0.5), (CELLS, 0.2), (CELLS + 1, 0.1)  # of the box's four sides, weights as in `extents`
LOCALIZER_HEADS: Heads = (*HEADS[:3], *(_CELL[:1] * 4), *(_CELL[1:2] * 12), *(_CELL[2:] * 16))


def extents(scene: Scene) -> np.ndarray:
    """Class numbers of each object, `(8, heads)`, `IGNORE` where unknown; the columns of `LOCALIZER_HEADS`.

    Boxes, as `covering` gives them: of the object; of all objects of its colour, of its shape, of both; of the next
    object in each direction, the last class for none.
    """
    told = properties(scene)
    out = np.full((MOST, len(LOCALIZER_HEADS)), IGNORE)
    for i, o in enumerate(scene.objects):
        row = [*told[i, :3], *covering(scene, (i,))]
        for what in ("colour", "shape", "name"):
            like = [j for j, p in enumerate(scene.objects) if getattr(p, what) == getattr(o, what)]
            row += covering(scene, tuple(like))
        for direction in DIRECTIONS:
            j = neighbour(scene, i, direction)
            row += [IGNORE] * 4 if j is None else [CELLS] * 4 if j < 0 else covering(scene, (j,))
        out[i] = row
    return out


def shrink(pixels: np.ndarray) -> np.ndarray:
    """Pictures `(B, 224, 224, 3)` at the localiser's size, as its image processor makes them."""
    side = (built.LOCALIZER_SIZE, built.LOCALIZER_SIZE)
    return np.stack([np.asarray(Image.fromarray(p).resize(side, Image.Resampling.BICUBIC)) for p in pixels])


def seen_owners(scene: Scene) -> np.ndarray:
    """The object that each of the localiser's patches shows, `(144,)`, as `patch_owners` tells it."""
    place = (np.arange(built.LOCALIZER_SIZE) + 0.5) * built.SIZE / built.LOCALIZER_SIZE
    return patch_owners(pixel_owners(scene)[np.ix_(place.astype(int), place.astype(int))])


class Localizer(nn.Module):
    """The localiser with the parts that only training needs. Tower and language model learn together."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        config = built.localizer_config()
        config.text_config._attn_implementation = "scenes_probe"
        self.llava = LlavaForConditionalGeneration(config)
        self.llava.model.language_model.set_attn_implementation("scenes_probe")
        self.llava.model.vision_tower.set_attn_implementation("eager")
        self.heads = nn.Linear(built.WIDTH, sum(classes for classes, _ in LOCALIZER_HEADS))
        self.tokenizer = built.make_localizer_tokenizer()
        self._inherit(tower)

    def _inherit(self, tower: Tower) -> None:
        """Starts from the first layers of the main model's tower, its positions scaled to fewer patches."""
        weights = tower.clip.vision_model.state_dict()
        name = "embeddings.position_embedding.weight"
        grid = weights[name][1:].T.reshape(1, -1, built.GRID, built.GRID)
        side = (built.LOCALIZER_GRID, built.LOCALIZER_GRID)
        grid = F.interpolate(grid, side, mode="bicubic", align_corners=False).flatten(2)[0].T
        weights[name] = torch.cat([weights[name][:1], grid])
        mine = self.llava.model.vision_tower
        mine.load_state_dict({key: weights[key] for key in mine.state_dict()})

    @torch.no_grad()
    def adopt(self, language: "Language", pool: Pool) -> None:
        """Begins anew behind its tower, with the first layers of the main model's language model.

        That one knows already how to look where a question asks. Its rows are imitated: the projector's second layer
        is the linear map (least squares) that comes nearest to the main model's rows, averaged over the patches that
        one of the localiser's covers, from `pool`'s first scenes. What the map would leave out, boxes above all, stays
        small instead of vanishing. Of an MLP's units those stay that have the largest weights.
        """
        device = self.heads.weight.device
        parts = [pool.pixels[at : at + 64] for at in range(0, min(pool.count, 192), 64)]
        states = torch.cat([self.states(normalise(shrink(part), device)) for part in parts])
        mine, main = self.llava.model.multi_modal_projector, language.llava.model.multi_modal_projector
        whiten(mine, states.flatten(0, 1))
        rows = main(torch.from_numpy(np.array(language.features[: len(states)])).float().to(device))
        grid = rows.transpose(1, 2).unflatten(2, (built.GRID, built.GRID))
        side = (built.LOCALIZER_GRID, built.LOCALIZER_GRID)
        wanted = F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2).flatten(0, 1).double()
        hidden = mine.act(mine.linear_1(states.flatten(0, 1))).double()
        mean = hidden.mean(0)
        ridge = 1e-3 * len(hidden) * torch.eye(hidden.shape[1], device=device, dtype=hidden.dtype)
        centred = hidden - mean
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (wanted - wanted.mean(0))).T
        u, scale, v = torch.linalg.svd(weight)
        weight = u @ torch.diag(scale.clamp(min=0.3 * scale.median())) @ v
        mine.linear_2.weight.copy_(weight)
        mine.linear_2.bias.copy_(wanted.mean(0) - weight @ mean)

        own, theirs = self.llava.model.language_model, language.llava.model.language_model
        words = theirs.embed_tokens.weight.shape[0]  # the localiser's tokens are the main model's, then the corners
        own.embed_tokens.weight[:words] = theirs.embed_tokens.weight
        self.llava.lm_head.weight[:words] = language.llava.lm_head.weight
        own.norm.load_state_dict(theirs.norm.state_dict())
        for layer, model in zip(own.layers, theirs.layers, strict=False):
            weights = model.state_dict()
            size = weights["mlp.gate_proj.weight"].norm(dim=1) * weights["mlp.up_proj.weight"].norm(dim=1)
            size = size * weights["mlp.down_proj.weight"].norm(dim=0)
            units = size.topk(layer.mlp.gate_proj.out_features).indices.sort().values
            for name in ("gate_proj", "up_proj"):
                weights[f"mlp.{name}.weight"] = weights[f"mlp.{name}.weight"][units]
            weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"][:, units]
            layer.load_state_dict(weights)

    def states(self, pixels: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Last-layer states `(B, n, D)` of the chosen patches `(B, n)`, or of all."""
        x = embed(self.llava.model.vision_tower, pixels, chosen)
        for layer in self.llava.model.vision_tower.encoder.layers:
            x = layer(x, None)
        return x[:, 1:]

    def losses(self, pool: Pool, step: int, plan: Plan, device: torch.device) -> dict[str, Tensor]:
        rng = random.Random(f"localizer-{plan.first_seed}-{step}")
        generator = torch.Generator().manual_seed(step)
        index = pool.batch(step, plan)
        scenes = [pool.scene(int(i)) for i in index]
        shown = torch.from_numpy(np.stack([seen_owners(s) for s in scenes])).long()
        chosen = some_patches(shown, plan.tokens_at(step), generator)
        pixels = normalise(shrink(pool.pixels[index]), device)
        pixels = pixels + 0.05 * torch.randn(len(pixels), 1, 1, 1, generator=generator).to(device)
        losses = {}
        with torch.set_grad_enabled(plan.part != "language"):
            states = self.states(pixels, chosen.to(device))
        if plan.part != "language":
            table = torch.from_numpy(np.stack([extents(s) for s in scenes])).to(device)
            dense = read_off(self.heads(states), LOCALIZER_HEADS, table, shown.gather(1, chosen).to(device))
            losses["dense"] = 0.5 * dense
        if plan.part != "tower":
            groups = []
            for scene in scenes:
                boxes = [(q, covering(scene, q.asked, MARGIN)) for q in questions(scene, 8, rng, plan.kinds)]
                groups.append([replace(q, answer="[{},{},{},{}]".format(*box)) for q, box in boxes])
            packed = pack(groups, chosen, shown, self.tokenizer, rng, closely=plan.closely)
            losses |= answer_losses(self.llava, states, packed, plan)[0]
        return losses


# ---- stage 3: compressor ---------------------------------------------------------------------------------------------


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
        view, k, method = (
            (View(built.GRID, built.GRID),),
            plan.tokens_at(step),
            GridPrune(temperature=0.1, region_share=0.8),
        )
        chosen, pooled, within = [], [], []
        for b, cosines in enumerate(relevance.cpu()):
            region = contextual_region(cosines, view)
            kept = method.select(Signals(view, cosines, saliency[b], region), k)
            within.append(inside(view, region))
            cell = cells(view, kept, within[-1])
            pooled.append(pool_states(states[b].cpu(), cell, cell_weights(cell, saliency[b], k), k))
            chosen.append(kept)
        kept, inner = torch.stack(chosen), torch.stack(within)
        rows = self.compressor(
            states, relevance, inner.to(device), torch.stack(pooled).to(device), inner.gather(1, kept).to(device)
        )

        llava = self.frozen[0]
        owners = torch.from_numpy(pool.owners[index]).long()
        packed = pack(asked, kept, owners, self.tokenizers[0], rng)
        embeds = llava.get_input_embeddings()(packed.ids.to(device))
        image = (packed.ids == built.IMAGE).to(device)
        projected = llava.model.multi_modal_projector(rows).to(embeds.dtype)
        hidden = llava.model.language_model(
            inputs_embeds=embeds.masked_scatter(image[..., None], projected),
            attention_mask=packed.mask.to(device),
            position_ids=packed.positions.to(device),
            use_cache=False,
        ).last_hidden_state
        labelled = packed.labels != IGNORE
        logits = llava.lm_head(hidden[labelled.to(device)]).float()
        return {"answer": F.cross_entropy(logits, packed.labels[labelled].to(device))}


# ---- running ---------------------------------------------------------------------------------------------------------


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=False
    )


class Log:
    """Mean losses every few steps, a JSON line each."""

    def __init__(self, path: Path, stage: str, first: int):
        self.path, self.stage = path, stage
        self.sums: dict[str, float] = {}
        self.began = time.time()
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        kept = [line for line in lines if line["stage"] != stage or line["step"] <= first]  # later ones come again
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def add(self, step: int, losses: dict[str, Tensor], tokens: int) -> None:
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
        if (step + 1) % LOG_EVERY == 0:
            means = {name: round(total / LOG_EVERY, 4) for name, total in self.sums.items()}
            line = {"stage": self.stage, "step": step + 1, "tokens": tokens, **means}
            with self.path.open("a") as file:
                file.write(json.dumps(line | {"seconds": round(time.time() - self.began)}) + "\n")
            self.sums.clear()


def optimise(
    name: str,
    model: Tower | Language | Localizer | Compression,
    pool: Pool,
    plan: Plan,
    work: Path,
    device: torch.device,
) -> None:
    """Runs a stage to its end, saving its state every `SAVE_EVERY` steps and starting from the state that it finds."""
    state = work / f"{name}.pt"
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.05},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.98), fused=True)
    first, last = plan.start, plan.last
    if state.exists():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        first = saved["step"]
    log = Log(work / "log.jsonl", name, first)
    with _progress() as bar:
        task = bar.add_task(name, total=last - plan.start, completed=first - plan.start)
        for step in range(first, last):
            for group in optimiser.param_groups:
                group["lr"] = plan.rate_at(step)
            with torch.autocast(device.type, torch.bfloat16):
                losses = model.losses(pool, step, plan, device)
            torch.stack(list(losses.values())).sum().backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            log.add(step, losses, plan.tokens_at(step))
            bar.update(task, completed=step + 1 - plan.start)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == last:
                partial = state.with_suffix(".tmp")
                saved = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step + 1}
                torch.save(saved, partial)
                partial.replace(state)


@torch.no_grad()
def store_features(tower: Tower, pool: Pool, path: Path, device: torch.device) -> np.ndarray:
    """Penultimate-layer patch states of a pool, `(scenes, N, D)` float16, on disk."""
    if not path.exists():
        partial = path.with_suffix(".tmp")
        out = np.lib.format.open_memmap(partial, "w+", np.float16, (pool.count, N, built.WIDTH))
        with _progress() as bar, torch.autocast(device.type, torch.bfloat16):
            for at in bar.track(range(0, pool.count, 64), description="encoding scenes"):
                states, _ = tower.states(normalise(pool.pixels[at : at + 64], device))
                out[at : at + 64] = states[:, 1:].half().cpu().numpy()
        out.flush()
        partial.replace(path)
    return np.load(path, mmap_mode="r")


@torch.no_grad()
def store_encodings(tower: Tower, pool: Pool, work: Path, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """States of a pool, as `store_features` has them, and saliency `(scenes, N)`: the penultimate layer's, of CLS."""
    paths = [work / f"compressor-{name}.npy" for name in ("features", "saliency")]
    if not paths[1].exists():  # written last
        features, seen = [], []
        attention = tower.clip.vision_model.encoder.layers[-2].self_attn
        hook = attention.register_forward_hook(lambda _, __, out: seen.append(out[1][:, :, 0, 1:].float().mean(1)))
        with _progress() as bar, torch.autocast(device.type, torch.bfloat16):
            for at in bar.track(range(0, pool.count, 64), description="encoding scenes"):
                states, _ = tower.states(normalise(pool.pixels[at : at + 64], device))
                features.append(states[:, 1:].half().cpu())
        hook.remove()
        for path, parts in zip(paths, (features, seen), strict=True):
            partial = path.with_suffix(".tmp.npy")
            np.save(partial, torch.cat(parts).cpu().numpy())
            partial.replace(path)
    return np.load(paths[0], mmap_mode="r"), np.load(paths[1])


def train(out: Path, work: Path, seed: int, device: torch.device, part: str = "model") -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    tower = Tower().to(device)
    scenes = Pool(work, TOWER.first_seed, TOWER.scenes)
    optimise("tower", tower, scenes, TOWER, work, device)
    optimise("tower-again", tower, scenes, TOWER_AGAIN, work, device)
    tower.clip.to(torch.bfloat16).to(torch.float32)  # what ships is 16-bit: the language model learns from just that
    torch.manual_seed(seed)
    language = Language().to(device)
    language.llava.model.vision_tower.load_state_dict(tower.clip.vision_model.state_dict())
    pool = Pool(work, LANGUAGE.first_seed, LANGUAGE.scenes)
    language.features = store_features(tower, pool, work / "features.npy", device)
    states = torch.from_numpy(np.array(language.features[:1000])).flatten(0, 1)
    whiten(language.llava.model.multi_modal_projector, states)
    optimise("language", language, pool, LANGUAGE, work, device)
    optimise("language-again", language, pool, LANGUAGE_AGAIN, work, device)
    optimise("language-last", language, pool, LANGUAGE_LAST, work, device)
    optimise("language-counts", language, pool, LANGUAGE_COUNTS, work, device)
    if part == "localizer":
        torch.manual_seed(seed)
        train_localizer(out, work, tower, language, scenes, pool, device)
        return
    language.llava.model.language_model.set_attn_implementation("sdpa")
    built.save(out, language.llava, tower.clip)
    torch.manual_seed(seed)
    pool = Pool(work, COMPRESSOR.first_seed, COMPRESSOR.scenes)
    compression = Compression(language.llava.float(), tower.clip.float()).to(device)
    compression.features, compression.saliency = store_encodings(tower, pool, work, device)
    optimise("compressor", compression, pool, COMPRESSOR, work, device)
    save_compressor(compression.compressor, out)


def train_localizer(
    out: Path, work: Path, tower: Tower, language: Language, scenes: Pool, pool: Pool, device: torch.device
) -> None:
    localizer = Localizer(tower).to(device)
    with torch.no_grad():
        states = localizer.states(normalise(shrink(scenes.pixels[:256]), device))
    whiten(localizer.llava.model.multi_modal_projector, states.flatten(0, 1))
    optimise("localizer", localizer, scenes, LOCALIZER, work, device)
    optimise("localizer-tower", localizer, pool, LOCALIZER_TOWER, work, device)
    localizer.adopt(language, pool)
    optimise("localizer-again", localizer, pool, LOCALIZER_AGAIN, work, device)
    localizer.llava.set_attn_implementation("sdpa")
    built.save_localizer(out, localizer.llava)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model from nothing.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoints")
    parser.add_argument("--part", choices=("model", "localizer"), default="model")
    parser.add_argument("--work", type=Path, default=Path("scenes-work"), help="folder for scenes, states and the log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # a CPU slows down several times over as probabilities shrink to denormal numbers
    train(args.out, args.work, args.seed, torch.device(args.device), args.part)


if __name__ == "__main__":
    main()

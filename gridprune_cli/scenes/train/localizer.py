"""The localiser: a tower of fewer patches, and the first layers of the main model's language model behind it."""

import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gridprune_cli.scenes import model as built
from gridprune_cli.scenes.scene import CELLS, DIRECTIONS, Scene, covering, neighbour, pixel_owners, questions
from gridprune_cli.scenes.train.data import IGNORE, MOST, Pool, normalise, patch_owners, some_patches
from gridprune_cli.scenes.train.language import Language, answer_losses, pack, whiten
from gridprune_cli.scenes.train.plan import Plan
from gridprune_cli.scenes.train.tower import HEADS, Heads, Tower, embed, properties, read_off

MARGIN = 8  # pixels around what a box covers: a slip of one cell then costs little of it
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

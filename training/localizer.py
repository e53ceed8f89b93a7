"""The localiser: a tower of fewer patches, and the first layers of the main model's language model behind it."""

import random
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import CELLS, DIRECTIONS, Scene, covering, neighbour, pixel_owners
from training import model as built
from training.data import IGNORE, MOST, Pool, normalise, patch_owners, some_patches
from training.language import Language, answer_losses, pack, whiten
from training.plan import Plan
from training.tower import HEADS, Heads, Tower, embed, properties, read_off

MARGIN = 8  # pixels around what a box covers: a slip of one cell then costs little of it
# (classes, weight) of one side of a box: of the object, of all like it, of a neighbour (one class more, for none)
_CELL = (CELLS, 0.5), (CELLS, 0.2), (CELLS + 1, 0.1)
LOCALIZER_HEADS: Heads = (*HEADS[:3], *(_CELL[:1] * 4), *(_CELL[1:2] * 12), *(_CELL[2:] * 16))


def extents(scene: Scene) -> np.ndarray:
    """Class numbers of each object, `(8, heads)`, `IGNORE` where unknown; the columns of `LOCALIZER_HEADS`.

    Boxes, as `covering` gives them: of the object; of all objects of its colour, of its shape, of both; of the next
    object in each direction, the last class for none.
    """
    table = properties(scene)
    out = np.full((MOST, len(LOCALIZER_HEADS)), IGNORE)
    for i, o in enumerate(scene.objects):
        row = [*table[i, :3], *covering(scene, (i,))]
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
    """The object that each of the localiser's patches shows `(144,)`, as `patch_owners` has them."""
    place = (np.arange(built.LOCALIZER_SIZE) + 0.5) * built.SIZE / built.LOCALIZER_SIZE
    return patch_owners(pixel_owners(scene)[np.ix_(place.astype(int), place.astype(int))])


class Localizer(nn.Module):
    """The localiser with the heads that only training needs. Tower and language model learn together."""

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
        tower_in_small = self.llava.model.vision_tower
        tower_in_small.load_state_dict({key: weights[key] for key in tower_in_small.state_dict()})

    @torch.no_grad()
    def adopt(self, language: "Language", pool: Pool) -> None:
        """Puts the first layers of the main model's language model behind the tower, and fits the projector to them.

        That language model already attends to where a question asks. The projector's second layer becomes the linear
        map (ridge regression) from the localiser's features to the main model's image embeds, averaged over the patches
        that one of the localiser's covers, on `pool`'s first 192 scenes. Small singular values of the map, which carry
        the boxes above all, are raised to 0.3 of the median. Of an MLP's units those with the largest weights stay.
        """
        # 1. both models' features of the same scenes
        device = self.heads.weight.device
        batches = [pool.pixels[at : at + 64] for at in range(0, min(pool.count, 192), 64)]
        features = torch.cat([self.vision_features(normalise(shrink(batch), device)) for batch in batches])  # (B, n, D)
        projector, main = self.llava.model.multi_modal_projector, language.llava.model.multi_modal_projector
        whiten(projector, features.flatten(0, 1))
        main_embeds = main(torch.from_numpy(np.array(language.features[: len(features)])).float().to(device))

        # 2. the map from the one to the other
        grid = main_embeds.transpose(1, 2).unflatten(2, (built.GRID, built.GRID))
        side = (built.LOCALIZER_GRID, built.LOCALIZER_GRID)
        wanted = F.adaptive_avg_pool2d(grid, side).flatten(2).transpose(1, 2).flatten(0, 1).double()
        hidden = projector.act(projector.linear_1(features.flatten(0, 1))).double()
        mean = hidden.mean(0)
        ridge = 1e-3 * len(hidden) * torch.eye(hidden.shape[1], device=device, dtype=hidden.dtype)
        centred = hidden - mean
        weight = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (wanted - wanted.mean(0))).T
        u, scale, v = torch.linalg.svd(weight)
        weight = u @ torch.diag(scale.clamp(min=0.3 * scale.median())) @ v
        projector.linear_2.weight.copy_(weight)
        projector.linear_2.bias.copy_(wanted.mean(0) - weight @ mean)

        # 3. the language model's first layers, of fewer MLP units
        narrow, wide = self.llava.model.language_model, language.llava.model.language_model
        vocabulary = wide.embed_tokens.weight.shape[0]  # the localiser's tokens are the main model's, then the corners
        narrow.embed_tokens.weight[:vocabulary] = wide.embed_tokens.weight
        self.llava.lm_head.weight[:vocabulary] = language.llava.lm_head.weight
        narrow.norm.load_state_dict(wide.norm.state_dict())
        for layer, wide_layer in zip(narrow.layers, wide.layers, strict=False):
            weights = wide_layer.state_dict()
            size = weights["mlp.gate_proj.weight"].norm(dim=1) * weights["mlp.up_proj.weight"].norm(dim=1)
            size = size * weights["mlp.down_proj.weight"].norm(dim=0)
            units = size.topk(layer.mlp.gate_proj.out_features).indices.sort().values
            for name in ("gate_proj", "up_proj"):
                weights[f"mlp.{name}.weight"] = weights[f"mlp.{name}.weight"][units]
            weights["mlp.down_proj.weight"] = weights["mlp.down_proj.weight"][:, units]
            layer.load_state_dict(weights)

    def vision_features(self, pixels: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Hidden states of the tower's last layer `(B, n, D)`, of the chosen patches `(B, n)`, or of all."""
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
        with torch.set_grad_enabled(plan.trains != "language"):
            features = self.vision_features(pixels, chosen.to(device))
        if plan.trains != "language":
            table = torch.from_numpy(np.stack([extents(s) for s in scenes])).to(device)
            dense = read_off(self.heads(features), LOCALIZER_HEADS, table, shown.gather(1, chosen).to(device))
            losses["dense"] = 0.5 * dense
        if plan.trains != "tower":
            groups = []
            for scene in scenes:
                boxes = [(q, covering(scene, q.asked, MARGIN)) for q in questions(scene, 8, rng, plan.kinds)]
                groups.append([replace(q, answer="[{},{},{},{}]".format(*box)) for q, box in boxes])
            packed = pack(groups, chosen, shown, self.tokenizer, rng, closely=plan.closely)
            losses |= answer_losses(self.llava, features, packed, plan)[0]
        return losses

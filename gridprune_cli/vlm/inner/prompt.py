"""What of a batch of prompts is still in the sequence, and which of it a stage drops."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gridprune_cli.pruning.placeholders import SEPARATOR, staying
from gridprune_cli.pruning.region import inside
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage
from gridprune_cli.tokens import PrunedSet

_TEXT = SEPARATOR - 1  # in `PromptStages.visual`: a place of the prompt that is no image token


@dataclass(frozen=True)
class Remaining:
    """What of B padded prompts is in the sequence from some layer on: n entries each, padded on the left again.

    places   (B, n) int64: each entry's place in the padded prompt; 0 for padding that a stage has put there
    valid    (B, n) bool: false for padding
    compact  (B,) bool: which prompts are numbered on from 0, instead of keeping their positions
    """

    places: Tensor
    valid: Tensor
    compact: Tensor

    @property
    def length(self) -> int:
        """n."""
        return self.places.shape[1]

    @cached_property
    def any_compact(self) -> bool:
        return bool(self.compact.any())

    @cached_property
    def padded(self) -> bool:
        return not bool(self.valid.all())

    def positions(self) -> Tensor:
        """(B, n) positions from 0 on, for the prompts that are compact; 0 for padding."""
        return (self.valid.long().cumsum(1) - 1).clamp(min=0)


class PromptStages:
    """One pruned set's stages, and what stands at each place of its padded prompt of length L.

    stages         by their layers
    visual         (L,) which of the N visual tokens an image token stands for, `SEPARATOR`, or `_TEXT`
    text           (L,) bool: behind the last image
    rater_weights  (L,) weights of the queries whose attention is measured, for rules with raters; they sum to 1
    saliency       (N,) how much the vision tower attends to a visual token
    image          (N,) which of the images a visual token is of
    within         (N,) bool: inside the contextual region of its image
    """

    def __init__(self, pruned: PrunedSet, is_image_token: Tensor):
        """`is_image_token` (L,) bool is of the padded prompt."""
        self.stages = {stage.layer: stage for stage in pruned.schedule.stages} if pruned.schedule else {}
        self.visual = torch.full((len(is_image_token),), _TEXT)
        if pruned.placeholder_map is not None:
            self.visual[is_image_token] = pruned.placeholder_map.long()
        self.text = is_image_token.flip(0).cumsum(0).flip(0) == 0
        self.rater_weights = torch.zeros(len(is_image_token))
        self.views = tuple(view for image in pruned.images for view in image.views)
        counts = torch.tensor([image.count for image in pruned.images])
        self.image = torch.repeat_interleave(torch.arange(len(counts)), counts)
        self.saliency = pruned.saliency
        self.within = torch.cat(
            [
                inside(image.views, image.region) if image.region else torch.zeros(image.count, dtype=torch.bool)
                for image in pruned.images
            ]
        )

    @property
    def rated(self) -> Rule | None:
        """The first rule that names raters."""
        return next((stage.rule for stage in self.stages.values() if stage.rule.rated), None)

    def rate(self, rule: Rule, hidden: Tensor) -> None:
        """Sets `rater_weights`, from the prompt's hidden states (L, D) at the input of the first layer."""
        text = self.text.nonzero()[:, 0]
        self.rater_weights[text] = rule.raters(hidden[self.visual >= 0], hidden[text]).float().cpu()
        if not bool(self.rater_weights.any()):
            self.rater_weights[-1] = 1
        self.rater_weights /= self.rater_weights.sum()

    def stays(self, stage: Stage, places: Tensor, measured: dict[str, Tensor]) -> Tensor:
        """(n,) bool: which of the entries at `places` (n,) stay.

        `measured` has what the stage's rule looks at, by the names of `LayerSignals`, (n, ...) each.
        """
        # 1. the visual tokens that are there, and the text behind the last image
        visual = self.visual[places]  # (n,)
        at_visual, at_text = (visual >= 0).nonzero()[:, 0], self.text[places].nonzero()[:, 0]
        tokens = visual[at_visual]  # (v,)
        of_text = {
            f"text_{name}": values[at_text.to(values.device)]
            for name, values in measured.items()
            if name not in ("attention", "rotary")
        }
        # 2. the rule selects, of each image by itself or of all together
        group = self.image[tokens] if len(stage.budgets) > 1 else torch.zeros_like(tokens)  # (v,)
        kept = []
        for number, k in enumerate(stage.budgets):
            members = (group == number).nonzero()[:, 0]
            of_tokens = {name: v[at_visual[members].to(v.device)] for name, v in measured.items()}
            of_tokens["saliency"] = self.saliency[tokens[members]]
            signals = LayerSignals(tokens[members], self.within[tokens[members]], self.views, **of_tokens, **of_text)
            kept.append(tokens[members[stage.rule.select(signals, min(k, len(members)))]])
        # 3. text stays, and separators as the visual tokens around them do
        stays = visual == _TEXT
        stays[~stays] = staying(visual[~stays], torch.cat(kept), len(self.image))
        return stays

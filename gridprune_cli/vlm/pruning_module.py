"""The trained module that a checkpoint may have beside it for CoViPAL (arXiv 2508.17243): how much each token matters.

    s = p(x, t)

x are the image embeds and t the embeddings of the question's tokens, both as the first layer of the language model
receives them. That much is the paper's, which calls p a small classifier. Its layers and sizes were not read, and these
are ours: a visual token is narrowed to a few numbers; the mean of the question's tokens, through two layers, gives a
factor for each of these; and a small network reads the score from the products. Visual tokens are not compared with
each other, since the vision tower did that.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridprune_cli.vlm.trained import load_trained, save_trained

FILE = "covipal/model.safetensors"  # in a folder of its own: engines read every file of weights beside a checkpoint
WIDTH = 96  # W, of what visual tokens and questions meet in; ours


class PruningModule(nn.Module):
    """Scores for visual tokens, from embeddings that are `embed_width` (D) wide."""

    def __init__(self, embed_width: int):
        super().__init__()
        self.norm_image = nn.LayerNorm(embed_width)
        self.norm_question = nn.LayerNorm(embed_width)
        self.image = nn.Linear(embed_width, WIDTH)
        self.token = nn.Linear(embed_width, WIDTH)
        self.question = nn.Linear(WIDTH, WIDTH)
        self.factors = nn.Linear(WIDTH, WIDTH)
        self.norm_products = nn.LayerNorm(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.score = nn.Linear(2 * WIDTH, 1)

    def forward(self, image_embeds: Tensor, question_embeds: Tensor, is_token: Tensor | None = None) -> Tensor:
        """The scores `(B, N)` of visual tokens `(B, N, D)` for questions of tokens `(B, M, D)`, of any M.

        `is_token` (B, M) is False where a question is padded; None where none is.
        """
        if is_token is None:
            is_token = question_embeds.new_ones(question_embeds.shape[:2])
        weights = is_token / is_token.sum(1, keepdim=True).clamp(min=1)  # (B, M)
        tokens = self.question(F.gelu(self.token(self.norm_question(question_embeds))))  # (B, M, W)
        factors = self.factors(F.gelu((tokens * weights[..., None]).sum(1)))  # (B, W)
        products = self.image(self.norm_image(image_embeds)) * factors[:, None]  # (B, N, W)
        hidden = F.gelu(self.hidden(self.norm_products(products)))
        scores: Tensor = self.score(torch.cat([products, hidden], dim=-1))
        return scores[..., 0]


def save_pruning_module(module: PruningModule, folder: Path) -> None:
    """Writes it beside a checkpoint, in bfloat16."""
    save_trained(module, folder / FILE)


def load_pruning_module(folder: Path) -> PruningModule:
    """The module beside a checkpoint, in float32 on the CPU. Raises GridpruneError where it can't be read."""
    return load_trained(lambda weights: PruningModule(weights["image.weight"].shape[1]), folder / FILE)

"""The trained compressor that a checkpoint may have beside it, after CROP's PLC (arXiv 2505.21233).

It starts from the features that pooling gives and adds what it was trained to add: each kept token looks, by
cross-attention, at all tokens on its own side of the region's border. The query of a token inside comes from its pooled
features; one outside has a learnable query on top of that. CROP's layers and sizes were not read; these are ours.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gridprune_cli.vlm.trained import load_trained, save_trained

FILE = "compressor/model.safetensors"  # in a folder of its own: engines read every file of weights beside a checkpoint
HEAD = 32  # width of an attention head; with QUERIES ours, since CROP's were not read
QUERIES = 16  # learnable ones

_RELEVANCE_SCALE = 10.0  # it is trained on CLIP's cosines; times this they are about as large as normed features are


class Compressor(nn.Module):
    """One layer of cross-attention and one of a feed-forward network, each added to its input, `width` wide.

    `width`, that of vision features, is a multiple of 32, the width of an attention head.

    The last weights of both start as zero, so that an untrained compressor gives back what pooling gave.
    """

    def __init__(self, width: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES, width) * width**-0.5)
        self.norm_tokens = nn.LayerNorm(width)
        self.norm_rows = nn.LayerNorm(width)
        self.ask = nn.Linear(width, width)
        self.tell = nn.Linear(width + 1, 2 * width)  # keys and values
        self.out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 2 * width)
        self.narrow = nn.Linear(2 * width, width)
        for last in (self.out, self.narrow):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, vision_features: Tensor, relevance: Tensor, within: Tensor, pooled: Tensor, inside: Tensor
    ) -> Tensor:
        """The features of the kept tokens, `(B, K, C)`.

        vision_features (B, N, C), relevance (B, N) and within (B, N) bool are of all tokens; pooled (B, K, C) are those
        of the kept tokens after pooling, and inside (B, K) bool tells which of these lie in the region. The j-th kept
        token outside takes the j-th query, and the first again behind the last one.
        """
        tokens = torch.cat([self.norm_tokens(vision_features), _RELEVANCE_SCALE * relevance[..., None]], dim=-1)
        turn = ((~inside).long().cumsum(1) - 1).clamp(min=0) % QUERIES
        query = self.ask(self.norm_rows(pooled)) + self.queries[turn] * ~inside[..., None]  # (B, K, C)
        key, value = self.tell(tokens).chunk(2, dim=-1)  # (B, N, C)
        query, key, value = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (query, key, value))
        same = (inside[:, :, None] == within[:, None])[:, None]  # (B, 1, K, N)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=same)
        out = pooled + self.out(attended.transpose(1, 2).flatten(2))  # (B, K, C)
        return out + self.narrow(F.gelu(self.wide(self.norm_out(out))))


def save_compressor(compressor: Compressor, folder: Path) -> None:
    """Writes it beside a checkpoint, in bfloat16."""
    save_trained(compressor, folder / FILE)


def load_compressor(folder: Path) -> Compressor:
    """The compressor beside a checkpoint, in float32 on the CPU. Raises GridpruneError where it can't be read."""
    return load_trained(lambda weights: Compressor(weights["queries"].shape[1]), folder / FILE)

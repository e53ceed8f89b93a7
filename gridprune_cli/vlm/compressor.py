"""The trained compressor that a checkpoint may have beside it, after CROP's PLC (arXiv 2505.21233).

It starts from the states that pooling gives and adds what it was trained to add: each row looks, by cross-attention, at
all tokens of its own side of the region's border. Rows inside ask with their anchor's state; rows outside ask with a
learnable query on top of it. CROP's layers and sizes are not public; these are ours.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gridprune_cli.errors import GridpruneError

FILE = "compressor.safetensors"
HEAD = 32  # width of an attention head
QUERIES = 16
_SPREAD = 10.0  # relevance is a cosine; times this it is about as large as a state's normed features


class Compressor(nn.Module):
    """One layer of cross-attention and one of a feed-forward network, each added to its input, `width` wide.

    `width`, that of a state, is a multiple of 32, the width of an attention head.

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
        """States of the rows `(B, K, C)`.

        states (B, N, C), relevance (B, N) and within (B, N) bool are of all tokens; pooled (B, K, C) are the rows'
        states after pooling, and inside (B, K) bool tells which rows' anchors lie in the region. The j-th row outside
        takes the j-th query, and starts again behind the last one.
        """
        tokens = torch.cat([self.norm_tokens(vision_features), _SPREAD * relevance[..., None]], dim=-1)
        turn = ((~inside).long().cumsum(1) - 1).clamp(min=0) % QUERIES
        asked = self.ask(self.norm_rows(pooled)) + self.queries[turn] * ~inside[..., None]
        key, value = self.tell(tokens).chunk(2, dim=-1)
        asked, key, value = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (asked, key, value))
        same = (inside[:, :, None] == within[:, None])[:, None]  # (B, 1, K, N)
        seen = F.scaled_dot_product_attention(asked, key, value, attn_mask=same)
        rows = pooled + self.out(seen.transpose(1, 2).flatten(2))
        return rows + self.narrow(F.gelu(self.wide(self.norm_out(rows))))


def save_compressor(compressor: Compressor, folder: Path) -> None:
    """Writes it beside a checkpoint, in bfloat16."""
    weights = {name: weight.detach().to("cpu", torch.bfloat16) for name, weight in compressor.state_dict().items()}
    save_file(weights, folder / FILE, {"format": "pt"})


def load_compressor(folder: Path) -> Compressor:
    """The compressor beside a checkpoint, in float32 on the CPU. Raises GridpruneError where it can't be read."""
    try:
        weights = load_file(folder / FILE)
        compressor = Compressor(weights["queries"].shape[1])
        compressor.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, RuntimeError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise GridpruneError(f"{folder / FILE}: can't be loaded ({first}); fetch it again") from fault
    return compressor.float().eval()

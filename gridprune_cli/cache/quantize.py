"""Vectors in eight bits a number, each with a scale: half the space of 16 bits, and less accuracy.

Of an encoded image they are the vision features of its tokens, of a prefix the keys and values of each token and head
in each layer, and the hidden states of each token.

    scale_i = max_j |x_ij| / top         of vector i; top is 448 for float8, 127 for int8
    code_ij = x_ij / scale_i             rounded to the nearest number that the format has
    x'_ij   = code_ij scale_i

float8 is e4m3 of OCP's 8-bit floating point specification (three bits of mantissa, no infinities): the error of a
number is at most 1 part in 16, unless it is much smaller than the largest of its vector. int8 is symmetric, without
-128: the error of every number is at most half a scale, so the large ones are more exact than in float8, the small ones
less.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STORAGES = ("full", "float8", "int8")  # full: in the dtype that the model computes in
KINDS = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
_TOPS = {"float8": 448.0, "int8": 127.0}
_LEAST = torch.finfo(torch.float32).tiny  # of a scale, so that a vector of zeros is not divided by zero


@dataclass(frozen=True)
class Packed:
    """Vectors as they are stored: codes `(..., C)`, float8_e4m3fn or int8, and scales `(...)` float32.

    Raises ValueError where the two don't fit each other.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.codes.dim() < 2 or self.scales.shape != self.codes.shape[:-1] or self.scales.dtype != torch.float32:
            raise ValueError(f"scales {self.scales.dtype} {tuple(self.scales.shape)} for {tuple(self.codes.shape)}")

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The vectors `(..., C)` in a dtype to compute in."""
        return self.codes.float().mul_(self.scales[..., None]).to(dtype)


def pack(vectors: Tensor, storage: str) -> Packed:
    """Finite vectors `(..., C)`, C at least 1, as `float8` or `int8`."""
    exact = vectors.float()
    scales = (exact.abs().amax(-1) / _TOPS[storage]).clamp_min(_LEAST)  # (...)
    codes = exact / scales[..., None]  # (..., C)
    return Packed((codes.round() if storage == "int8" else codes).to(KINDS[storage]), scales)

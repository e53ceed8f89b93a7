"""States in eight bits a number, each row with a scale of its own: half the space of 16 bits, and some of the accuracy.

    scale_i = max_j |x_ij| / top         top is 448 for float8, 127 for int8
    code_ij = x_ij / scale_i             rounded to the nearest number that the format has
    x'_ij   = code_ij scale_i

float8 is e4m3 of OCP's 8-bit floating point specification (three bits of mantissa, no infinities): of a number that is
not much smaller than its row's largest, it keeps 1 part in 16. int8 is symmetric, without -128: it keeps every number
to half a scale, which is more for the large ones of a row, and less for the small.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

STORAGES = ("full", "float8", "int8")  # full: as the tower gave them
KINDS = {"float8": torch.float8_e4m3fn, "int8": torch.int8}
_TOPS = {"float8": 448.0, "int8": 127.0}
_LEAST = torch.finfo(torch.float32).tiny  # of a scale: a row of zeros has one, too


@dataclass(frozen=True)
class Packed:
    """Rows as they are stored: codes `(N, C)`, float8_e4m3fn or int8, and scales `(N,)` float32.

    Raises ValueError where the two don't fit each other.
    """

    codes: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.scales.shape != self.codes.shape[:1] or self.scales.dtype != torch.float32:
            raise ValueError(f"scales {self.scales.dtype} {tuple(self.scales.shape)} for {tuple(self.codes.shape)}")

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The rows `(N, C)` in a dtype to compute in."""
        return self.codes.float().mul_(self.scales[:, None]).to(dtype)


def pack(rows: Tensor, storage: str) -> Packed:
    """Finite rows `(N, C)`, C at least 1, as `float8` or `int8`."""
    rows = rows.float()
    scales = (rows.abs().amax(1) / _TOPS[storage]).clamp_min(_LEAST)
    codes = rows / scales[:, None]
    return Packed((codes.round() if storage == "int8" else codes).to(KINDS[storage]), scales)

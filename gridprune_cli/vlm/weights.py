"""The weights of a checkpoint on disk: which files hold them, and their tensors, without running what a file holds."""

import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gridprune_cli.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = ("model.safetensors", "pytorch_model.bin")  # in transformers' order; either may be cut into shards
SAFE = ".safetensors"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from: safetensors where there are any, else pickled ones.

    Shards are those that the index names, whether they are there or not. Raises BadInput for an index that is none.
    """
    for name in _NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
                elsewhere = [shard for shard in shards if os.path.basename(shard) != shard]
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as fault:
                raise BadInput("can't be read; fetch it again", place=str(index)) from fault
            if elsewhere:
                raise BadInput(
                    f"names {elsewhere[0][:80]!r}, which is no file of this folder; fetch it again", place=str(index)
                )
            return [folder / shard for shard in shards]
    return []


def tensors(folder: Path) -> Iterator[tuple[str, "Tensor"]]:
    """Name and tensor of every weight. Files are mapped into memory, so what is not looked at is hardly read.

    Raises BadInput as `check_pickles`, and what safetensors raises of a damaged file.
    """
    from transformers.modeling_utils import load_state_dict

    check_pickles(folder)
    for path in weight_files(folder):
        yield from load_state_dict(path).items()


def check_pickles(folder: Path) -> None:
    """Raises BadInput for pickled weights that torch's restricted unpickler, which knows tensors alone, can't read.

    transformers names that unpickler explicitly (`weights_only=True`), so no environment variable takes it away.
    """
    from torch import OutOfMemoryError
    from transformers.modeling_utils import load_state_dict

    for path in weight_files(folder):
        if path.suffix == SAFE:
            continue
        # torch asks to be told of protocols that its unpickler may not know: what it can't read is told here
        warnings.filterwarnings("ignore", "Detected pickle protocol", UserWarning)
        try:
            load_state_dict(path, weights_only=True)
        except (MemoryError, OutOfMemoryError):
            raise
        except Exception as fault:  # a damaged pickle can make it fail in any way
            raise BadInput(
                "can't be read as pickled tensors alone: it is damaged, or holds code, which is never run; "
                "name a copy with safetensors",
                place=str(path),
            ) from fault

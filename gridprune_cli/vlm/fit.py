"""Whether a pruned set fits a model: rows made for one language model mean nothing to another."""

import hashlib
import json

from safetensors import safe_open

from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm.checkpoint import Checkpoint


def fingerprint(checkpoint: Checkpoint) -> str:
    """What tells language models apart: sha256 over the language model's config and its final norm's weights.

    Reads nothing of the vision tower, so it is the same where that has been taken away. Training changes every weight,
    so one small tensor will do. Raises GridpruneError where the checkpoint has no such tensor.
    """
    config = checkpoint.config.get("text_config", checkpoint.config)
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                if name.endswith(".norm.weight") and "visi" not in name and "visual" not in name:
                    total.update(file.get_tensor(name).float().numpy().tobytes())
                    return total.hexdigest()
    raise GridpruneError(f"{checkpoint.folder}: no final norm of a language model among its weights")

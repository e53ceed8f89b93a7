"""The SigLIP that a tiny checkpoint's tower was taken from: the same tower, a pooling head, and a text tower.

Its text tower takes 12 tokens, and every text is filled up to that length, as SigLIP's are.
"""

from pathlib import Path
from typing import Any

from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import SiglipConfig, SiglipModel

from tiny_families import EOS, PAD, VOCAB, build_tokenizer, load_reference, wake

LENGTH = 12
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")


def write_siglip(folder: Path, checkpoint: Path, **vision: Any) -> Path:
    """Writes the SigLIP of a tiny checkpoint into a folder, which it returns. `vision` changes its vision_config."""
    model = load_reference(checkpoint).model
    tower = model.vision_model if hasattr(model, "vision_model") else model.vision_tower
    sizes = {size: getattr(tower.config, size) for size in SIZES} | vision
    text = {size: sizes[size] for size in SIZES[:4]} | {"vocab_size": VOCAB, "max_position_embeddings": LENGTH}
    special = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
    siglip = SiglipModel(SiglipConfig(vision_config=sizes, text_config=text | special))
    wake(siglip, seed=7)
    weights = siglip.vision_model.state_dict()
    shared = {name: w for name, w in tower.state_dict().items() if w.shape == weights[name].shape}
    lacks = siglip.vision_model.load_state_dict(shared, strict=False).missing_keys
    assert vision or all(name.startswith("head.") for name in lacks)
    siglip.save_pretrained(folder)
    tokenizer = build_tokenizer([])
    tokenizer.padding_side = "right"
    tokenizer.backend_tokenizer.normalizer = Lowercase()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.save_pretrained(folder)
    return folder

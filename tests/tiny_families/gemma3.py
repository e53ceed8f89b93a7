"""Gemma 3: a small SigLIP tower over 112 x 112 pixels, 8 x 8 patches averaged to 4 x 4 visual tokens.

Its chat prompt begins with the token that its tokenizer begins every text with, as the published ones do.
"""

from pathlib import Path
from typing import Any

from PIL.Image import Image
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

from tiny_families import BOS, CHATML, EOS, PAD, VOCAB, build_tokenizer, save, wake


def write(folder: Path, seed: int = 0) -> Path:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = build_tokenizer(list(named.values()), **named)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    begin, end, image = tokenizer.convert_tokens_to_ids(list(named.values()))
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = {"num_hidden_layers": 3, "image_size": 112, "patch_size": 14, "vision_use_head": False}
    gemma = small | {"hidden_size": 48, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 16}
    gemma |= {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2, "sliding_window": 512}  # longer than any prompt
    rope = {"rope_type": "default", "rope_theta": 10.0}  # so small that the places of few tokens matter
    gemma |= {"rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    special = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(
            vision_config=small | vision | {"model_type": "siglip_vision_model"},
            text_config=gemma | special | {"vocab_size": VOCAB, "max_position_embeddings": 2048},
            mm_tokens_per_image=16,
            boi_token_index=begin,
            eoi_token_index=end,
            image_token_index=image,
        )
    )
    wake(model, seed, embeddings=0.04)
    images = Gemma3ImageProcessor(size={"height": 112, "width": 112})
    chat = "{{ bos_token }}" + CHATML.replace("IMAGE", named["boi_token"])
    return save(folder, model, Gemma3Processor(images, tokenizer, image_seq_length=16), chat)


def inputs(processor: Any, pictures: list[Image], question: str) -> dict[str, Any]:
    """What the processor's own chat gives; a text alone would begin twice."""
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(processor.apply_chat_template(chat, **options))

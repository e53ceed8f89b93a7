"""What the embedded model is made of: configs, tokenizer, processor, and how the two checkpoints lie in one folder.

    <folder>/        LlavaForConditionalGeneration with tokenizer, processor and chat template
    <folder>/clip/   CLIPModel: the same vision tower, and the text tower that gives the relevance

Both are plain transformers checkpoints; nothing of this package is needed to load them.
"""

import re
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gridprune_cli.scenes.scene import _PHRASES, CHARACTERS, COLOURS, DIRECTIONS, PLACES, SHAPES, SIZE

WIDTH = 192
PATCH = 14
GRID = SIZE // PATCH  # 16 x 16 visual tokens
PAD, BOS, UNK, EOS, IMAGE = range(5)  # token ids
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word of the scenes' questions and answers, a token each. Words are case-sensitive: "A" is a character."""
    phrases = [p.replace("{}", " ") for group in _PHRASES.values() for p in group]
    words = [w for text in (*phrases, *PLACES, *DIRECTIONS) for w in re.findall(r"\w+|[^\w\s]+", text)]
    words += [*COLOURS, *SHAPES, *(f"{s}s" for s in SHAPES if s != "cross"), "crosses", *CHARACTERS]
    words += ["object", "objects", "with", "a", "an", "yes", "no", "nothing", "USER", "ASSISTANT", ":"]
    words += [w.lower() for w in words] + [w.capitalize() for w in words]
    return {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<s>", "<unk>", "</s>", "<image>", *words]))}


def make_tokenizer(*, close: bool) -> PreTrainedTokenizerFast:
    """The word tokenizer, `<s>` in front; `close` also puts `</s>` behind, as CLIP's text tower needs."""
    core = Tokenizer(models.WordLevel(vocabulary(), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if close else "<s> $A", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
        model_max_length=77 if close else 512,
        padding_side="right" if close else "left",
    )


def make_processor() -> LlavaProcessor:
    side = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=side),
        tokenizer=make_tokenizer(close=False),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT_TEMPLATE,
    )


def clip_config() -> CLIPConfig:
    shared = dict(hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_attention_heads=6, hidden_act="gelu")
    special = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return CLIPConfig(
        vision_config=dict(**shared, num_hidden_layers=7, image_size=SIZE, patch_size=PATCH, projection_dim=WIDTH),
        text_config=dict(
            **shared,
            **special,
            num_hidden_layers=3,
            vocab_size=len(vocabulary()),
            max_position_embeddings=77,
            projection_dim=WIDTH,
        ),
        projection_dim=WIDTH,
        logit_scale_init_value=2.3026,  # log 10: cosines must spread widely to tell patches apart
    )


def llava_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=clip_config().vision_config,
        text_config=dict(
            model_type="llama",
            vocab_size=len(vocabulary()),
            hidden_size=WIDTH,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=0.06,  # the usual 0.02 is for models many times as wide
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        ),
        image_token_index=IMAGE,
        image_seq_length=GRID * GRID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def save(folder: Path, llava: LlavaForConditionalGeneration, clip: CLIPModel) -> None:
    """Writes both checkpoints in bfloat16, the precision they were trained in."""
    for model, place in ((llava, folder), (clip, folder / "clip")):
        model.to(torch.bfloat16).save_pretrained(place)
    make_processor().save_pretrained(folder)
    make_tokenizer(close=True).save_pretrained(folder / "clip")
    make_processor().image_processor.save_pretrained(folder / "clip")

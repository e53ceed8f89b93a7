"""What the embedded model is made of: configs, tokenizer, processor, and how the two checkpoints lie in one folder.

    <folder>/        LlavaForConditionalGeneration with tokenizer, processor and chat template
    <folder>/clip/   CLIPModel: the same vision tower, and the text tower that gives the relevance
    <folder>/compressor/  the compressor of `--plc trained`
    <folder>/covipal/     the pruning module of `--method covipal`

Nothing else lies beside the first, since engines read every file of weights in a checkpoint's folder.

The localiser is a third one, in a folder of its own: a smaller LlavaForConditionalGeneration that takes the picture at
three quarters of its size and answers a question with the box `[x0,y0,x1,y1]` of what it asks for.

All are plain transformers checkpoints; nothing of this package is needed to load them.
"""

import re
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gridprune_cli.scenes.questions import PHRASES
from gridprune_cli.scenes.scene import CELLS, CHARACTERS, COLOURS, DIRECTIONS, PLACES, SHAPES, SIZE
from training.layout import publish

WIDTH = 192
PATCH = 14
GRID = SIZE // PATCH  # 16 x 16 visual tokens
LOCALIZER_SIZE = 168  # pixels, to which the localiser's processor scales a picture
LOCALIZER_GRID = LOCALIZER_SIZE // PATCH  # 12 x 12 visual tokens
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
    phrases = [p.replace("{}", " ") for group in PHRASES.values() for p in group]
    vocabulary = [w for text in (*phrases, *PLACES, *DIRECTIONS) for w in re.findall(r"\w+|[^\w\s]+", text)]
    vocabulary += [*COLOURS, *SHAPES, *(f"{s}s" for s in SHAPES if s != "cross"), "crosses", *CHARACTERS]
    vocabulary += ["object", "objects", "with", "a", "an", "yes", "no", "nothing", "USER", "ASSISTANT", ":"]
    vocabulary += [w.lower() for w in vocabulary] + [w.capitalize() for w in vocabulary]
    return {w: i for i, w in enumerate(dict.fromkeys(["<pad>", "<s>", "<unk>", "</s>", "<image>", *vocabulary]))}


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


def make_localizer_tokenizer() -> PreTrainedTokenizerFast:
    """The word tokenizer, with each corner of a box a token: `[2,3,5,6]` is `[2,3,` and `5,6]`.

    Two tokens name a box, as in Kosmos-2 (arXiv 2306.14824 §2): one for its first cell and one for its last.
    """
    spots = [f"{x},{y}" for y in range(CELLS) for x in range(CELLS)]
    texts = [*vocabulary(), *(f"[{spot}," for spot in spots), *(f"{spot}]" for spot in spots)]
    core = Tokenizer(models.WordLevel({text: i for i, text in enumerate(texts)}, unk_token="<unk>"))
    words_or_corners = Regex(r"\[\d,\d,|\d,\d\]|\w+|[^\w\s]+")
    core.pre_tokenizer = pre_tokenizers.Split(words_or_corners, behavior="removed", invert=True)
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens=["<image>"],
        model_max_length=512,
        padding_side="left",
    )


def make_processor(size: int = SIZE, tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    side = {"height": size, "width": size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=side),
        tokenizer=tokenizer or make_tokenizer(close=False),
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
        logit_scale_init_value=2.3026,  # log 10: a scale of 10: cosines of neighbouring patches differ little
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


def localizer_config() -> LlavaConfig:
    """The main model's in small: 4 of 7 tower layers, 4 of 6 narrower language model layers, 144 of 256 tokens."""
    config = llava_config()
    config.vision_config.num_hidden_layers = 4
    config.vision_config.image_size = LOCALIZER_SIZE
    config.vision_feature_layer = -1  # no layer is run for nothing
    config.image_seq_length = LOCALIZER_GRID * LOCALIZER_GRID
    config.text_config.vocab_size = len(make_localizer_tokenizer())
    config.text_config.num_hidden_layers = 4
    config.text_config.intermediate_size = 384
    return config


def save_localizer(folder: Path, llava: LlavaForConditionalGeneration) -> None:
    llava.to(torch.bfloat16).save_pretrained(folder)
    make_processor(LOCALIZER_SIZE, make_localizer_tokenizer()).save_pretrained(folder)
    publish(folder)


def save(
    folder: Path,
    llava: LlavaForConditionalGeneration,
    clip: CLIPModel,
    processor: LlavaProcessor | None = None,
    clip_tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Writes both checkpoints in bfloat16, with the first recipe's processor and tokenizer where none are named."""
    processor = processor or make_processor()
    for model, place in ((llava, folder), (clip, folder / "clip")):
        model.to(torch.bfloat16).save_pretrained(place)
    processor.save_pretrained(folder)
    (clip_tokenizer or make_tokenizer(close=True)).save_pretrained(folder / "clip")
    processor.image_processor.save_pretrained(folder / "clip")
    for place in (folder, folder / "clip"):
        publish(place)

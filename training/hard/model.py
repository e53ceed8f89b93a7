"""What the hard checkpoint is made of: configs, tokenizer, processor; laid out in folders as the first one's."""

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from training import model as first
from training.hard.questions import PHRASES
from training.hard.scene import GRID, LETTERS, SIZE
from training.model import BOS, EOS, IMAGE, PAD

WIDTH = 128  # of tower, projector and language model


def vocabulary() -> dict[str, int]:
    """The first model's words, those of the signs' questions, and the letters: `B` starts a word, `##B` goes on.

    Single capitals are letters of words here, so the first model's are left out, and the article "A" too.
    """
    phrases = [p.replace("{}", " ") for group in PHRASES.values() for p in group]
    added = [w for text in (*phrases, "sign signs") for w in re.findall(r"\w+|[^\w\s]+", text)]
    texts = [*first.vocabulary(), *added, *(w.lower() for w in added)]
    texts = [t for t in texts if not re.fullmatch("[A-Z]", t)]
    texts += [*LETTERS, *(f"##{letter}" for letter in LETTERS)]
    return {text: i for i, text in enumerate(dict.fromkeys(texts))}


def make_tokenizer(*, close: bool) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: words of the questions are a token each, those on signs one a letter.

    `close` puts `</s>` behind, as CLIP's text tower needs.
    """
    core = Tokenizer(models.WordPiece(vocabulary(), unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=False)
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
        model_max_length=77 if close else 1024,
        padding_side="right" if close else "left",
    )


def clip_config() -> CLIPConfig:
    shared = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_attention_heads=4, hidden_act="gelu")
    special = dict(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    return CLIPConfig(
        vision_config=dict(**shared, num_hidden_layers=4, image_size=SIZE, patch_size=14, projection_dim=WIDTH),
        text_config=dict(
            **shared,
            **special,
            num_hidden_layers=2,
            vocab_size=len(vocabulary()),
            max_position_embeddings=77,
            projection_dim=WIDTH,
        ),
        projection_dim=WIDTH,
        logit_scale_init_value=2.3026,  # log 10, as the first one's
    )


def llava_config() -> LlavaConfig:
    return LlavaConfig(
        vision_config=clip_config().vision_config,
        text_config=dict(
            model_type="llama",
            vocab_size=len(vocabulary()),
            hidden_size=WIDTH,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            initializer_range=0.04,  # the usual 0.02 is for models many times as wide
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
    """Writes both checkpoints, laid out as the first recipe's."""
    processor = first.make_processor(SIZE, make_tokenizer(close=False))
    first.save(folder, llava, clip, processor, make_tokenizer(close=True))

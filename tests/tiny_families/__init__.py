"""Tiny random checkpoints of every family, saved to disk as published ones are.

One module per family, named like it, with `write(folder)`: it writes a checkpoint with its processor and returns
the folder. The models answer nonsense, but always the same nonsense.
"""

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, PreTrainedTokenizerFast

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.pruning_module import PruningModule, save_pruning_module

PAD, BOS, EOS = 0, 1, 2
VOCAB = 512  # size of the vocabularies

CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_checkpoint(family: str, folder: Path) -> Path:
    """Writes the tiny checkpoint of a family, with its pruning module, into a folder, which it returns."""
    with torch.random.fork_rng():  # a few one-dimensional weights begin at random
        torch.manual_seed(0)
        folder = import_module(f"tiny_families.{family}").write(folder)
        config = AutoConfig.from_pretrained(folder).get_text_config()
        save_pruning_module(PruningModule(config.hidden_size), folder)
        return folder


@cache
def open_family(folder: Path, dtype: str = "float32") -> Family:
    """The family of a checkpoint that no test changes. Each of its parts is loaded once per process."""
    return Pipeline(str(folder), dtype=dtype).family


def open_pipeline(folder: Path) -> Pipeline:
    """A pipeline in float32 without a cache, over the weights that `open_family` shares between tests."""
    return Pipeline(open_family(folder))


@cache
def load_reference(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Plain transformers' whole model of a checkpoint that no test changes, loaded once per process."""
    return open_family(folder).model_class.from_pretrained(folder, dtype=dtype, **options).eval()


def wake(model: torch.nn.Module, seed: int = 0, embeddings: float = 1.0) -> None:
    """Weights large enough that answers depend on every input.

    Tied to large embeddings, a model would only say its last word again.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        scale = parameter[0].numel() ** -0.5 if parameter.dim() >= 2 else 0.1
        scale = embeddings if "embed_tokens" in name else scale
        noise = torch.randn(parameter.shape, generator=generator) * scale
        parameter.data = noise if parameter.dim() >= 2 else parameter.data + noise


def build_tokenizer(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with special tokens; `named` ones become attributes, and must be among `special`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        ["USER: what colour is the left object? ASSISTANT: the square is red, yes, no"] * 4, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=special,
        model_specific_special_tokens=named or None,
        padding_side="left",
    )


def spell(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Makes answers of full length in single letters and digits alone: their text says which tokens they are."""
    shown = {tokenizer.get_vocab().get(letter) for letter in ascii_letters + digits}
    size = model.config.get_text_config().vocab_size
    model.generation_config.suppress_tokens = [token for token in range(size) if token not in shown]
    model.generation_config.eos_token_id = None


def save(folder: Path, model: Any, processor: Any, chat: str | None = None) -> Path:
    """Writes a checkpoint and its processor file by file: some processors can't save themselves without torchvision."""
    spell(model, processor.tokenizer)
    model.generation_config.pad_token_id = PAD
    model.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    processor.tokenizer.chat_template = chat
    processor.tokenizer.save_pretrained(folder)
    names = ("image_seq_length", "image_seq_len", "num_image_tokens", "vision_feature_select_strategy", "patch_size")
    names += ("num_additional_image_tokens", "vision_aspect_ratio")
    settings = {name: getattr(processor, name) for name in names if getattr(processor, name, None) is not None}
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"processor_class": type(processor).__name__, **settings}))
    return folder

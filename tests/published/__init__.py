"""Repositories as they are published: their settings, with the source of each file, and the names of their weights.

One JSON file per family. `write` makes of a repository a checkpoint that a test can run: widths, depths and the
vocabulary shrink, everything else stays, such as image sizes, rope types, tied weights, end tokens, chat templates and
the names and dtype of the weights. The weights are random.

In the data, `sources` says of each file where its copy stands ("recalled": from memory, no copy was to be had), and
`tokens` which text a published token id stands for. `weights` lists the published names, `*` standing for a layer's
number; `renamed` maps the beginnings of transformers' names to the published ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from string import ascii_letters, digits, punctuation
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_families import wake
from tokenizers import pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForImageTextToText, GemmaTokenizer, LlamaTokenizer, Qwen2Tokenizer

FOLDER = Path(__file__).parent
FILES = ("config.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
WORDS = 512  # size of the vocabularies
WIDTH, HEADS, HEAD = 64, 4, 16  # of language models
SHARDS = 3


def load() -> dict[str, dict[str, Any]]:
    """Repository -> its data, with the family in `family`, in alphabetical order of the families."""
    return {
        name: data | {"family": path.stem}
        for path in sorted(FOLDER.glob("*.json"))
        for name, data in json.loads(path.read_text("utf-8")).items()
    }


def write(data: dict[str, Any], folder: Path) -> Path:
    """The small checkpoint of a repository, in shards, in a folder."""
    write_settings(data, folder, shrink=True)
    _write_weights(data["weights"], folder)
    return folder


def write_settings(data: dict[str, Any], folder: Path, *, shrink: bool = False) -> Path:
    """The settings of a repository in a folder, its config as published or shrunk; without weights."""
    folder.mkdir(parents=True)
    ids = _write_tokenizer(data, folder)
    for file in FILES:
        if file in data:
            settings = _renumber(data[file], data["tokens"], ids)
            settings = _shrink(settings) if shrink and file == "config.json" else settings
            (folder / file).write_text(json.dumps(settings))
    for file in ("chat_template.json", "chat_template.jinja"):
        if file in data:
            (folder / file).write_text(json.dumps(data[file]) if file.endswith("json") else data[file])
    return folder


# ---- settings --------------------------------------------------------------------------------------------------------


def _renumber(settings: Any, tokens: dict[str, str], ids: dict[str, int]) -> Any:
    """Settings with the token ids of the small vocabulary in place of the published ones. Others stay as they are."""

    def number(value: Any) -> Any:
        if isinstance(value, list):
            return [number(one) for one in value]
        return ids[tokens[str(value)]] if str(value) in tokens else value

    renumbered = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            value = _renumber(value, tokens, ids)
        elif key.endswith(("token_id", "token_index")):
            value = number(value)
        renumbered[key] = value
    return renumbered


def _shrink(config: dict[str, Any]) -> dict[str, Any]:
    """The published config with small widths and few layers, its other settings as published."""
    kind = config["model_type"]
    full = AutoConfig.for_model(**config)
    text, vision = full.get_text_config(), full.vision_config
    small: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_attention_heads": HEADS,
        "num_key_value_heads": max(1, HEADS * (text.num_key_value_heads or 1) // text.num_attention_heads),
        "num_hidden_layers": {"gemma3": 6, "qwen3_vl": 4}.get(kind, 2),  # one that is not sliding; the deepstack's
        "vocab_size": WORDS,
    }
    if getattr(text, "head_dim", None):
        small["head_dim"] = HEAD
    published = config.get("text_config", config)  # older configs of Qwen have the language model's at the top
    rope = published.get("rope_scaling") or {}
    if "mrope_section" in rope:
        share = (text.hidden_size // text.num_attention_heads if not small.get("head_dim") else text.head_dim) // HEAD
        section = [n // share for n in rope["mrope_section"]]
        section[0] += HEAD // 2 - sum(section)
        small["rope_scaling"] = rope | {"mrope_section": section}
    tower: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48}
    if kind.startswith("qwen"):
        depth = 8 if kind == "qwen2_5_vl" else 4
        tower |= {"depth": depth, "num_heads": 2}
        tower |= {"embed_dim": 32, "hidden_size": WIDTH} if kind == "qwen2_vl" else {"out_hidden_size": WIDTH}
        for blocks in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if blocks in config["vision_config"]:
                tower[blocks] = [n * depth // vision.depth for n in config["vision_config"][blocks]]
    else:
        last = config.get("vision_feature_layer") in (-1, None)
        tower |= {"num_hidden_layers": 2 if last else 3, "num_attention_heads": 2}
    if kind == "paligemma":
        tower["projection_dim"] = WIDTH
    shrunk = config | {"vision_config": config["vision_config"] | tower}
    if kind == "paligemma":
        shrunk |= {"projection_dim": WIDTH, "hidden_size": WIDTH}
    for key, value in (("vocab_size", WORDS), ("_vocab_size", WORDS)):
        if key in shrunk:
            shrunk[key] = value
    return shrunk | ({"text_config": published | small} if "text_config" in config else small)


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def _write_tokenizer(data: dict[str, Any], folder: Path) -> dict[str, int]:
    """A tokenizer of single letters, of the published class and with the published settings; special token -> id."""
    settings, tokens = data["tokenizer_config.json"], data["tokens"]
    kind = settings["tokenizer_class"]
    special = [settings[name] for name in ("unk_token", "bos_token", "eos_token", "pad_token") if settings.get(name)]
    special = list(dict.fromkeys([*special, *tokens.values()]))
    if kind in ("LlamaTokenizer", "GemmaTokenizer"):
        letters = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *ascii_letters, *digits, *punctuation]
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters])}
    named = {name: settings.get(name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")}
    build = {"LlamaTokenizer": LlamaTokenizer, "GemmaTokenizer": GemmaTokenizer}.get(kind, Qwen2Tokenizer)
    tokenizer = build(vocab=vocabulary, merges=[], **{name: token for name, token in named.items() if token})
    tokenizer.add_tokens([token for token in special if token], special_tokens=True)
    if settings.get("add_bos_token"):
        first = settings["bos_token"]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, vocabulary[first])]
        )
    tokenizer.save_pretrained(folder)
    added = {str(vocabulary[token]): {"content": token, "special": True} for token in tokens.values()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    return vocabulary


# ---- weights ---------------------------------------------------------------------------------------------------------


def _write_weights(weights: dict[str, Any], folder: Path) -> None:
    """Random weights under their published names in 16 bit, in shards with an index."""
    dtype = torch.float16 if weights["dtype"] == "float16" else torch.bfloat16
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = tied = not any("lm_head" in name for name in weights["names"])
    with torch.random.fork_rng():  # a few one-dimensional weights begin at random
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    wake(model, embeddings=0.04 if tied else 1.0)
    renamed = dict(_published(model, weights["renamed"]))
    if tied:
        renamed = {name: value for name, value in renamed.items() if "lm_head" not in name}
    names = list(renamed)
    index = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        held = names[shard::SHARDS]
        save_file({name: renamed[name].to(dtype).contiguous() for name in held}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(held, file)
    size = sum(2 * value.numel() for value in renamed.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
    )


def _published(model: torch.nn.Module, renamed: dict[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in model.state_dict().items():
        begin = next((begin for begin in renamed if name.startswith(begin)), "")
        yield renamed.get(begin, "") + name.removeprefix(begin), value


# ---- documentation ---------------------------------------------------------------------------------------------------


def row(name: str, data: dict[str, Any]) -> list[str]:
    """The repository's row in the table of docs/families.md."""
    kinds: dict[str, list[str]] = {"copied": [], "copied in part": [], "recalled": []}
    for file in (file for file in data["sources"] if file in data):
        source = data["sources"][file]
        kind = source if source == "recalled" else "copied in part" if "recalled" in source else "copied"
        kinds[kind].append(file.partition(".")[0])
    settings = "; ".join(f"{kind}: {', '.join(sorted(files))}" for kind, files in kinds.items() if files)
    source = data["weights"]["source"]
    names = "by transformers' conversion script" if source.endswith(".py") else "copied"
    checked = "names of weights, ids of prompt and answer"
    return [
        f"`{name}`",
        f"`{data['family']}`",
        settings,
        source if source == "recalled" else names,
        checked,
        "shrunk, random weights, float32, CPU",
    ]

"""`gridprune models`: what can be named after --model."""

from gridprune_cli.cli import options
from gridprune_cli.cli.output import emit_json, table

_CLIP = "its CLIP, for relevance: fetched when needed, or found in FOLDER/clip, or named with --clip"
_WORDS = "nothing else; relevance from the model's own words"
_ROWS = (
    ("scenes", "ships with the package", "nothing; knows its own synthetic scenes only"),
    ("llava", "llava-hf/llava-1.5-7b-hf", _CLIP),
    ("llava_next", "llava-hf/llava-v1.6-vicuna-7b-hf", _CLIP),
    ("llava_onevision", "llava-hf/llava-onevision-qwen2-7b-ov-hf", _WORDS),
    ("qwen2_vl", "Qwen/Qwen2-VL-7B-Instruct", _WORDS),
    ("qwen2_5_vl", "Qwen/Qwen2.5-VL-7B-Instruct", _WORDS),
    ("qwen3_vl", "Qwen/Qwen3-VL-8B-Instruct", _WORDS),
    ("internvl", "OpenGVLab/InternVL3-8B-hf", _WORDS),
    ("idefics3", "HuggingFaceM4/Idefics3-8B-Llama3", _WORDS),
    ("smolvlm", "HuggingFaceTB/SmolVLM2-2.2B-Instruct", _WORDS),
    ("gemma3", "google/gemma-3-4b-it", _WORDS),
    ("paligemma", "google/paligemma2-3b-mix-448", _WORDS),
)


def models(json: options.Json = False) -> None:
    """List the model families, with an example of what can be named after --model, and what each needs.

    A model is `scenes`, a folder with a checkpoint of one of these families in transformers' format, or its name on the
    hub.
    """
    names = ("family", "example", "needs")
    if json:
        for row in _ROWS:
            emit_json(dict(zip(names, row, strict=True)))
    else:
        table(names, _ROWS)

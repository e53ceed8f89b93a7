"""The parity matrix over published settings: small checkpoints of real repositories answer as transformers has them.

Each is read by its published names, in shards, in 16 bit, with the settings that its repository has: see `published`.
"""

import json
import re
from dataclasses import replace

import published
import pytest
import torch
from safetensors import safe_open
from test_docs import table_under
from test_families import logits
from transformers import AutoModelForImageTextToText, ProcessorMixin

from gridprune_cli.cache.files import MAX_BYTES, MAX_HEADER
from gridprune_cli.contents import MAX_NUMBERS
from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.questions import Exchange
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import FAMILIES, Checkpoint, family_class

QUESTION = "what colour is the left object?"
LENGTH = 6  # tokens of an answer
REPOSITORIES = published.load()


def by_family():
    """The names of the repositories, those slow that come after another one of their family."""
    seen = set()
    for name, data in REPOSITORIES.items():
        yield pytest.param(name, marks=[pytest.mark.slow] if data["family"] in seen else [])
        seen.add(data["family"])


@pytest.fixture(scope="module", params=by_family())
def repository(request, tmp_path_factory):
    """A repository's data, its small checkpoint, and a pipeline on it."""
    data = REPOSITORIES[request.param]
    folder = published.write(data, tmp_path_factory.mktemp("published") / "checkpoint")
    return data, folder, Pipeline(str(folder), dtype="float32")


def usual(processor, pictures):
    """Model inputs by the call that model cards show; PaliGemma has no chat."""
    if processor.chat_template is None:
        inputs = dict(processor(images=[pictures], text=["<image>" * len(pictures) + QUESTION], return_tensors="pt"))
        inputs.pop("labels", None)  # for training
        return inputs
    content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(ProcessorMixin.apply_chat_template(processor, chat, **options))


def test_every_family_is_here_twice():
    families = [data["family"] for data in REPOSITORIES.values()]
    assert set(families) == set(FAMILIES) and min(map(families.count, families)) >= 2


def test_weights_are_stored_as_published(repository):
    """Names, shards and dtype, without which reading them would show nothing."""
    data, folder, _ = repository
    held = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            held |= {name: shard.get_tensor(name).dtype for name in shard.keys()}  # noqa: SIM118
    patterns = {re.sub(r"(blocks|layers|layer|deepstack_merger_list)\.\d+\.", r"\1.*.", name) for name in held}
    assert patterns == set(data["weights"]["names"])
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert set(held.values()) == {torch.float16 if data["weights"]["dtype"] == "float16" else torch.bfloat16}
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == set(held)


@pytest.mark.parametrize("name", REPOSITORIES)
def test_its_largest_pictures_fit_into_an_entry(name, tmp_path):
    """At published widths, in 16 bit: what the cache would refuse to read again would be encoded at each command."""
    folder = published.write_settings(REPOSITORIES[name], tmp_path / "checkpoint")
    family = family_class(REPOSITORIES[name]["family"])(Checkpoint(name, folder), torch.bfloat16, "cpu")
    sizes = [(8660, 8660), (12_000, 6000), (6000, 12_000), (15_000, 5000), (5000, 15_000)]  # the most that is decoded
    count = max(family.count_placeholders(size) for size in sizes)
    assert count * family.width <= MAX_NUMBERS and count * (family.width + 1 + 2) * 2 + MAX_HEADER <= MAX_BYTES


def test_keep_everything_is_generate(repository, noise):
    """The ids of the prompt and of the answer, with the published generation settings; and the picture matters."""
    _, folder, pipeline = repository
    picture = noise((100, 80))
    inputs = usual(pipeline.family.processor, [picture.image])
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    length = inputs["input_ids"].shape[1]
    expected = whole.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0, length:].tolist()
    encoded = pipeline.encoder.encode([picture])[0]
    everything = Pruning(keep=1.0, method=make_method("uniform"))  # which asks for no relevance, and so for no CLIP
    pruned = pipeline.prune(encoded, QUESTION, everything)
    assert torch.equal(pruned.input_ids, inputs["input_ids"][0])
    assert list(generate(pipeline.family, [pruned], LENGTH)[0].ids) == expected
    other = replace(pruned, image_embeds=pruned.image_embeds.flip(1))
    assert not torch.allclose(logits(pipeline, pruned), logits(pipeline, other), atol=1e-2)


def test_a_conversation_is_put_as_its_own_template_puts_it(repository):
    """PaliGemma has no template, and the one of Qwen3-VL here leaves answers out."""
    family = repository[2].family
    history = [Exchange("which colour?", "It is red.", 1)]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]
    has_template, expected = family.processor.chat_template is not None, ""
    if has_template:
        expected = ProcessorMixin.apply_chat_template(family.processor, messages, add_generation_prompt=True)
    if "It is red." in expected:
        assert family.write_text(QUESTION, 1, None, history) == expected
    else:
        with pytest.raises(BadInput, match="leaves earlier turns out" if has_template else "holds no conversation"):
            family.write_text(QUESTION, 1, None, history)


def test_the_table_of_the_documentation_is_of_these():
    rows = [published.row(name, data) for name, data in REPOSITORIES.items()]
    wanted = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert table_under("Published repositories", "families.md") == rows, wanted

"""Parity on a device: every family against transformers itself and against the CPU, on tiny checkpoints in float32."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import ProcessorMixin

from benchmarks.machine import Machine, Row, attempt
from gridprune_cli.generation import generate
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import METHODS
from gridprune_cli.pruning.placeholders import staying
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm import FAMILIES

QUESTION = "what colour is the left object?"
NEW_TOKENS = 16
TOLERANCE = 1e-3  # of logits in float32, which two orders of summing differ in by less


def parity(machine: Machine) -> Iterator[Row]:
    """Every family in float32 on tiny checkpoints: the model's own answer, the masked model's logits, the CPU's choice.

    TensorFloat-32, which cuDNN takes for the patches' convolution by itself, is off meanwhile.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for name in FAMILIES:
            yield from attempt(f"{name}: parity", partial(_parity, machine, name))
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _parity(machine: Machine, name: str) -> Iterator[Row]:
    folder = machine.tiny(name)
    pipeline, on_cpu = (Pipeline(str(folder), device=device, dtype="float32") for device in (machine.device, "cpu"))
    family = pipeline.family
    whole = family.model_class.from_pretrained(folder, dtype=torch.float32).eval().to(machine.device)
    picture = load_image(machine.scenes[0])
    inputs = _model_inputs(family, picture.image)
    (image,) = pipeline.encoder.encode([picture])
    # 1. all tokens: transformers' own answer
    everything = pipeline.prune(image, QUESTION, Pruning(keep=1.0))
    expected = whole.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    ids = expected[0, inputs["input_ids"].shape[1] :].tolist()
    alike = list(generate(family, [everything], NEW_TOKENS)[0].ids) == ids
    yield Row(f"{name}: keep 1.0 is transformers' generate", "yes" if alike else "no", "yes", alike)
    # 2. pruned: what the whole model gives where the other tokens are masked
    pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.3))
    difference = _masked_difference(family, whole, inputs, image.placeholder_map, pruned)
    below = difference < TOLERANCE
    yield Row(f"{name}: logits, pruned less masked", f"{difference:.1e}", f"below {TOLERANCE:.0e}", below)
    # 3. the same tokens as on the CPU
    (image_on_cpu,) = on_cpu.encoder.encode([picture])
    differing = []
    for method in METHODS.values():
        setting = Pruning(keep=0.3, method=method())
        kept = [
            p.prune(of_device, QUESTION, setting).kept for p, of_device in ((pipeline, image), (on_cpu, image_on_cpu))
        ]
        if not torch.equal(*kept):
            differing.append(method.name)
    yield Row(f"{name}: kept as on the CPU, all methods", ", ".join(differing) or "yes", "yes", not differing)


def _model_inputs(family: Any, picture: Image.Image) -> dict[str, Tensor]:
    """What transformers' processor makes of the question about a picture, on the device."""
    tiny = import_module(f"tiny_families.{family.checkpoint.family}")
    if hasattr(tiny, "inputs"):  # families without a chat template
        return {
            name: value.to(family.device) for name, value in tiny.inputs(family.processor, [picture], QUESTION).items()
        }
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    messages = [{"role": "user", "content": content}]
    inputs = dict(ProcessorMixin.apply_chat_template(family.processor, messages, **options))
    return {name: value.to(family.device) for name, value in inputs.items()}


@torch.no_grad()
def _masked_difference(
    family: Any, whole: Any, inputs: dict[str, Tensor], placeholder_map: Tensor, pruned: PrunedSet
) -> float:
    """The largest difference of the first new token's logits: pruned, and by the whole model with a mask."""
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids).cpu()
    stays = staying(placeholder_map, pruned.kept, int(placeholder_map.max()) + 1)
    mask[ids.cpu() == family.image_token] = stays.long()
    if hasattr(whole.model, "get_rope_index"):
        kinds, grid = (ids == family.image_token).int(), inputs["image_grid_thw"]
        positions = whole.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grid)[0]
    else:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
    expected = whole(**inputs | {"attention_mask": mask.to(ids.device), "position_ids": positions}).logits[0, -1]
    own_ids = pruned.input_ids[None].to(family.device)
    actual = family.load("language")(
        input_ids=own_ids,
        attention_mask=torch.ones_like(own_ids),
        position_ids=pruned.position_ids[..., None, :].to(family.device),
        mm_encoder_outputs={"image": family.features([pruned.image_embeds])},
        **family.extras(own_ids),
    ).logits[0, -1]
    return float((actual - expected).abs().max().cpu())

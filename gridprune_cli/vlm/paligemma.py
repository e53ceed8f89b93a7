"""PaliGemma: a SigLIP tower over the picture stretched to a square, a token-wise projector, no chat prompt.

All of a prompt is a prefix in which every token sees every other; only answers are causal. PaliGemma 2 counts a sliding
window as Gemma 3 does, see `gemma3.py`; it matters for its largest pictures alone.
"""

from collections.abc import Collection, Sequence
from typing import ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.signals import View
from gridprune_cli.questions import Exchange
from gridprune_cli.vlm.attention import each_signal, middle_layer, split_signals, stack_records, watch_tower
from gridprune_cli.vlm.family import Encoding, Family


class PaliGemma(Family):
    model_class = PaliGemmaForConditionalGeneration
    processor_class = PaliGemmaProcessor
    modules: ClassVar = {
        "tower": ("model.vision_tower",),
        "projector": ("model.multi_modal_projector",),
        "language": ("model.language_model", "lm_head"),
    }
    batched = True
    sees_question: ClassVar[bool] = True
    patches_normed: ClassVar[bool | None] = True
    vllm = "there the tokens of its prompt do not all see each other, as they should, so that it would answer otherwise"

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        inputs, placeholders = zip(*(self.process(picture) for picture in pictures), strict=True)
        tower = self.load("tower").model.vision_tower
        layers = tower.encoder.layers
        middle = layers[middle_layer(range(len(layers)), len(layers))].self_attn
        with watch_tower(layers[-1].self_attn, middle, cls=False, optional=optional) as records:
            patches = tower(torch.cat([data["pixel_values"] for data in inputs])).last_hidden_state
        vision_features = self.pool(patches).cpu()
        attention = each_signal(
            lambda signal: self.pool(signal[..., None])[..., 0], stack_records(records)
        )  # (B, N, 1 + M)
        attention = attention.to(self.dtype).cpu()
        side = round(vision_features.shape[1] ** 0.5)
        encodings = []
        for i, text in enumerate(placeholders):
            saliency, signals = split_signals(attention[i], optional)
            view, tokens = View(side, side), torch.arange(side * side)
            encodings.append(Encoding(vision_features[i], saliency, (view,), tokens, {"placeholder": text}, signals))
        return encodings

    def pool(self, patches: Tensor) -> Tensor:
        """Visual tokens `(B, N, C)` of the tower's patches `(B, P, C)`."""
        return patches

    @torch.inference_mode()
    def project(self, vision_features: Tensor) -> Tensor:
        projector = self.load("projector").model.multi_modal_projector
        return projector(vision_features.to(self.device, self.dtype)).cpu()

    def write_text(self, question: str, images: int, system: str | None, history: Sequence[Exchange] = ()) -> str:
        """What the processor makes of a question: images come first, and the beginning of the text behind them."""
        if history:
            raise BadInput(f"{self.checkpoint.name} holds no conversation: it was made for one question; ask anew")
        if system:
            raise BadInput("this family takes no system message; put it into the question", field="system")
        return f"{self.prompt_token * images}{self.processor.tokenizer.bos_token}{question}\n"

    def extras(self, ids: Tensor) -> dict[str, Tensor]:
        """Kind 0 is the prefix."""
        return {"token_type_ids": torch.zeros_like(ids)}

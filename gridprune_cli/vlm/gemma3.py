"""Gemma 3: a SigLIP tower over the picture stretched to a square, its patches averaged to 16 x 16 visual tokens.

The averages are what is stored: the rest of the projector works token by token, and what it gives is wider.

The tokens of an image see each other in both directions, so the model is told which they are. Most layers look back
over a sliding window of the prompt as it is: where tokens were dropped it reaches further back than it did. So a pruned
prompt gives just what hiding the dropped tokens would give only while the unpruned one is no longer than the window
(1024 tokens in the published checkpoints: three images and a question). In longer prompts far words are seen better.
What leaves inside the language model does not widen the window.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor

from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.paligemma import PaliGemma


class Gemma3(PaliGemma):
    model_class: ClassVar = Gemma3ForConditionalGeneration
    processor_class = Gemma3Processor
    sees_question = False
    vllm = "vLLM takes no image embeds in place of its pictures"

    write_text = Family.write_text

    def pool(self, patches: Tensor) -> Tensor:
        side, tokens = (round(n**0.5) for n in (patches.shape[1], self.load("tower").config.mm_tokens_per_image))
        return avg_pool2d(patches.transpose(1, 2).unflatten(2, (side, side)), side // tokens).flatten(2).transpose(1, 2)

    @torch.inference_mode()
    def project(self, vision_features: Tensor) -> Tensor:
        """The projector, but for its pooling."""
        projector = self.load("projector").model.multi_modal_projector
        normed = projector.mm_soft_emb_norm(vision_features.to(self.device, self.dtype))
        return (normed @ projector.mm_input_projection_weight).to(self.dtype).cpu()

    def extras(self, ids: Tensor) -> dict[str, Tensor]:
        """Kind 1 is an image; what a batch is padded with is none."""
        return {"token_type_ids": (ids == self.image_token).long()}

    def rotary(self, hidden_states: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Layers with a sliding window turn faster than the others."""
        text = self.load("language").get_submodule(self.text_model)
        return text.rotary_emb(hidden_states, positions, text.config.layer_types[layer])

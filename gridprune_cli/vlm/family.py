"""The contract of a model family: what its file must say, so that everything else is written once.

In a prompt, an image is a run of placeholders: image tokens that stand for visual tokens, and in some families
separators (a newline behind each row of tiles). Everything here that is per picture comes from `encode`; everything per
question from `write_prompt`, `positions` and `features`.

Loading is in `parts.py`, relevance in `relevance.py`, prompts in `prompt.py`; families override methods of these, too.
"""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.compressor import FILE, Compressor, load_compressor
from gridprune_cli.vlm.prompt import PromptWriter
from gridprune_cli.vlm.pruning_module import FILE as PRUNING_MODULE
from gridprune_cli.vlm.pruning_module import PruningModule, load_pruning_module
from gridprune_cli.vlm.relevance import RelevanceSource

_PREPARED = "gridprune_prepared"  # attribute of a picture


@dataclass(frozen=True)
class Encoding:
    """What the tower gave for one picture. N visual tokens, view by view, each row-major.

    vision_features  (N, C)  what is stored; `project` makes of it what the language model receives
    saliency         (N,)    attention of CLS, or attention received where the tower has no CLS
    placeholder_map  (S,)    which visual token each image token of the prompt stands for, `SEPARATOR` for none
    prompt                   "placeholder", the text that the picture becomes in a prompt (S image tokens among it), and
                             what else `positions` needs; JSON values only
    optional                 (N,) each, the signals of the tower that were asked for, by name: see `TOWER_SIGNALS`
    """

    vision_features: Tensor
    saliency: Tensor
    views: tuple[View, ...]
    placeholder_map: Tensor
    prompt: dict[str, Any] = field(default_factory=dict)
    optional: dict[str, Tensor] = field(default_factory=dict)


class Family(RelevanceSource, PromptWriter):
    """One model family over one checkpoint. Sub-classes are small; see `llava.py` for the plainest.

    batched             whether `generate` takes features as one tensor (1, N, D), not as a list of (N, D)
    encodes_multi_image whether a picture is encoded in another way where a prompt has several
    axes                of `positions`
    sees_question       whether the language model lets image tokens see the question behind them
    version             part of every cache key: raise it when `encode` changes what it gives
    vllm                why pruned sets of this family can't go to vLLM; empty where they can
    vllm_wraps          whether vLLM writes the token before an image's placeholders and the one behind them itself
    """

    batched: ClassVar[bool] = False
    encodes_multi_image: ClassVar[bool] = False
    axes: ClassVar[int] = 1
    sees_question: ClassVar[bool] = False
    version: ClassVar[int] = 1
    vllm: ClassVar[str] = "how vLLM takes image embeds for it was not looked into"
    vllm_wraps: ClassVar[bool] = False

    # ---- encoding ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        """Runs the tower on pictures. Loads the tower, and the projector where features are stored projected.

        `optional` are names of `TOWER_SIGNALS`, those that encodings are to have.
        """

    def encode_multi_image(self, pictures: Sequence[Image], optional: Collection[str] = ()) -> list[Encoding]:
        """`encode` for pictures each of which is one of several in a prompt. Overridden where `encodes_multi_image`."""
        return self.encode(pictures, optional)

    @property
    def width(self) -> int:
        """C, how many numbers the vision features of a token have, by the config."""
        return self.config.vision_config.hidden_size

    @property
    def embed_width(self) -> int:
        """D, how many numbers an embedding has that the language model receives."""
        return self.text_config.hidden_size

    def check(self, image: EncodedImage) -> None:
        """Raises ValueError where an encoded image, as a cache holds it, is none that `encode` gives."""
        if image.vision_features.shape[1] != self.width:
            raise ValueError(f"vision features of {image.vision_features.shape[1]} numbers, not {self.width}")
        token = self.processor.tokenizer.convert_ids_to_tokens(self.image_token)
        if image.prompt["placeholder"].count(token) != len(image.placeholder_map):
            raise ValueError(f"its placeholder does not hold {token} {len(image.placeholder_map)} times")
        if type(self).separator is Family.separator and len(image.placeholder_map) != image.count:
            raise ValueError("separators, of which this model has none")

    def count_placeholders(self, size: tuple[int, int]) -> int:
        """S of a picture of a width and height in pixels, by the settings. ValueError where it can't be processed."""
        return self.processor._get_num_multimodal_tokens(image_sizes=[size[::-1]]).num_image_tokens[0]

    @cached_property
    def encoder(self) -> dict[str, Any]:
        """What an encoded image depends on besides the picture. Holds no path and no file name of the user's."""
        settings = json.dumps(self.processor.image_processor.to_dict(), sort_keys=True, default=str)
        return {
            "family": self.checkpoint.family,
            "checkpoint": self.checkpoint.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "processor": hashlib.sha256(settings.encode()).hexdigest(),
            "backend": type(self.processor.image_processor).__name__,
            "version": self.version,
        }

    def prepare(self, picture: Image) -> None:
        """Does the processor's work ahead of `encode`, on the CPU. For worker threads."""
        with suppress(Exception):  # `encode` meets it again, and knows what to say of it
            picture.__dict__[_PREPARED] = self._process(picture)  # goes when the picture goes

    def process(self, picture: Image) -> tuple[dict[str, Tensor], str]:
        """The processor's model inputs for one picture, on the device, and the placeholder that it becomes."""
        data, placeholder = picture.__dict__.pop(_PREPARED, None) or self._process(picture)
        return self.to_device(data), placeholder

    def to_device(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        """The processor's model inputs on the device, in the model's dtype."""
        inputs = {}
        for name, value in data.items():
            tensor = torch.as_tensor(value)
            inputs[name] = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
        return inputs

    def _process(self, picture: Image) -> tuple[dict[str, Any], str]:
        data, (placeholder,) = self.processor._process_images([picture], **self.image_settings)
        return data, placeholder

    @cached_property
    def image_settings(self) -> dict[str, Any]:
        """The processor's settings for images, as its own methods take them."""
        init_kwargs = self.processor.tokenizer.init_kwargs
        return dict(
            self.processor._merge_kwargs(tokenizer_init_kwargs=init_kwargs, return_tensors="pt")["images_kwargs"]
        )

    # ---- pruning -----------------------------------------------------------------------------------------------------

    def project(self, vision_features: Tensor) -> Tensor:
        """What the language model receives `(K, D)` for vision features `(K, C)`, each token by itself."""
        return vision_features

    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """What of `project` stands where text has its embeddings, `(K, D)`; all of it, but for deepstack."""
        return self.project(vision_features)

    @cached_property
    def compressor(self) -> Compressor:
        """The trained compressor beside the checkpoint, on the device. Raises BadInput where there is none."""
        if not (self.checkpoint.folder / FILE).is_file():
            raise BadInput(f"{self.checkpoint.name} has no {FILE}; use `plc=pool`", field="plc", value="trained")
        return load_compressor(self.checkpoint.folder).to(self.device)

    @cached_property
    def pruning_module(self) -> PruningModule:
        """The trained module for CoViPAL beside the checkpoint, on the device. Raises BadInput where there is none."""
        if not (self.checkpoint.folder / PRUNING_MODULE).is_file():
            raise BadInput(
                f"{self.checkpoint.name} has no {PRUNING_MODULE}, the module that this method trains for a model; take "
                "another method",
                field="method",
                value="covipal",
            )
        return load_pruning_module(self.checkpoint.folder).to(self.device)

    @torch.inference_mode()
    def importance(self, vision_features: Tensor, question: str) -> Tensor:
        """How much visual tokens `(N, C)` matter to a question, by the trained module: `(N,)` float32 on the CPU.

        Raises as `pruning_module`.
        """
        image_embeds = self.text_embeds(vision_features).to(self.device)  # (N, D)
        question_embeds = self.vocabulary.vectors(question)  # (M, D)
        return self.pruning_module(image_embeds.float()[None], question_embeds.float()[None])[0].cpu()

    def separator(self) -> Tensor:
        """The embedding `(D,)` of a separator."""
        raise NotImplementedError(f"{type(self).__name__} has no separators")

    def positions(self, ids: Tensor, images: Sequence[EncodedImage]) -> Tensor:
        """Position ids `(L,)` or `(3, L)` of an unpruned prompt."""
        return torch.arange(len(ids))

    # ---- generating --------------------------------------------------------------------------------------------------

    def features(self, image_embeds: Sequence[Tensor]) -> Any:
        """The image embeds `(S, D)` of prompts in the container in which this family's `generate` takes them.

        A new one at each call: `generate` changes what it is given.
        """
        embeds = [of_prompt.to(self.device, self.dtype) for of_prompt in image_embeds]
        return BaseModelOutputWithPooling(pooler_output=torch.cat(embeds)[None] if self.batched else embeds)

    def extras(self, ids: Tensor) -> dict[str, Tensor]:
        """What else `generate` needs for prompts `(B, L)`."""
        return {}

    @property
    def depth(self) -> int:
        """How many layers the language model has."""
        return self.text_config.num_hidden_layers

    @property
    def first_inner(self) -> int:
        """The first layer at whose input visual tokens can leave: one layer must have seen them."""
        return 1

    def rotary(self, hidden_states: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The position embeddings that a layer gets for `positions` `(B, n)` in a text, or `(axes, B, n)`."""
        return self.load("language").get_submodule(self.text_model).rotary_emb(hidden_states, positions)

"""What a model family must say of itself, so that everything else is written once.

A checkpoint is loaded in parts: `tower` (encoding), `projector` (pruning), `language` (generating). A part that is not
asked for is never read from disk.

In a prompt, an image is a run of *slots*: image tokens that stand for visual tokens, and in some families separators
(a newline behind each row of tiles). Everything here that is per picture comes from `encode`; everything per question
from `write_prompt`, `positions` and `features`.
"""

import hashlib
import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from PIL.Image import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.signals import View
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm.attention import NAME
from gridprune_cli.vlm.chat_template import render, render_apart
from gridprune_cli.vlm.checkpoint import EMBEDDED, EMBEDDED_LOCALIZER, Checkpoint, find_clip
from gridprune_cli.vlm.clip import ClipRelevance, weights_differ
from gridprune_cli.vlm.compressor import FILE, Compressor, load_compressor
from gridprune_cli.vlm.fit import fingerprint
from gridprune_cli.vlm.loading import load_part
from gridprune_cli.vlm.word_relevance import WordRelevance

PARTS = ("tower", "projector", "language")
RELEVANCE = ("auto", "clip", "words")  # what it may come from; "auto" is CLIP where the tower is a CLIP's, else words
_PREPARED = "gridprune_prepared"  # attribute of a picture


@dataclass(frozen=True)
class Encoding:
    """What the tower gave for one picture. N visual tokens, the views in turn, each row-major.

    states    (N, C)  what is stored; `project` makes rows of it
    saliency  (N,)    attention of CLS, or attention received where the tower has no CLS
    slots     (S,)    which visual token each image token of the prompt stands for, `SEPARATOR` for none
    prompt            "placeholder", the text that the picture becomes in a prompt (S image tokens among it), and what
                      else `positions` needs; JSON values only
    """

    vision_features: Tensor
    saliency: Tensor
    views: tuple[View, ...]
    placeholder_map: Tensor
    prompt: dict[str, Any] = field(default_factory=dict)


class Family(ABC):
    """One model family over one checkpoint. Sub-classes are small; see `llava.py` for the plainest."""

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[Any]
    modules: ClassVar[dict[str, tuple[str, ...]]]  # part -> dotted paths of its sub-modules
    text_model: ClassVar[str] = "model.language_model"  # dotted path of the language model's text part
    batched: ClassVar[bool] = False  # whether `generate` takes features as one tensor (1, N, D), not a list of (N, D)
    together: ClassVar[bool] = False  # whether a picture is encoded in another way where a prompt has several
    axes: ClassVar[int] = 1  # of `positions`
    version: ClassVar[int] = 1  # part of every cache key: raise it when `encode` changes what it gives

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: str,
        clip: Checkpoint | None = None,
        spread: bool = False,
        relevance: str = "auto",
    ):
        """`clip` is the CLIP that relevance comes from, where it is known already. Raises BadInput for a source of
        relevance that the model does not have.
        """
        if relevance not in RELEVANCE:
            raise BadInput(f"--relevance {relevance}: not one of {', '.join(RELEVANCE)}")
        if relevance == "clip" and checkpoint.clip_tower is None:
            raise BadInput(f"--relevance clip: the tower of {checkpoint.name} is no CLIP; use --relevance words")
        self.checkpoint, self.dtype, self.device, self.spread = checkpoint, dtype, device, spread
        self._relevance = relevance
        if clip is not None:
            self.clip = clip
        self._loaded: dict[str, Any] = {}

    # ---- parts -------------------------------------------------------------------------------------------------------

    def load(self, *parts: str) -> Any:
        """A model that holds the first of these parts. Parts are read once, and those asked for together in one go.

        But a language model that is spread over devices is read by itself: the other parts are to lie on one.
        """
        missing = {part for part in parts if part not in self._loaded}
        apart = {"language"} & missing if self.spread else set()
        for group in (missing - apart, apart):
            if group:
                without = [path for part in PARTS if part not in group for path in self.modules[part]]
                without += self.unread()
                device = None if group == apart else self.device
                model = load_part(self.model_class, self.checkpoint.folder, without, self.dtype, device)
                if "tower" in group:
                    model.set_attn_implementation({"vision_config": NAME})
                if "language" in group and model.config.get_text_config()._attn_implementation == "sdpa":
                    model.set_attn_implementation({"text_config": NAME})
                self._loaded |= dict.fromkeys(group, model)
        return self._loaded[parts[0]]

    def unread(self) -> list[str]:
        """Dotted paths of what no part needs, such as layers behind the one whose states are stored."""
        return []

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor. Raises BadInput where its files are damaged."""
        try:
            return self._read_processor()
        except Exception as fault:  # transformers and tokenizers raise nearly everything on a damaged file
            first = (str(fault).splitlines() or [""])[0] or type(fault).__name__
            name = self.checkpoint.name
            raise BadInput(f"{name}: its processor or tokenizer can't be read ({first}); fetch it again") from fault

    def _read_processor(self) -> Any:
        """The processor, without its video half, which would need torchvision."""
        folder, kind = self.checkpoint.folder, self.processor_class
        takes = inspect.signature(kind.__init__).parameters
        if "video_processor" not in takes:
            return kind.from_pretrained(folder, local_files_only=True)
        settings, _ = kind.get_processor_dict(folder, local_files_only=True)  # and the chat template, wherever it is
        parts = ("image_processor", "tokenizer", "video_processor")
        given = {name: value for name, value in settings.items() if name in takes and name not in parts}
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        given.setdefault("chat_template", tokenizer.chat_template)
        images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return _without_video(kind)(image_processor=images, tokenizer=tokenizer, video_processor=None, **given)

    @cached_property
    def fingerprint(self) -> str:
        """What a pruned set must have been made for, to be generated from by this model."""
        return fingerprint(self.checkpoint)

    @cached_property
    def relevance(self) -> ClipRelevance | WordRelevance:
        """Gives the relevance `(N,)` of states `(N, C)` to a question. Raises as `clip`."""
        return ClipRelevance(self.clip, self.dtype, self.device) if self.clip else self.vocabulary

    @cached_property
    def vocabulary(self) -> WordRelevance:
        """The language model's words."""
        return WordRelevance(self)

    @cached_property
    def relevance_by_words(self) -> bool:
        """Whether relevance comes from words, not from CLIP."""
        return self._relevance == "words" or self.checkpoint.clip_tower is None

    @cached_property
    def clip(self) -> Checkpoint | None:
        """The CLIP that relevance comes from, or None where words are. It is fetched where it is not here.

        Raises BadInput where it is not known, is not the tower's, or can't be had, GridpruneError where the hub fails.
        """
        return None if self.relevance_by_words else find_clip(self.checkpoint)

    @property
    def relevance_source(self) -> dict[str, Any]:
        """What relevance comes from, as results say it. Raises as `clip`."""
        return {"source": "clip" if self.clip else "words", "model": self.clip.name if self.clip else None}

    @cached_property
    def tower_differs(self) -> bool:
        """Whether the tower's weights are seen to differ from those of the CLIP that relevance comes from."""
        return self.clip is not None and weights_differ(self.checkpoint.folder, self.clip.folder)

    @cached_property
    def config(self) -> Any:
        """The checkpoint's config as transformers reads it, with the values that it leaves out."""
        return AutoConfig.from_pretrained(self.checkpoint.folder, local_files_only=True)

    # ---- encoding ----------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """C, how many numbers a state has, by the config."""
        return self.config.vision_config.hidden_size

    @property
    def embed_width(self) -> int:
        """D, how many numbers a row has that the language model receives."""
        return self.config.get_text_config().hidden_size

    def check(self, image: EncodedImage) -> None:
        """Raises ValueError where an encoded image, as a cache holds it, is none that `encode` gives."""
        if image.vision_features.shape[1] != self.width:
            raise ValueError(f"states of {image.vision_features.shape[1]} numbers, not {self.width}")
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

    @abstractmethod
    def encode(self, pictures: Sequence[Image]) -> list[Encoding]:
        """Runs the tower on pictures. Loads the tower, and the projector where states are stored projected."""

    def encode_together(self, pictures: Sequence[Image]) -> list[Encoding]:
        """`encode` for pictures each of which is one of several in a prompt. Another way only where `together`."""
        return self.encode(pictures)

    def prepare(self, picture: Image) -> None:
        """Does the processor's work ahead of `encode`, on the CPU. For worker threads."""
        with suppress(Exception):  # `encode` meets it again, and knows what to say of it
            picture.__dict__[_PREPARED] = self._process(picture)  # goes when the picture goes

    def process(self, picture: Image) -> tuple[dict[str, Tensor], str]:
        """The processor's model inputs for one picture, on the device, and the placeholder that it becomes."""
        data, placeholder = picture.__dict__.pop(_PREPARED, None) or self._process(picture)
        return self._place(data), placeholder

    def _place(self, data: Mapping[str, Any]) -> dict[str, Tensor]:
        """The processor's model inputs on the device."""
        inputs = {}
        for name, value in data.items():
            tensor = torch.as_tensor(value)
            inputs[name] = tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)
        return inputs

    def _process(self, picture: Image) -> tuple[dict[str, Any], str]:
        data, (placeholder,) = self.processor._process_images([picture], **self._image_settings)
        return data, placeholder

    @cached_property
    def _image_settings(self) -> dict[str, Any]:
        known = self.processor.tokenizer.init_kwargs
        return dict(self.processor._merge_kwargs(tokenizer_init_kwargs=known, return_tensors="pt")["images_kwargs"])

    # ---- pruning -----------------------------------------------------------------------------------------------------

    def project(self, vision_features: Tensor) -> Tensor:
        """Rows that the language model receives `(K, D)` for states `(K, C)`, row by row."""
        return vision_features

    def text_embeds(self, vision_features: Tensor) -> Tensor:
        """The rows `(K, D)` of states `(K, C)` that stand where words do."""
        return self.project(vision_features)

    @cached_property
    def compressor(self) -> Compressor:
        """The trained compressor beside the checkpoint. Raises BadInput where there is none."""
        if not (self.checkpoint.folder / FILE).is_file():
            raise BadInput(f"--plc trained: {self.checkpoint.name} has no {FILE}; use --plc pool")
        return load_compressor(self.checkpoint.folder)

    def separator(self) -> Tensor:
        """The row `(D,)` of a separator."""
        raise NotImplementedError(f"{type(self).__name__} has no separators")

    def write_text(self, question: str, images: int, system: str | None) -> str:
        """The model's own chat prompt, with one placeholder token per image. Raises BadInput where there is none."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        template, name = self.processor.chat_template, self.checkpoint.name
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not isinstance(template, str):
            raise BadInput(f"{name} has no chat template; give a --prompt-template")
        run = render if name in (EMBEDDED, EMBEDDED_LOCALIZER) else render_apart
        try:
            return run(template, messages, self.processor.tokenizer.special_tokens_map)
        except BadInput as fault:
            raise BadInput(f"the chat template of {name} can't be used ({fault}); give a --prompt-template") from fault

    def write_prompt(
        self, question: str, images: Sequence[EncodedImage], system: str | None = None, template: str | None = None
    ) -> Tensor:
        """Token ids `(L,)` of the prompt, with an image token for every slot of every image.

        `template` takes the place of the model's chat template: a text with `{question}`, and `{image}` once per image
        or once for all of them. Raises BadInput where it is none, where the model's own template can't be used, and
        where the question itself holds a placeholder or an image token.
        """
        return self.write_prompts([(question, images)], system, template)[0]

    def write_prompts(
        self,
        asked: Sequence[tuple[str, Sequence[EncodedImage]]],
        system: str | None = None,
        template: str | None = None,
    ) -> list[Tensor]:
        """`write_prompt` for each question and its images; the tokenizer is called once for all."""
        texts = [self._prompt_text(question, images, system, template) for question, images in asked]
        tokenizer, rows = self.processor.tokenizer, dict[int, list[int]]()
        first = tokenizer.bos_token
        begun = [first is not None and text.startswith(first) for text in texts]  # a second time would be too much
        for has in sorted(set(begun)):
            some = [n for n in range(len(texts)) if begun[n] is has]
            # verbose would warn of prompts that are too long, by their length before anything is pruned
            made = tokenizer(
                [texts[n] for n in some], add_special_tokens=not has, return_attention_mask=False, verbose=False
            )
            rows |= zip(some, made.input_ids, strict=True)
        out = [torch.tensor(rows[n]) for n in range(len(texts))]
        for ids, (_, images) in zip(out, asked, strict=True):
            if int((ids == self.image_token).sum()) != sum(len(image.placeholder_map) for image in images):
                raise BadInput("the question holds the model's image token; leave it out")
        return out

    def _prompt_text(
        self, question: str, images: Sequence[EncodedImage], system: str | None, template: str | None
    ) -> str:
        """The prompt as a text, with the placeholders of its images."""
        if template is not None:
            text = self._fill(template, question, len(images))
        else:
            text = self.write_text(question, len(images), system)
        pieces = text.split(self.prompt_token)
        if len(pieces) != len(images) + 1:
            raise BadInput(
                f"the prompt holds {self.prompt_token}, which stands for an image, {len(pieces) - 1} times for "
                f"{len(images)} images; leave it out of question and --system, or give a --prompt-template"
            )
        text = pieces[0]
        for image, piece in zip(images, pieces[1:], strict=True):
            text += image.prompt["placeholder"] + piece
        return text

    def _fill(self, template: str, question: str, images: int) -> str:
        places = template.count("{image}")
        if "{question}" not in template or places not in (1, images):
            raise BadInput("--prompt-template: needs {question}, and {image} once for all images or once for each")
        mark = self.prompt_token * (images if places == 1 else 1)
        return template.replace("{image}", mark).replace("{question}", question)

    @property
    def prompt_token(self) -> str:
        """What stands for a whole image in a chat prompt."""
        return self.processor.image_token

    @property
    def image_token(self) -> int:
        """Id of the token that stands for a slot in a prompt."""
        config = self.checkpoint.config
        return config["image_token_id"] if "image_token_id" in config else config["image_token_index"]

    def positions(self, ids: Tensor, images: Sequence[EncodedImage]) -> Tensor:
        """Position ids `(L,)` or `(3, L)` of an unpruned prompt."""
        return torch.arange(len(ids))

    def count_words(self, text: str) -> int:
        """How many tokens a text takes."""
        return len(self.processor.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def check_length(self, positions: int, remedy: str) -> None:
        """Raises BadInput, with what to do, for a prompt of more positions than the language model was made for."""
        most = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and positions > most:
            raise BadInput(f"the prompt takes {positions} positions, and {self.checkpoint.name} has {most}; {remedy}")

    # ---- generating --------------------------------------------------------------------------------------------------

    def features(self, batch: Sequence[PrunedSet]) -> Any:
        """The rows of pruned sets in the container in which this family's `generate` takes encoder outputs.

        A new one at each call: `generate` changes what it is given.
        """
        rows = [pruned.image_embeds.to(self.device, self.dtype) for pruned in batch]
        return BaseModelOutputWithPooling(pooler_output=torch.cat(rows)[None] if self.batched else rows)

    def extras(self, ids: Tensor) -> dict[str, Tensor]:
        """What else `generate` needs for prompts `(B, L)`."""
        return {}

    @property
    def depth(self) -> int:
        """How many layers the language model has."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def first_inner(self) -> int:
        """The first layer at whose input visual tokens can leave: one layer must have seen them."""
        return 1

    def rotary(self, hidden_states: Tensor, positions: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """The position embeddings that a layer gets for places `(B, n)` in a text."""
        return self.load("language").get_submodule(self.text_model).rotary_emb(hidden_states, positions)


def _without_video(kind: Any) -> Any:
    """The processor class, with no video processor taken for an answer."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})

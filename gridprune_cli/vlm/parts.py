"""A checkpoint whose parts are loaded when they are first needed, and only those.

The parts are `tower` (encoding), `projector` (pruning) and `language` (generating). A part that is not asked for is
never read from disk.
"""

import copy
import inspect
from collections import OrderedDict
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch.nn import Identity, ModuleList
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.attention import ATTRIBUTES, NAME
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.fit import fingerprint
from gridprune_cli.vlm.loading import load_part
from gridprune_cli.vlm.quantized import check_quantized, loading_config

PARTS = ("tower", "projector", "language")


class ModelParts:
    """The parts of one checkpoint, with its processor and config.

    model_class      transformers' class of the whole model
    processor_class  transformers' class of its processor
    modules          part -> dotted paths of its sub-modules
    text_model       dotted path of the language model without its head
    """

    model_class: ClassVar[type[PreTrainedModel]]
    processor_class: ClassVar[Any]
    modules: ClassVar[dict[str, tuple[str, ...]]]
    text_model: ClassVar[str] = "model.language_model"

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: str,
        sharded: bool = False,
        quantize: str | None = None,
    ):
        """`sharded`: the language model goes over all GPUs, and the other parts are on `device`.

        `quantize`: "int8" or "int4", the weights of the language model's layers; see `vlm.quantized`.
        """
        self.checkpoint, self.dtype, self.device, self.sharded = checkpoint, dtype, device, sharded
        self.quantize = quantize
        self._loaded: dict[str, Any] = {}  # part -> a model that holds it
        self._first_layers: dict[tuple[int, bool], Any] = {}  # how many layers, whether of the loaded language model

    def load(self, *parts: str) -> Any:
        """A model that holds the first of these parts; None where that part has no modules, as a projector may.

        Parts are read once, and those asked for together in one go. A sharded language model is read by itself, since
        the other parts lie on one device.
        """
        missing = {name for name in parts if self.modules[name] and name not in self._loaded}
        alone = {"language"} & missing if self.sharded else set()
        for group in (missing - alone, alone):
            if group:
                without = [path for name in PARTS if name not in group for path in self.modules[name]]
                without += self.unread()
                device = None if group == alone else self.device
                model = self._read(without, device, quantized="language" in group)
                if "tower" in group:
                    model.set_attn_implementation({"vision_config": NAME})
                if "language" in group:
                    make_watchable(model)
                self._loaded |= dict.fromkeys(group, model)
        return self._loaded.get(parts[0])

    def first_layers(self, depth: int) -> Any:
        """The model without its parts but for embeddings and the first `depth` layers of the language model.

        Its last hidden state is what the next layer would receive. It shares the weights of the language model where
        that is loaded, and may run while that generates; where it is not, nothing else is read from disk.
        """
        whole = self._loaded.get("language")
        place = (depth, whole is not None)
        if place not in self._first_layers:
            model = whole
            if model is None:
                without = [*self.modules["tower"], *self.modules["projector"], "lm_head", f"{self.text_model}.norm"]
                layers = range(depth, self.text_config.num_hidden_layers)
                without += [f"{self.text_model}.layers.{layer}" for layer in layers]
                model = self._read(without, None if self.sharded else self.device, quantized=True)
                make_watchable(model)
            self._first_layers = {place: view_first_layers(model, self.text_model, depth)}
        return self._first_layers[place]

    def _read(self, without: list[str], device: str | None, quantized: bool) -> Any:
        """A model without the sub-modules of dotted paths, its language model quantised if that is asked for."""
        quantization_config = None
        if quantized and self.quantize:
            quantization_config = loading_config(self.quantize, self.device, self.config, self.text_model)
        folder = self.checkpoint.folder
        model = load_part(self.model_class, folder, without, self.dtype, device, quantization_config)
        if quantization_config is not None:
            check_quantized(model, self.text_model)
        return model

    def unread(self) -> list[str]:
        """Dotted paths of what no part needs, such as layers behind the one whose features are stored."""
        return []

    @cached_property
    def config(self) -> Any:
        """The checkpoint's config as transformers reads it, with the values that it leaves out."""
        return AutoConfig.from_pretrained(self.checkpoint.folder, local_files_only=True)

    @cached_property
    def text_config(self) -> Any:
        """Of it the language model's. transformers looks for that among all parts, which takes longer than it seems."""
        return self.config.get_text_config()

    @cached_property
    def fingerprint(self) -> str:
        """What a pruned set must have been made for, to be generated from by this model."""
        return fingerprint(self.checkpoint)

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's processor. Raises BadInput where its files are damaged."""
        try:
            return self._read_processor()
        except Exception as fault:  # transformers and tokenizers raise nearly everything on a damaged file
            first = (str(fault).splitlines() or [""])[0] or type(fault).__name__
            reason = f"its processor or tokenizer can't be read ({first}); fetch it again"
            raise BadInput(reason, place=self.checkpoint.name) from fault

    def _read_processor(self) -> Any:
        """The processor, without its video half, which would need torchvision."""
        folder, kind = self.checkpoint.folder, self.processor_class
        parameters = inspect.signature(kind.__init__).parameters
        if "video_processor" not in parameters:
            return kind.from_pretrained(folder, local_files_only=True)
        settings, _ = kind.get_processor_dict(folder, local_files_only=True)  # and the chat template, wherever it is
        halves = ("image_processor", "tokenizer", "video_processor")
        options = {name: value for name, value in settings.items() if name in parameters and name not in halves}
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        options.setdefault("chat_template", tokenizer.chat_template)
        images = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        return without_video(kind)(image_processor=images, tokenizer=tokenizer, video_processor=None, **options)

    @property
    def image_token(self) -> int:
        """Id of the token that is a placeholder in a prompt."""
        config = self.checkpoint.config
        return config["image_token_id"] if "image_token_id" in config else config["image_token_index"]


def make_watchable(model: Any) -> None:
    """Has the attention of a language model go through `vlm.attention`, unless it is of a kind of its own."""
    if model.config.get_text_config()._attn_implementation == "sdpa":
        model.set_attn_implementation({"text_config": NAME})


def view_first_layers(model: Any, text_model: str, depth: int) -> Any:
    """A model whose language model, at the dotted path `text_model`, ends behind its first `depth` layers.

    All weights are those of `model`, which stays as it is. Hooks on the model, its layers and their attention are its
    alone, and so are those on the view: both can run at once, each watched by itself.
    """
    view = module = _copy_module(model)
    for name in text_model.split("."):
        module._modules[name] = _copy_module(module._modules[name])
        module = module._modules[name]
    layers = [_copy_module(layer) for layer in module.layers[:depth]]
    for layer in layers:
        layer._modules["self_attn"] = _copy_module(layer.self_attn)
    module._modules |= {"layers": ModuleList(layers), "norm": Identity()}
    return view


def _copy_module(module: Any) -> Any:
    """A module with the same weights and sub-modules, of which others can be put in; without its hooks."""
    view = copy.copy(module)
    view._modules = dict(module._modules)
    view._forward_hooks, view._forward_pre_hooks = OrderedDict(), OrderedDict()
    for name in [name for name in vars(view) if name.startswith(ATTRIBUTES)]:
        del vars(view)[name]
    if hook := vars(view).pop("_hf_hook", None):  # accelerate's, of a sharded model
        from accelerate.hooks import add_hook_to_module

        del view.forward, view._old_forward  # which run `module` itself
        add_hook_to_module(view, hook)
    return view


def without_video(kind: Any) -> Any:
    """The processor class, which also takes None for its video processor."""

    def check(self: Any, name: str, argument: Any) -> Any:
        return None if argument is None else kind.check_argument_for_proper_class(self, name, argument)

    return type(kind.__name__, (kind,), {"check_argument_for_proper_class": check, "__module__": kind.__module__})

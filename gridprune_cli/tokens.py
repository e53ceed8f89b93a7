"""An encoded image, a prompt's prefix and a pruned set, and the safetensors files of the first and the last."""

import io
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gridprune_cli.cache import files, layout
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.quantize import Packed
from gridprune_cli.contents import MAX_NUMBERS, PREFIX_TENSORS, check_encoded, check_pruned, check_range, views_of
from gridprune_cli.errors import BadInput
from gridprune_cli.images import Source
from gridprune_cli.pruning.methods import RULES
from gridprune_cli.pruning.schedule import LayerSchedule
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Box, View

SCHEMA = 5  # of a pruned set's file; an encoded image's is `cache.layout.SCHEMA`, which the cache checks

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class EncodedImage:
    """The output of a vision tower for one picture, and the signals that need no question. N visual tokens.

    vision_features  (N, C)  of each visual token; the family's projector maps them to image embeds. In a dtype to
                             compute in
    saliency         (N,)    how much the tower attends to each, at least 0
    placeholder_map  (S,)    int32, the visual token that each image token of the prompt stands for, -1 for a separator
    size                     width and height of the picture in pixels, after its EXIF turn
    prompt                   what the family must know of the picture to write a prompt, JSON values only
    packed                   the vision features in eight bits, where they are stored so; `vision_features` are what
                             these unpack to
    optional                 (N,) each, optional signals by name, those of `OPTIONAL_SIGNALS` that were asked for
    source                   the image file, where it is known, for localisers that look at the picture; never stored
    """

    key: str
    model: str  # as the user named it, like `name` never part of a key
    image: str  # sha256 of the file's bytes
    name: str  # as the user named the file
    encoder: dict[str, Any]
    size: tuple[int, int]
    views: tuple[View, ...]
    vision_features: Tensor
    saliency: Tensor
    placeholder_map: Tensor
    prompt: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a user should know: of an animation the first frame was taken, ...
    packed: Packed | None = None
    optional: dict[str, Tensor] = field(default_factory=dict)
    source: Source | None = field(default=None, compare=False, repr=False)

    @property
    def count(self) -> int:
        """N."""
        return sum(view.count for view in self.views)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, as they are stored."""
        signals = (self.saliency, self.placeholder_map, *self.optional.values())
        return (self.packed or self.vision_features).nbytes + sum(tensor.nbytes for tensor in signals)

    def to_bytes(self) -> bytes:
        """The file. Equal images give equal bytes."""
        header = {
            "kind": "encoded",
            "schema": layout.SCHEMA,
            "key": self.key,
            "model": self.model,
            "image": self.image,
            "name": self.name,
            "encoder": self.encoder,
            "size": list(self.size),
            "tokens": self.count,
            "views": [asdict(view) for view in self.views],
            "prompt": self.prompt,
            "notes": list(self.notes),
        }
        tensors = {name: getattr(self, name) for name in _ENCODED_TENSORS} | self.optional
        if self.packed:
            tensors |= {"vision_features": self.packed.codes, "scales": self.packed.scales}
        return files.encode({name: raw_tensor(tensor) for name, tensor in tensors.items()}, header)

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, RawTensor]) -> "EncodedImage":
        """The inverse of `to_bytes`, after `files.decode`. Raises ValueError as `contents.check_encoded` does."""
        loaded = load_tensors(tensors)
        check_encoded(header, loaded)
        vision_features, saliency, placeholder_map = (loaded[name] for name in _ENCODED_TENSORS)
        packed = None
        if "scales" in loaded:
            packed = Packed(vision_features, loaded["scales"])
            vision_features = packed.unpack(saliency.dtype)  # both come from the tower, in what it computes in
            check_range("vision_features", vision_features)
        return cls(
            key=header["key"],
            model=header["model"],
            image=header["image"],
            name=header["name"],
            encoder=header["encoder"],
            size=(header["size"][0], header["size"][1]),
            views=views_of(header["views"]),
            vision_features=vision_features,
            saliency=saliency,
            placeholder_map=placeholder_map,
            prompt=header["prompt"],
            notes=tuple(header["notes"]),
            packed=packed,
            optional={name: loaded[name] for name in OPTIONAL_SIGNALS if name in loaded},
        )


@dataclass(frozen=True)
class Origin:
    """One image of a pruned set: what it was, and how it was divided."""

    key: str  # of the encoded image
    image: str  # sha256 of the picture's bytes
    name: str
    views: tuple[View, ...]
    region: Box | None
    zones: dict[str, Any] | None  # rows, cols and budgets, where the method has zones
    localizer: dict[str, Any] | None = None  # who located the region; a model's answer, and whether that was a box
    ratios: dict[str, float | None] | None = None  # of PLC: visual tokens per embed, inside the region and outside
    notes: tuple[str, ...] = ()  # of the encoded image

    @property
    def count(self) -> int:
        """Visual tokens before pruning."""
        return sum(view.count for view in self.views)

    @property
    def grid(self) -> list[Any]:
        """Rows and columns; of several views, a list of those."""
        grids = [[view.rows, view.cols] for view in self.views]
        return grids[0] if len(grids) == 1 else grids

    @classmethod
    def from_header(cls, image: dict[str, Any]) -> "Origin":
        """From its entry in a header, after `contents.check_pruned`."""
        return cls(
            key=image["key"],
            image=image["image"],
            name=image["name"],
            views=views_of(image["views"]),
            region=tuple(image["region"]) if image["region"] else None,
            zones=image["zones"],
            localizer=image["localizer"],
            ratios=image["ratios"],
            notes=tuple(image["notes"]),
        )


@dataclass(frozen=True)
class Prefix:
    """What the first d layers of a language model made of a prompt up to its last placeholder. P tokens.

    ids            (P,)          int64, its token ids
    keys           (d, H, P, C)  of each layer, with the positions already in them; H heads of C numbers
    values         (d, H, P, C)  of each layer
    hidden_states  (P, D)        what layer d receives, counted from 0: the first that the prefix did not go through
    """

    ids: Tensor
    keys: Tensor
    values: Tensor
    hidden_states: Tensor

    @property
    def depth(self) -> int:
        """d."""
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.ids.nbytes + self.keys.nbytes + self.values.nbytes + self.hidden_states.nbytes


@dataclass(frozen=True)
class PrunedSet:
    """The visual tokens that were kept of one or several images for a question, projected, and the prompt around them.

    Enough to generate from. N visual tokens, of all images in turn, of which K are kept; S image tokens in the prompt,
    K of them for kept tokens, the others for separators.

    image_embeds     (S, D)   what the language model receives in place of its image tokens; (0, D) where a prefix was
                              asked for in their place, which holds what the first layers made of them
    kept             (K,)     int64, indices of the kept among the N visual tokens, ascending
    input_ids        (L,)     int64, the prompt's token ids, with S image tokens
    position_ids     (L,)     int64, or (3, L) for models with rotary positions in three axes
    saliency         (N,)     a signal behind the choice, for `show`
    relevance        (N,)     the same; None where the method needs none
    placeholder_map  (S,)     int64, the visual token that each image embed stands for, -1 for a separator; None where
                              there is no schedule, which alone needs it, and there are image embeds
    schedule                  which tokens leave at which layer of the language model; None where none do
    prefix                    the prompt's, all N tokens among it, with which only the text behind it goes through the
                              first d layers; no token leaves before layer d. None where the whole prompt is run
    """

    image_embeds: Tensor
    kept: Tensor
    input_ids: Tensor
    position_ids: Tensor
    saliency: Tensor
    relevance: Tensor | None
    images: tuple[Origin, ...]
    model: str
    fingerprint: str  # of the language model; see `vlm.fit`
    question: str
    method: dict[str, Any]  # name and options
    positions: str  # "original" or "compact"
    placeholder_map: Tensor | None = None
    schedule: LayerSchedule | None = None
    plc: str = "off"  # how tokens were compressed: "off", "pool" or "trained"
    relevance_source: dict[str, Any] | None = None  # as `selector.relevance_source` gives it
    remarks: tuple[str, ...] = ()  # what a user should know of how it was pruned
    prefix: Prefix | None = None

    @property
    def count(self) -> int:
        """N, the visual tokens before pruning."""
        return sum(image.count for image in self.images)

    @property
    def placeholders(self) -> int:
        """S."""
        return len(self.image_embeds) if self.placeholder_map is None else len(self.placeholder_map)

    @property
    def selected(self) -> Tensor:
        """(K,) int64: which visual tokens stay to the end, as far as that is known before the model runs."""
        listed = self.schedule.selection if self.schedule else None
        return self.kept if listed is None else torch.tensor(listed, dtype=torch.int64)

    @property
    def counts(self) -> str:
        """How many visual tokens stay, in words."""
        return f"{len(self.kept)} of {self.count} visual tokens" + (f", {self.schedule}" if self.schedule else "")

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the images, each with the image's name in front, and of how it was pruned."""
        of_images = dict.fromkeys(f"{image.name}: {note}" for image in self.images for note in image.notes)
        return (*of_images, *self.remarks)

    def to_bytes(self) -> bytes:
        """The file. It holds the image embeds, or where there are none, the prefix.

        Raises BadInput where it would be larger than what is read again.
        """
        header = {"kind": "pruned", "schema": SCHEMA, "images": [asdict(image) for image in self.images]}
        header |= {name: getattr(self, name) for name in (*_PRUNED_TEXT, "plc")}
        header["schedule"] = self.schedule.to_json() if self.schedule else None
        header |= {"relevance_source": self.relevance_source, "remarks": list(self.remarks)}
        tensors = {name: raw_tensor(getattr(self, name)) for name in _PRUNED_TENSORS if getattr(self, name) is not None}
        if self.prefix is not None and not len(self.image_embeds):
            del tensors["image_embeds"]
            tensors |= {f"prefix_{name}": raw_tensor(getattr(self.prefix, name)) for name in PREFIX_TENSORS}
        size = sum(len(tensor.data) for tensor in tensors.values()) + files.MAX_HEADER
        if size > files.MAX_BYTES or self.image_embeds.numel() > MAX_NUMBERS:  # which nobody could read again
            smaller = "without `with_prefix`" if "prefix_ids" in tensors else "with a smaller `keep`"
            raise BadInput(f"the pruned set takes {size} bytes, more than a file may have; prune {smaller}")
        return files.encode(tensors, header)

    def to_json(self) -> dict[str, Any]:
        """What `show --json` prints. Values of each image are a list where there are several images."""

        def each(name: str) -> Any:
            values = [getattr(image, name) for image in self.images]
            return values[0] if len(values) == 1 else values

        return {
            "image": each("name"),
            "question": self.question,
            "model": self.model,
            "method": self.method["name"],
            "options": {name: value for name, value in self.method.items() if name != "name"},
            "relevance": self.relevance_source,
            "keep": round(len(self.kept) / self.count, 4),
            "tokens": {
                "full": self.count,
                "kept": len(self.kept),
                "separators": self.placeholders - len(self.kept),
            },
            "grid": each("grid"),
            "region": each("region"),
            "localizer": each("localizer"),
            "zones": each("zones"),
            "key": each("key"),
            "positions": self.positions,
            "inside": self.schedule.to_json() if self.schedule else None,
            "plc": self.plc,
            "ratios": each("ratios"),
            "notes": list(self.notes),
        }

    @classmethod
    def from_bytes(cls, data: bytes, source: str) -> "PrunedSet":
        """Raises BadInput, naming `source`, where the bytes are no pruned set that this version can read."""
        return read_pruned(io.BytesIO(data), source)

    @classmethod
    def from_parts(cls, header: dict[str, Any], tensors: dict[str, RawTensor]) -> "PrunedSet":
        """The inverse of `to_bytes`, after `files.decode`.

        Raises ValueError as `contents.check_pruned` does, and BadInput for a pruned set of another schema.
        """
        if header.get("kind") != "pruned":
            raise ValueError("it holds something else")
        if header.get("schema") != SCHEMA:
            reason = f"its schema is {header.get('schema')!r:.20}, and this version reads {SCHEMA}"
            raise BadInput(f"{reason}; prune again, with `gridprune prune`")
        loaded: dict[str, Any] = load_tensors(tensors)
        check_pruned(header, loaded)
        if "prefix_ids" in loaded:
            loaded["prefix"] = Prefix(*(loaded.pop(f"prefix_{name}") for name in PREFIX_TENSORS))
            loaded["image_embeds"] = loaded["prefix"].hidden_states[:0]
        return cls(
            **({"relevance": None} | loaded),
            schedule=LayerSchedule.from_json(header["schedule"], RULES) if header["schedule"] else None,
            **{name: header[name] for name in _PRUNED_TEXT},
            plc=header["plc"],
            relevance_source=header["relevance_source"],
            remarks=tuple(header["remarks"]),
            images=tuple(Origin.from_header(image) for image in header["images"]),
        )


def load_pruned(path: str | Path) -> PrunedSet:
    """Reads a pruned set from a file. Raises BadInput, naming the file, where it can't be read or is none."""
    return _pruned(lambda: files.read_path(path), str(path))


def read_pruned(file: BinaryIO, source: str) -> PrunedSet:
    """Reads a pruned set from a stream. Raises BadInput, naming `source`, where it holds none."""
    return _pruned(lambda: files.read(file), source)


def _pruned(read: Callable[[], tuple[dict[str, Any], dict[str, RawTensor]]], source: str) -> PrunedSet:
    try:
        return PrunedSet.from_parts(*read())
    except OSError as fault:
        raise BadInput(f"can't be read ({fault.strerror}); check the path", place=source) from fault
    except (files.FileFault, ValueError) as fault:
        raise BadInput(f"not a pruned set ({fault}); make one with `gridprune prune`", place=source) from fault
    except BadInput as fault:
        raise fault.at(source) from fault


_ENCODED_TENSORS = ("vision_features", "saliency", "placeholder_map")
_PRUNED_TENSORS = ("image_embeds", "kept", "input_ids", "position_ids", "saliency", "relevance", "placeholder_map")
_PRUNED_TEXT = ("model", "fingerprint", "question", "method", "positions")


def raw_tensor(tensor: Tensor) -> RawTensor:
    """A tensor as `cache.files.encode` takes it."""
    plain = tensor.detach().cpu().contiguous()
    return RawTensor(_DTYPES[plain.dtype], tuple(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes())


def load_tensors(raw: dict[str, RawTensor]) -> dict[str, Tensor]:
    """The inverse of `raw_tensor` for the tensors of a file. Raises ValueError for a dtype that no file of ours has."""
    if strange := sorted({tensor.dtype for tensor in raw.values()} - _TORCH.keys()):
        raise ValueError(f"it holds numbers of the type {strange[0]}")
    return {name: _tensor(tensor) for name, tensor in raw.items()}


def _tensor(raw: RawTensor) -> Tensor:
    if not raw.data:
        return torch.empty(raw.shape, dtype=_TORCH[raw.dtype])
    return torch.frombuffer(bytearray(raw.data), dtype=_TORCH[raw.dtype]).reshape(raw.shape)

"""From a picture to its encoded image: out of the cache where it is there, else through the vision tower."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any

import torch

from gridprune_cli.cache.quantize import STORAGES, pack
from gridprune_cli.cache.store import Store, entry_key
from gridprune_cli.contents import MAX_NUMBERS
from gridprune_cli.errors import BadInput, GridpruneError, NoScene
from gridprune_cli.images import Picture, Source
from gridprune_cli.prefixes import Prefixes
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, TOWER_SIGNALS
from gridprune_cli.scenes.scene import looks_like_scene
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.checkpoint import EMBEDDED
from gridprune_cli.vlm.entropy import grey_entropy
from gridprune_cli.vlm.family import Encoding, Family

SIGNALS = ("saliency",)  # stored beside the vision features, with the optional ones that were asked for
NO_SCENE = "no scene: the embedded model knows only its own scenes; name a real one, as in `model=FOLDER`"
"""A note. Entries hold it, and tell by it that a picture is no scene: one of another wording is taken for a scene."""
SMALL_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"  # to begin with: of family idefics3, half a GB


class Encoder:
    """The vision tower of a model, with the cache of what it gave.

    family       the model
    store        the cache; None: there is none
    cache_dtype  how vision features are stored, and what prefixes hold: "full", as the model gives them, or in eight
                 bits, "float8" or "int8". Answers always use the vectors as that storage gives them back, on a hit, on
                 a miss, and without a cache
    scenes_only  whether a picture is refused that is no scene of the embedded model, since no model was chosen

    In some families a picture is encoded in another way where its prompt has several: `several` says so. `optional` are
    names of `OPTIONAL_SIGNALS`, which some methods need: they are computed and stored only where they are named, in an
    entry of its own.

    Raises BadInput for an unknown `cache_dtype`.
    """

    def __init__(
        self, family: Family, store: Store | None = None, cache_dtype: str = "full", scenes_only: bool = False
    ) -> None:
        if cache_dtype not in STORAGES:
            raise BadInput(f"not one of {', '.join(STORAGES)}", field="cache_dtype", value=cache_dtype)
        self.family, self.store, self.cache_dtype, self.scenes_only = family, store, cache_dtype, scenes_only
        self.model = family.checkpoint.name
        self.prefixes = Prefixes(family, store, cache_dtype)

    def identity(self, several: bool = False) -> dict[str, Any]:
        """What an encoded image depends on besides the picture: tower, its settings, and how it is stored."""
        together = {"together": True} if several and self.family.encodes_multi_image else {}
        return self.family.encoder | together | ({} if self.cache_dtype == "full" else {"storage": self.cache_dtype})

    def key(self, image_sha256: str, several: bool = False, optional: Collection[str] = ()) -> str:
        """Cache key of a picture, by the sha256 of its file's bytes."""
        return entry_key(image_sha256, self.identity(several), (*SIGNALS, *optional))

    def look_up(
        self,
        image_sha256: str,
        name: str,
        several: bool = False,
        optional: Collection[str] = (),
        *,
        touch: bool = True,
    ) -> EncodedImage | None:
        """The encoded image from the cache, under the name that the user gave now; None where it is not there.

        `touch` is that of `Store.get`. Raises BadInput as `check`.
        """
        if self.store is None:
            return None
        entry = self.store.get(self.identity(several), self.key(image_sha256, several, optional), touch=touch)
        if entry is None:
            return None
        try:
            encoded = EncodedImage.from_parts(*entry)
            self.family.check(encoded)
        except ValueError:  # whole, but not what this version writes
            return None
        if encoded.image != image_sha256 or encoded.optional.keys() != set(optional):
            return None
        self._refuse(name, encoded.notes)
        return replace(encoded, name=name)

    def encode(
        self, pictures: Sequence[Picture], several: bool = False, optional: Collection[str] = ()
    ) -> list[EncodedImage]:
        """Runs the tower on pictures, whatever the cache holds, and stores what it gives. Raises as `run_tower`."""
        images = self.run_tower(pictures, several, optional)
        for image in images:
            self.put(image)
        return images

    def run_tower(
        self, pictures: Sequence[Picture], several: bool = False, optional: Collection[str] = ()
    ) -> list[EncodedImage]:
        """Runs the tower on pictures, and stores nothing.

        Raises BadInput as `check`, and for an optional signal that there is not; GridpruneError for a tower that gives
        values that are not finite.
        """
        if unknown := sorted(set(optional) - set(OPTIONAL_SIGNALS)):
            reason = f"no optional signal; there are {', '.join(OPTIONAL_SIGNALS)}"
            raise BadInput(reason, field="optional", value=unknown[0])
        for picture in pictures:
            self.check(picture)
        encode = self.family.encode_multi_image if several else self.family.encode
        encodings = encode(
            [picture.image for picture in pictures], [name for name in TOWER_SIGNALS if name in optional]
        )
        return [self._encoded(*pair, several, optional) for pair in zip(pictures, encodings, strict=True)]

    def put(self, encoded: EncodedImage) -> bool:
        """Stores an encoded image, where there is a cache. False where it can't be stored, of which `Store` warns."""
        if self.store is None:
            return True
        if (count := encoded.vision_features.numel()) > MAX_NUMBERS:  # which nobody could read again
            reason = f"{count} numbers are more than the {MAX_NUMBERS} of an entry"
            self.store.warn(f"{encoded.name}: not cached, since {reason}")
            return False
        return self.store.put(encoded.encoder, encoded.key, encoded.to_bytes())

    def check(self, picture: Picture) -> None:
        """Raises BadInput where no model was chosen, and the picture is none that the embedded one knows."""
        if self.scenes_only:  # else nothing is refused, and to look at the picture costs time
            self._refuse(picture.name, self._notes(picture))

    def check_encoded(self, images: Sequence[Source | EncodedImage]) -> None:
        """Raises BadInput where one of a question's images was encoded by another model, or for another number of them.

        Its dtype and storage, which change its numbers in their last places, may be others. Image files pass.
        """
        several = len(images) > 1
        for image in [image for image in images if isinstance(image, EncodedImage)]:
            expected = self.identity(several)
            names = (image.encoder.keys() | expected.keys()) - {"dtype", "storage"}
            differing = [name for name in names if image.encoder.get(name) != expected.get(name)]
            if differing == ["together"]:
                reason = "not encoded as one of several images; encode it with `several=True`"
                if not several:
                    reason = "encoded as one of several images, and is alone; encode it without `several=True`"
                raise BadInput(reason, place=image.name)
            if differing:
                raise BadInput(f"encoded by another model, {image.model}; encode it with this one", place=image.name)

    def check_written(self) -> None:
        """Raises GridpruneError where the cache turned out not to be writable."""
        if self.store is not None and not self.store.writable:
            reason = "the cache can't be written; what was stored before stays, and the same command goes on from there"
            raise GridpruneError(f"{self.store.root}: {reason}")

    def _encoded(self, picture: Picture, encoding: Encoding, several: bool, optional: Collection[str]) -> EncodedImage:
        """The encoded image of what the tower gave for a picture."""
        features, saliency = encoding.vision_features, encoding.saliency
        signals = dict(encoding.optional)
        if "entropy" in optional:
            signals["entropy"] = grey_entropy(picture.image, encoding.views).to(saliency.dtype)
        bounds = [torch.stack(values.aminmax()).tolist() for values in (features, saliency, *signals.values())]
        if not all(isfinite(bound) for of_values in bounds for bound in of_values):
            raise GridpruneError(f"{picture.name}: the tower gave values that are not finite; try `dtype=float32`")
        packed = None if self.cache_dtype == "full" else pack(features, self.cache_dtype)
        return EncodedImage(
            key=self.key(picture.sha256, several, optional),
            model=self.model,
            image=picture.sha256,
            name=picture.name,
            encoder=self.identity(several),
            size=picture.image.size,
            views=encoding.views,
            vision_features=packed.unpack(features.dtype) if packed else features,
            saliency=saliency,
            placeholder_map=encoding.placeholder_map.to(torch.int32),
            prompt=encoding.prompt,
            notes=picture.notes + self._notes(picture),
            packed=packed,
            optional=signals,
        )

    def _notes(self, picture: Picture) -> tuple[str, ...]:
        """What a user should know of a picture and this model."""
        known = self.model != EMBEDDED or looks_like_scene(picture.image)
        return () if known else (NO_SCENE,)

    def _refuse(self, name: str, notes: Sequence[str]) -> None:
        """Raises BadInput for a picture of these notes, where it is none that is taken."""
        if self.scenes_only and NO_SCENE in notes:
            raise NoScene(
                f"{name}: no scene, and the model that comes with the package knows nothing else; name a real one: "
                f"`model={SMALL_MODEL}`, or for good gridprune models default {SMALL_MODEL}"
            )

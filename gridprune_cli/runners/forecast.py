"""What `encode` will write, said before it starts, from settings and the sizes of images: no weights and no pixels.

An image's bytes follow from its number of visual tokens, which the family's settings give for a width and height, and
the width of its vision features, which its config gives. Those of its prefix follow from the same number, and the
language model's heads and layers. What else is in a file is rounded up.
"""

import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gridprune_cli.cache.store import Store
from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput
from gridprune_cli.images import identify, load_image, measure
from gridprune_cli.vlm.prefix import keys_shape

HEADER = 2048  # bytes of a file beside its tensors and the text that stands for the image
TEXT = 32  # tokens of a chat prompt ahead of its image, about
SAMPLE = 256  # images whose sizes speak for all


@dataclass(frozen=True)
class Forecast:
    """Images, and what encoding them will do. Bytes are estimated, but for entries that are there.

    hits        images that are encoded already, or are named twice
    encode      images to encode
    unreadable  images that can't be
    bytes       to write
    growth      of these, what does not replace an entry
    total       what all of the images take in the cache
    limit       of the cache, None for none
    free        bytes on its disk
    """

    images: int
    hits: int
    encode: int
    unreadable: int
    bytes: int
    growth: int
    total: int
    limit: int | None
    free: int


def forecast(
    encoder: Encoder,
    store: Store,
    images: Sequence[Path],
    *,
    refresh: bool = False,
    with_prefix: bool = False,
    step: Callable[[], None] = lambda: None,
) -> Forecast:
    """Looks at every image: its bytes, for the key, and its header. Calls `step` after each.

    A pipe is counted as one to encode, of no size. `with_prefix`: its prefix is to be there, too; one that is encoded
    and lacks it counts as a hit, and adds to the bytes.
    """
    hits = encode = unreadable = written = growth = total = 0
    seen: set[str] = set()
    for image in images:
        if os.path.exists(image) and not os.path.isfile(image):  # a pipe can be read only once
            encode += 1
            step()
            continue
        try:
            sha256, name, data = identify(image)
            if encoder.scenes_only:
                encoder.check(load_image(data, name))
            key = encoder.key(sha256)
            there = store.bytes_of(encoder.identity(), key)
            if key in seen or (there is not None and not refresh):
                hits += 1
                total += 0 if key in seen else there or 0
            else:
                size = entry_bytes(encoder, measure(data, name))
                encode, written, total, growth = encode + 1, written + size, total + size, growth + size - (there or 0)
            if with_prefix and key not in seen:
                encoded = encoder.look_up(sha256, name, touch=False) if there is not None else None
                there = encoder.prefixes.bytes_of(encoded) if encoded is not None else None
                size = prefix_bytes(encoder, measure(data, name))
                if there is None or refresh:
                    written, total, growth = written + size, total + size, growth + size - (there or 0)
                else:
                    total += there
            seen.add(key)
        except (BadInput, ValueError):
            unreadable += 1
        step()
    return Forecast(
        len(images), hits, encode, unreadable, written, max(0, growth), total, store.limit, free_bytes(store.root)
    )


def may_lack_room(encoder: Encoder, store: Store, images: Sequence[Path], *, with_prefix: bool = False) -> bool:
    """Whether a closer look is due: by the headers of some images, all of them, none of them cached, would not fit."""
    sizes = []
    for image in images[:: -(-len(images) // SAMPLE)] if images else ():
        if not os.path.isfile(image):  # a pipe, as the shell's <(...) is, can be read only once
            continue
        try:
            size = measure(image)
            sizes.append(entry_bytes(encoder, size) + (prefix_bytes(encoder, size) if with_prefix else 0))
        except (BadInput, ValueError):
            continue
    total = sum(sizes) / max(1, len(sizes)) * len(images)
    return total > free_bytes(store.root) or (store.limit is not None and total > store.limit)


def entry_bytes(encoder: Encoder, size: tuple[int, int]) -> int:
    """Bytes of the entry of a picture of a width and height, about. ValueError where the family can't process it."""
    family = encoder.family
    number, token = family.dtype.itemsize, family.processor.tokenizer.convert_ids_to_tokens(family.image_token)
    width = family.width * number if encoder.cache_dtype == "full" else family.width + 4  # a byte each, and a scale
    per_token = width + number + 4 + len(token)  # with saliency, place in the map, and text of the placeholder
    return HEADER + family.count_placeholders(size) * per_token


def prefix_bytes(encoder: Encoder, size: tuple[int, int]) -> int:
    """Bytes of the entry of the prefix of a prompt about a picture of a width and height, as `entry_bytes`."""
    family = encoder.family
    length = family.count_placeholders(size) + TEXT
    depth, heads, _, _ = shape = keys_shape(family, family.relevance_depth, length)
    hidden_size = family.text_config.hidden_size
    numbers = 2 * math.prod(shape) + length * hidden_size  # of keys and values, and of hidden states
    vectors = 2 * depth * heads * length + length
    stored = numbers * family.dtype.itemsize if encoder.cache_dtype == "full" else numbers + 4 * vectors
    return HEADER + stored + 8 * length  # with the token ids


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk that a folder, which need not be there yet, is or will be on."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if os.path.exists(place))).free

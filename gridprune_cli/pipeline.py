"""encode -> prune -> generate, with the cache between: what the commands call, and users of the package."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.cache.quantize import STORAGES, pack
from gridprune_cli.cache.store import Store, entry_key
from gridprune_cli.decoding import MAX_TOGETHER
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.generation import generate
from gridprune_cli.images import Picture, Source, SourceFile, identify, load_image, memory_of, open_source
from gridprune_cli.pruning.compress import cell_weights, cells, pool, ratio_budget, ratios
from gridprune_cli.pruning.methods import Method, make_method
from gridprune_cli.pruning.placeholders import staying
from gridprune_cli.pruning.region import contextual_regions, inside
from gridprune_cli.pruning.schedule import LayerSchedule, Region, RegionAttention, Rule, Stage, plan
from gridprune_cli.pruning.signals import Box, Signals, View
from gridprune_cli.questions import check_question
from gridprune_cli.regions import LONGEST, TEMPLATE, VLM, Localized, read_answer
from gridprune_cli.scenes.scene import looks_like_scene
from gridprune_cli.settings import RELEVANCE, Pruning
from gridprune_cli.tokens import EncodedImage, Origin, PrunedSet
from gridprune_cli.vlm import open_model
from gridprune_cli.vlm.checkpoint import EMBEDDED, EMBEDDED_LOCALIZER
from gridprune_cli.vlm.family import Encoding, Family
from gridprune_cli.vlm.word_relevance import keywords

SIGNALS = ("saliency",)  # stored beside the states; relevance follows from the states and the question
ILP_LAYER = 3  # at whose input tokens leave the language model, where nothing else is said
NO_SCENE = "no scene: the embedded model knows only its own scenes; name a real one, as in --model FOLDER"  # a note
SMALL_MODEL = "HuggingFaceTB/SmolVLM-256M-Instruct"  # to begin with: of family idefics3, half a GB


@dataclass(frozen=True)
class Asked:
    """A question about encoded images. `localized` is what `Pipeline.localize` gave, where that asks a model."""

    images: tuple[EncodedImage, ...]
    question: str
    pruning: Pruning
    localized: Sequence[Localized] | None = None

    @property
    def said(self) -> list[Localized | None]:
        """What a localiser that is a model said of each image."""
        return list(self.localized) if self.localized else [None] * len(self.images)


@dataclass(frozen=True)
class Answer:
    """An answer, and everything about how it came to be."""

    text: str
    pruned: PrunedSet
    hits: tuple[bool, ...]  # of each image, whether it was encoded already
    ms: dict[str, float]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the images, and of how they were pruned."""
        return self.pruned.notes

    @property
    def hit(self) -> bool:
        """Whether all images were encoded already."""
        return all(self.hits)

    def to_json(self) -> dict[str, Any]:
        hits_and_misses = ["hit" if hit else "miss" for hit in self.hits]
        return self.pruned.to_json() | {
            "answer": self.text,
            "cache": hits_and_misses[0] if len(hits_and_misses) == 1 else hits_and_misses,
            "ms": {name: round(value, 2) for name, value in self.ms.items()},
        }


class Pipeline:
    """A model with its cache. Parts of the model are loaded when they are first needed, and only those.

    model     `scenes`, a folder, or a hub name, `owner/name` or `owner/name@revision`; or a family that was opened
              already, and then only `store` counts of the rest. None: none was chosen, so it is `scenes`, and a picture
              that is no scene is refused, where `scenes` by name answers, with a note
    revision  branch, tag or commit of a hub model
    clip      the CLIP that the model's tower was taken from, a folder or hub name, where it is not found by itself
    relevance what it comes from: "clip", the CLIP of the model's tower; "words", the language model's; or "auto", CLIP
              where the tower is a CLIP's, else words
    store     None means no cache
    storage   how states are stored: `full`, as the tower gives them, or `float8` or `int8`, which is less exact.
              Answers are made from what is stored, also where it was just encoded, or is not stored at all
    field     the setting that errors name

    Raises BadInput for a model, device or dtype that can't be used, GridpruneError where the hub can't be asked.
    """

    def __init__(
        self,
        model: str | Family | None = None,
        *,
        revision: str | None = None,
        clip: str | None = None,
        relevance: str = "auto",
        store: Store | None = None,
        device: str = "auto",
        dtype: str = "auto",
        storage: str = "full",
        field: str = "model",
    ):
        if storage not in STORAGES:
            raise BadInput(f"--store {storage}: not one of {', '.join(STORAGES)}")
        self.store, self.storage = store, storage
        if isinstance(model, Family):
            self.family = model
        else:
            name = EMBEDDED if model is None else model
            self.family = open_model(
                name, dtype, device, revision=revision, clip=clip, relevance=relevance, store=store, field=field
            )
        self.chosen = model is not None
        self._placed = {"device": device, "dtype": dtype, "storage": storage}
        self._localizers: dict[str, Pipeline] = {}
        self.model = self.family.checkpoint.name

    def __enter__(self) -> "Pipeline":
        return self

    def __exit__(self, *_: object) -> None:
        """Brings the cache back under its limit."""
        if self.store is not None:
            self.store.finish()

    # ---- encode ------------------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> dict[str, Any]:
        """`encoder_of` pictures that are alone in their prompts."""
        return self.encoder_of(several=False)

    def encoder_of(self, several: bool) -> dict[str, Any]:
        """What an encoded image depends on besides the picture: the family's encoder, and how states are stored.

        And in some families whether the picture is one of several in its prompt.
        """
        together = {"together": True} if several and self.family.encodes_multi_image else {}
        return self.family.encoder | together | ({} if self.storage == "full" else {"storage": self.storage})

    def key(self, image: str, several: bool = False) -> str:
        """Cache key of a picture by the sha256 of its file's bytes."""
        return entry_key(image, self.encoder_of(several), SIGNALS)

    def look_up(self, image: str, name: str, several: bool = False) -> EncodedImage | None:
        """The encoded image from the cache, under the name that it is asked for by now. Raises BadInput as `check`."""
        if self.store is None:
            return None
        parts = self.store.get(self.encoder_of(several), self.key(image, several))
        if parts is None:
            return None
        try:
            encoded = EncodedImage.from_parts(*parts)
            self.family.check(encoded)
        except ValueError:  # whole, but not what this version writes
            return None
        if encoded.image != image:
            return None
        self._refuse(name, encoded.notes)
        return replace(encoded, name=name)

    def check(self, picture: Picture) -> None:
        """Raises BadInput where no model was chosen, and the picture is none that the embedded one knows."""
        if not self.chosen:  # else nothing is refused, and to look at the picture costs time
            self._refuse(picture.name, self._remarks(picture))

    def _refuse(self, name: str, notes: Sequence[str]) -> None:
        if not self.chosen and NO_SCENE in notes:
            raise BadInput(
                f"{name}: no scene, and the model that comes with the package knows nothing else; name a real one: "
                f"--model {SMALL_MODEL}, or for good gridprune models default {SMALL_MODEL}"
            )

    def encode(self, pictures: Sequence[Picture], several: bool = False) -> list[EncodedImage]:
        """Runs the tower on pictures, whatever the cache holds, and stores what it gives.

        `several`: each picture will be one of several in a prompt.
        """
        made = self.run_tower(pictures, several)
        for encoded in made:
            self.put(encoded)
        return made

    def run_tower(self, pictures: Sequence[Picture], several: bool = False) -> list[EncodedImage]:
        """Runs the tower on pictures, and stores nothing. Raises BadInput as `check`."""
        for picture in pictures:
            self.check(picture)
        encode = self.family.encode_multi_image if several else self.family.encode
        encodings = encode([picture.image for picture in pictures])
        return [self._encoded(*pair, several) for pair in zip(pictures, encodings, strict=True)]

    def put(self, encoded: EncodedImage) -> bool:
        """Stores an encoded image, where there is a cache. False where it can't be stored, of which `Store` warns."""
        return self.store is None or self.store.put(encoded.encoder, encoded.key, encoded.to_bytes())

    def _encoded(self, picture: Picture, encoding: Encoding, several: bool) -> EncodedImage:
        if not (torch.isfinite(encoding.vision_features).all() and torch.isfinite(encoding.saliency).all()):
            raise GridpruneError(f"{picture.name}: the tower gave values that are not finite; try --dtype float32")
        packed = None if self.storage == "full" else pack(encoding.vision_features, self.storage)
        return EncodedImage(
            key=self.key(picture.sha256, several),
            model=self.model,
            image=picture.sha256,
            name=picture.name,
            encoder=self.encoder_of(several),
            size=picture.image.size,
            views=encoding.views,
            vision_features=packed.unpack(encoding.vision_features.dtype) if packed else encoding.vision_features,
            saliency=encoding.saliency,
            placeholder_map=encoding.placeholder_map.to(torch.int32),
            prompt=encoding.prompt,
            notes=picture.notes + self._remarks(picture),
            packed=packed,
        )

    def _remarks(self, picture: Picture) -> tuple[str, ...]:
        if self.model != EMBEDDED or looks_like_scene(picture.image):
            return ()
        return (NO_SCENE,)

    def remarks(self, pruning: Pruning, images: Sequence[Origin] = ()) -> tuple[str, ...]:
        """What a user should know of how this model prunes, and pruned these images."""
        out = []
        family = self.family
        # nothing was pruned where the CLIP was not looked for yet
        if pruning.needs_relevance and not family.relevance_by_words and "clip" in vars(family) and family.clip:
            if getattr(pruning.method, "relevance_sign", 1) == 0:
                out.append(
                    f"{pruning.method.name} turns CLIP's relevance round, as published; --relevance-sign 1 takes it as "
                    "it is"
                )
            if family.tower_differs:
                out.append(
                    f"this model's tower has other weights than {family.clip.name}, from which its relevance comes; "
                    "compare it with --relevance words"
                )
        for image in images:
            if image.localizer and not image.localizer.get("parsed", True):
                out.append(
                    f"{image.name}: the localiser {image.localizer['name']} answered {image.localizer['answer']!r}, "
                    "which is no region; the one of the relevance was taken"
                )
        return tuple(out)

    def find_relevance(self, pruning: Pruning) -> None:
        """Finds, and fetches where it is not here, the CLIP that relevance comes from, where the pruning needs one.

        To be called before long work, so that what is missing is told at once. Raises BadInput where there is none that
        is the tower's, GridpruneError where the hub fails.
        """
        if pruning.needs_relevance and self.family.clip:
            _ = self.family.tower_differs  # which `remarks` tells of each pruned set

    def relevance_source(self, pruning: Pruning) -> dict[str, Any] | None:
        """What relevance comes from, as results say it; None where the pruning needs none. Raises as `Family.clip`."""
        return self.family.relevance_source if pruning.needs_relevance else None

    def encode_files(self, files: Sequence[SourceFile], several: bool = False) -> list[EncodedImage]:
        """The encoded images of files: from the cache, and the rest through the tower, as many at once as memory lets.

        `several`: each will be one of several in a prompt. Raises BadInput for a picture that can't be read.
        """
        return self._finish(self._look(files, several), several)

    def _look(self, files: Sequence[SourceFile], several: bool = False) -> "list[_Found]":
        """What there is of image files: encoded, decoded, or beyond MAX_TOGETHER bytes the files."""
        found: list[_Found] = [self.look_up(file.sha256, file.name, several) or file for file in files]
        _decode(found)
        return found

    def _prepare(self, files: Sequence[SourceFile], several: bool = False) -> "list[_Found]":
        """`_look`, and what then is needed of the model is loaded."""
        found = self._look(files, several)
        self.family.load(*(("tower",) if any(isinstance(f, Picture) for f in found) else ()), "projector", "language")
        return found

    def _finish(self, found: "list[_Found]", several: bool = False) -> list[EncodedImage]:
        """Encodes what was not in the cache. Takes each picture out of `found` then, to hold few at the same time."""
        while places := [n for n, one in enumerate(found) if isinstance(one, Picture)]:
            encoded = self.encode([one for one in found if isinstance(one, Picture)], several)
            for n, own in zip(places, encoded, strict=True):
                found[n] = own
            _decode(found)
        return [one for one in found if isinstance(one, EncodedImage)]

    def encode_one(self, source: Source, several: bool = False) -> tuple[EncodedImage, bool]:
        """An encoded image, and whether it came from the cache. Raises BadInput for a picture that can't be read.

        `several`: it will be one of several in a prompt.
        """
        image, name, data = identify(source)
        found = self.look_up(image, name, several)
        return (found, True) if found else (self.encode([load_image(data, name)], several)[0], False)

    # ---- localise ----------------------------------------------------------------------------------------------------

    def localize(self, sources: Source | list[Source], question: str, pruning: Pruning) -> list[Localized] | None:
        """Asks the localiser of `pruning` for the region of each picture, for `prune`. None where it names no model.

        Its encoded images are kept in the same cache. Raises BadInput for a localiser that can't be used.
        """
        sources = sources if isinstance(sources, list) else [sources]
        return self.localize_each([sources], [question], pruning)[0]

    def localize_each(
        self, sources: Sequence[Sequence[Source]], questions: Sequence[str], pruning: Pruning
    ) -> list[list[Localized] | None]:
        """`localize` for each question and its pictures; those of all are asked about in one batch."""
        localizers = [self.localizer(pruning, len(own)) for own in sources]
        asked = [
            (source, question)
            for own, question, asks in zip(sources, questions, localizers, strict=True)
            for source in (own if asks else ())
        ]
        localizer = next(filter(None, localizers), None)  # the same for all that ask one
        if localizer is None:
            return [None] * len(sources)
        distinct = list(dict.fromkeys(source for source, _ in asked))
        images = localizer._finish(localizer._prepare([open_source(source) for source in distinct]))
        seen = dict(zip(distinct, images, strict=True))
        said = iter(localizer.name_regions([seen[s] for s, _ in asked], [question for _, question in asked], pruning))
        return [[next(said) for _ in own] if asks else None for own, asks in zip(sources, localizers, strict=True)]

    def localizer(self, pruning: Pruning, images: int = 1) -> "Pipeline | None":
        """The model that is asked for regions, or None where `pruning` asks none. Raises BadInput as `__init__`."""
        name = pruning.localizer
        if name == RELEVANCE or pruning.region != "auto" or not pruning.heeds_region(images):
            return None
        if name == VLM and self.model != EMBEDDED:
            raise BadInput(
                f"--localizer {VLM}: it knows only the embedded model's scenes; name a model, as in --localizer FOLDER"
            )
        if name not in self._localizers:
            model = EMBEDDED_LOCALIZER if name == VLM else name
            self._localizers[name] = Pipeline(model, store=self.store, **self._placed, field="localizer")
        return self._localizers[name]

    def name_regions(
        self, images: Sequence[EncodedImage], questions: Sequence[str], pruning: Pruning
    ) -> list[Localized]:
        """This model's answers, as a localiser, to the question about each image. It is given all tokens."""
        bare = "{question}" if pruning.localizer == VLM else TEMPLATE
        template = pruning.localizer_template or bare
        whole = Pruning(keep=1.0, method=make_method("uniform"))
        sets = self.prune_each(
            [
                Asked((image,), template.replace("{question}", question), whole)
                for image, question in zip(images, questions, strict=True)
            ]
        )
        answers = [made.text for made in generate(self.family, sets, LONGEST)]
        return [Localized(pruning.localizer, answer, read_answer(answer)) for answer in answers]

    # ---- prune -------------------------------------------------------------------------------------------------------

    def prune(
        self,
        images: EncodedImage | Sequence[EncodedImage],
        question: str,
        pruning: Pruning | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        localized: Sequence[Localized] | None = None,
    ) -> PrunedSet:
        """Chooses the tokens that the question needs, of one image or several.

        Each image has its own budget, or all share one where `pruning` says so. `system` is a system message,
        `template` a prompt with `{image}` and `{question}` in place of the model's chat template. `localized` is what
        `localize` gave, where `pruning` names a model as localiser. Raises BadInput where the pruning does not fit the
        images, or the prompt the model.
        """
        images = (images,) if isinstance(images, EncodedImage) else tuple(images)
        asked = Asked(images, question, pruning or Pruning(), localized)
        return self.prune_each([asked], system=system, template=template)[0]

    def prune_each(
        self, asked: Sequence[Asked], *, system: str | None = None, template: str | None = None
    ) -> list[PrunedSet]:
        """`prune` for many questions, what they have in common done once for all. One that fails fails them all."""
        for one in asked:
            check_question(one.question, len(one.images))
            if one.localized is None and self.localizer(one.pruning, len(one.images)):
                raise BadInput(
                    f"--localizer {one.pruning.localizer}: must be asked before; pass what Pipeline.localize gives"
                )
        signals = self._signals(asked)
        parts = _choose(asked, signals)
        prompts = self.family.write_prompts([(one.question, one.images) for one in asked], system, template)
        cuts = [self._cut(*own) for own in zip(asked, signals, parts, prompts, strict=True)]
        for _, _, pruned in cuts:
            last = int(pruned.keywords["position_ids"].max())
            self.family.check_length(last + 1, "ask shorter, of fewer images, or take --positions compact")
        rows = self._project_rows([(vision_features, placeholder_map) for vision_features, placeholder_map, _ in cuts])
        return [make(image_embeds=own) for own, (_, _, make) in zip(rows, cuts, strict=True)]

    def _cut(
        self, asked: Asked, signals: Sequence[Signals], parts: Sequence[Tensor], full: Tensor
    ) -> tuple[Tensor, Tensor, "partial[PrunedSet]"]:
        """States `(N, C)`, the slots `(S,)` that stay, and the pruned set but for its rows; `full` is the prompt."""
        images, pruning = asked.images, asked.pruning
        counts = [image.count for image in images]
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        if len(parts) < len(images):  # a shared budget
            (kept,) = parts
            vision_features = _merged(
                pruning.method, _join(signals), kept, torch.cat([image.vision_features for image in images])
            )
        else:
            kept = torch.cat([first + part for first, part in zip(firsts, parts, strict=True)])
            merged = [
                _merged(pruning.method, *own)
                for own in zip(signals, parts, [i.vision_features for i in images], strict=True)
            ]
            vision_features = _cat(merged)
        placeholder_map = torch.cat(
            [
                torch.where(i.placeholder_map < 0, i.placeholder_map, i.placeholder_map + first)
                for i, first in zip(images, firsts, strict=True)
            ]
        ).long()
        stays = staying(placeholder_map, kept, sum(counts))
        mask = torch.ones(len(full), dtype=torch.bool)
        mask[full == self.family.image_token] = stays
        ids = full[mask]
        original = pruning.positions == "original"
        chosen = list(parts)
        if len(parts) < len(images):
            owner = torch.repeat_interleave(torch.arange(len(images)), torch.tensor(counts))
            chosen = [kept[owner[kept] == n] - first for n, first in enumerate(firsts)]
        if pruning.plc != "off":  # takes the place of what the method merges
            pairs = zip(images, signals, chosen, strict=True)
            vision_features = torch.cat([self._compressed(*own, pruning.plc) for own in pairs])
        leaving = self._inside(pruning, signals, parts)
        origins = tuple(
            Origin(
                key=image.key,
                image=image.image,
                name=image.name,
                views=image.views,
                region=known.region,
                zones=_zones(pruning.method, known, mine),
                localizer=_found_by(pruning, known, named),
                ratios=None if pruning.plc == "off" else ratios(mine, _within(known)),
                notes=image.notes,
            )
            for image, known, mine, named in zip(images, signals, chosen, asked.said, strict=True)
        )
        make = partial(
            PrunedSet,
            kept=kept,
            input_ids=ids,
            position_ids=self.family.positions(full, images)[..., mask] if original else torch.arange(len(ids)),
            saliency=_cat([image.saliency for image in images]),
            relevance=None if signals[0].relevance is None else _cat([s.need("relevance") for s in signals]),
            images=origins,
            model=self.model,
            fingerprint=self.family.fingerprint,
            question=asked.question,
            method=pruning.method.to_json(),
            positions=pruning.positions,
            placeholder_map=placeholder_map[stays] if leaving else None,
            schedule=leaving,
            plc=pruning.plc,
            relevance_source=self.relevance_source(pruning),
            remarks=self.remarks(pruning, origins),
        )
        return vision_features, placeholder_map[stays], make

    def _inside(self, pruning: Pruning, signals: Sequence[Signals], kept: Sequence[Tensor]) -> LayerSchedule | None:
        """What leaves inside the language model, given the kept tokens of each image, or of all in one."""
        if pruning.ilp is None and not pruning.method.inner:
            return None
        layers = range(self.family.first_inner, self.family.depth)
        counts = [sum(s.count for s in signals)] if len(kept) < len(signals) else [s.count for s in signals]
        stages = pruning.method.stages(counts, [pruning.count(n) for n in counts], layers)
        if pruning.ilp is None and not stages:
            return None
        flag = "--layer"
        if pruning.ilp is not None:
            flag = "--ilp-layer"
            nearest = min(max(ILP_LAYER, layers.start), layers.stop - 1)
            layer = nearest if pruning.ilp_layer is None else pruning.ilp_layer
            stages = (Stage(layer, *_ilp(pruning.ilp, signals, counts, kept), pruning.positions),)
        for stage in stages:
            if stage.layer not in layers:
                raise BadInput(
                    f"{flag} {stage.layer}: in this model tokens can leave at the layers {layers.start} to "
                    f"{layers.stop - 1}"
                )
        return plan(stages, [len(part) for part in kept], layers.stop)

    def _signals(self, asked: Sequence[Asked]) -> list[list[Signals]]:
        """The signals of every image of every question."""
        family = self.family
        if queries := [one.pruning.query or one.question for one in asked if one.pruning.needs_relevance]:
            family.relevance.read(queries)
        made: list[list[Signals]] = []
        unknown: dict[tuple[View, ...], list[tuple[int, int, Tensor]]] = {}  # place in `made`, and where to look
        for number, one in enumerate(asked):
            pruning, needs, query = one.pruning, one.pruning.method.requires, one.pruning.query or one.question
            words = family.vocabulary.vectors(keywords(query)) if "question_embeds" in needs else None
            made.append([])
            for image, said in zip(one.images, one.said, strict=True):
                relevance = family.relevance(image.vision_features, query) if pruning.needs_relevance else None
                region: Box | None = None
                if pruning.heeds_region(len(one.images)):
                    region = pruning.region if isinstance(pruning.region, tuple) else said.box if said else None
                    if region is None and relevance is not None:
                        where = relevance * getattr(pruning.method, "relevance_sign", 1)
                        unknown.setdefault(image.views, []).append((number, len(made[-1]), where))
                made[-1].append(
                    Signals(
                        image.views,
                        relevance,
                        image.saliency.float(),
                        region,
                        image.vision_features.to(family.device) if "vision_features" in needs else None,
                        family.text_embeds(image.vision_features).to(family.device)
                        if "image_embeds" in needs
                        else None,
                        words,
                        family.relevance_by_words,
                    )
                )
        for views, places in unknown.items():
            regions = contextual_regions(torch.stack([where for _, _, where in places]), views)
            for (number, n, _), region in zip(places, regions, strict=True):
                made[number][n] = replace(made[number][n], region=region)
        return made

    @torch.inference_mode()
    def _compressed(self, image: EncodedImage, signals: Signals, kept: Tensor, plc: str) -> Tensor:
        """The states `(N, C)` of an image, those of kept tokens as compression leaves them."""
        k = len(kept)
        if plc == "off" or k in (0, image.count):  # with nothing dropped there is nothing to compress
            return image.vision_features
        within = _within(signals)
        cell = cells(image.views, kept, within)
        rows = pool(image.vision_features, cell, cell_weights(cell, image.saliency, k), k)
        if plc == "trained":
            parts = (image.vision_features.float(), signals.need("relevance"), within, rows.float(), within[kept])
            rows = self.family.compressor(*(part[None] for part in parts))[0].to(rows.dtype)
        return image.vision_features.index_put((kept,), rows)

    def _project_rows(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """For each pair of states `(N, C)` and slots `(S,)` the rows `(S, D)`: projected states, and separators."""
        tokens = [placeholder_map >= 0 for _, placeholder_map in wanted]
        vision_features = [
            own[placeholder_map[token]] for (own, placeholder_map), token in zip(wanted, tokens, strict=True)
        ]
        projected = self.family.project(_cat(vision_features)).split([len(own) for own in vision_features])
        out = list(projected)
        for n, token in enumerate(tokens):
            if not bool(token.all()):
                out[n] = self.family.separator().to(projected[n].dtype).repeat(len(token), 1)
                out[n][token] = projected[n]
        return out

    # ---- generate ----------------------------------------------------------------------------------------------------

    def generate(self, pruned: PrunedSet, *, max_new_tokens: int = 128, **options: Any) -> str:
        """The answer from a pruned set. `options` go to transformers' `generate`."""
        return generate(self.family, [pruned], max_new_tokens, **options)[0].text

    def ask(
        self,
        sources: Source | list[Source],
        question: str,
        pruning: Pruning | None = None,
        *,
        system: str | None = None,
        template: str | None = None,
        max_new_tokens: int = 128,
        **options: Any,
    ) -> Answer:
        """encode, prune and generate, timed. A picture in the cache is not decoded, and the tower is not loaded.

        `options` go to transformers' `generate`. Raises BadInput, naming them, where it can't use them.
        """
        ms = dict.fromkeys(("load", "localize", "encode", "select", "prefill", "decode", "total"), 0.0)
        with _timed(ms, "total"):
            sources = sources if isinstance(sources, list) else [sources]
            check_question(question, len(sources))
            self.family.check_length(self.family.count_words(question), "ask shorter")  # before anything is loaded
            pruning = pruning or Pruning()
            given = [open_source(source) for source in sources]
            localizer, localized = self.localizer(pruning, len(given)), None
            with _timed(ms, "load"):
                self.find_relevance(pruning)
                if pruning.plc == "trained":
                    _ = self.family.compressor
                found = self._prepare(given, several=len(given) > 1)
                hits = tuple(isinstance(one, EncodedImage) for one in found)
                if pruning.needs_relevance:
                    self.family.relevance.load()
                if "question_embeds" in pruning.method.requires:
                    self.family.vocabulary.load()
                shown = localizer._prepare(given) if localizer else []
            if localizer:
                with _timed(ms, "localize"):
                    localized = localizer.name_regions(localizer._finish(shown), [question] * len(shown), pruning)
            with _timed(ms, "encode"):
                images = self._finish(found, several=len(given) > 1)
            with _timed(ms, "select"):
                pruned = self.prune(images, question, pruning, system=system, template=template, localized=localized)
            try:
                made = generate(self.family, [pruned], max_new_tokens, **options)[0]
            except (ValueError, TypeError, ImportError) as fault:  # by transformers, of their values
                named = ", ".join(name for name in options if name != "stream")
                if not named:
                    raise
                first = (str(fault).splitlines() or [""])[0].strip()
                raise BadInput(f"--generation {named}: transformers can't use it ({first})") from fault
        ms |= {"prefill": made.prefill, "decode": made.decode}
        return Answer(made.text, pruned, hits, ms)

    def encode_all(
        self,
        sources: Iterable[Source],
        *,
        batch: int = 16,
        refresh: bool = False,
        notice: Callable[[str], None] = warnings.warn,
    ) -> Iterator[tuple[str, EncodedImage | GridpruneError, bool]]:
        """Encodes many pictures in batches into the cache: (name, what came of it, whether it was a hit), in turn.

        A picture that can't be read, encoded or stored gives its error in place of an encoded image, and the rest goes
        on. Where memory runs out, `notice` is told, and batches are smaller from then on. Raises GridpruneError where
        the cache can't be written, since then all of it would be for nothing.
        """
        from gridprune_cli.runners.local import Bulk  # which stands on this module

        for found in Bulk(self, images=batch, notice=notice).encode(sources, refresh=refresh, store=True):
            self.check_written()
            yield found

    def check_written(self) -> None:
        """Raises GridpruneError where the cache turned out not to be writable."""
        if self.store is not None and not self.store.writable:
            raise GridpruneError(f"{self.store.root}: the cache can't be written, so nothing was encoded into it")


_Found = EncodedImage | Picture | SourceFile  # what there is of an image


def _decode(found: list[_Found]) -> None:
    """Decodes the first image files, in place: as many as take MAX_TOGETHER bytes, by their headers, or one."""
    room = MAX_TOGETHER
    for n, one in enumerate(found):
        if isinstance(one, SourceFile):
            room -= memory_of(one.source)
            if room < 0 and any(isinstance(other, Picture) for other in found):
                return
            found[n] = one.load()


def _choose(asked: Sequence[Asked], signals: Sequence[Sequence[Signals]]) -> list[list[Tensor]]:
    """Kept of every image of every question; of all its images in one where they share a budget."""
    parts = [
        [_join(own)] if one.pruning.share_budget and len(own) > 1 else own
        for one, own in zip(asked, signals, strict=True)
    ]
    alike: dict[Method, list[tuple[Signals, int]]] = {}
    methods = []
    for one, own in zip(asked, parts, strict=True):
        for part in own:
            method, k = _budget(part, one.pruning)
            alike.setdefault(method, []).append((part, k))
            methods.append(method)
    kept = {method: iter(method.select_batch(*zip(*own, strict=True))) for method, own in alike.items()}
    flat = iter([next(kept[method]) for method in methods])
    return [[next(flat) for _ in own] for own in parts]


def _budget(signals: Signals, pruning: Pruning) -> tuple[Method, int]:
    """How to choose of one image, and how many."""
    k, method = pruning.count(signals.count), pruning.method
    if signals.region is not None and (pruning.inside_ratio or pruning.outside_ratio):
        within = int(_within(signals).sum())
        k, share = ratio_budget(k, within, signals.count, pruning.inside_ratio, pruning.outside_ratio)
        method = replace(method, region_share=share)  # type: ignore[call-arg]
    return method, k


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """One behind the other; what is one already is not copied."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _within(signals: Signals) -> Tensor:
    """(N,) bool: which tokens lie in the region; none without one."""
    return inside(signals.views, signals.region) if signals.region else torch.zeros(signals.count, dtype=torch.bool)


def _join(signals: Sequence[Signals]) -> Signals:
    """The signals of several images as those of one, without a region: images have no place in one picture."""
    first = signals[0]
    parts: dict[str, Any] = {
        name: torch.cat([own.need(name) for own in signals])
        for name in ("relevance", "saliency", "vision_features", "image_embeds")
        if getattr(first, name) is not None
    }
    return replace(first, views=tuple(view for own in signals for view in own.views), region=None, **parts)


def _merged(method: Method, signals: Signals, kept: Tensor, vision_features: Tensor) -> Tensor:
    """The states (N, C), with those of kept tokens that a method merges others into."""
    weights = method.merge(signals, kept)
    if weights is None:
        return vision_features
    return vision_features.index_copy(
        0, kept, torch.sparse.mm(weights, vision_features.float()).to(vision_features.dtype)
    )


def _ilp(
    what: float | str, signals: Sequence[Signals], counts: Sequence[int], kept: Sequence[Tensor]
) -> tuple[Rule, tuple[int, ...]]:
    """The rule and the budgets of inner pruning. Raises BadInput where it is the region's, and an image has none."""
    if isinstance(what, float):
        return RegionAttention(), tuple(max(1, int(what * count + 0.5)) for count in counts)
    budgets = []
    if any(own.region is None for own in signals):
        raise BadInput(
            "--ilp region: there is no region; it takes --method gridprune, without --region none and, for several "
            "images, --share-budget. Or give a share as --ilp"
        )
    for own, part in zip(signals, kept, strict=True):
        assert own.region is not None
        budgets.append(int(inside(own.views, own.region)[part].sum()))
    return Region(), tuple(budgets)


def _found_by(pruning: Pruning, signals: Signals, said: Localized | None) -> dict[str, Any] | None:
    """Which localiser found the region, and what it answered. None where there is no region, or it was given."""
    if said:
        return said.to_json()
    return {"name": RELEVANCE} if signals.region and pruning.region == "auto" else None


def _zones(method: Method, signals: Signals, kept: Tensor) -> dict[str, Any] | None:
    """Rows, columns and budgets of the zones, for methods that have them; lists of rows and columns for several views.

    A zone keeps just its budget, so the budgets are counted from what was kept.
    """
    zoned = method.zones(signals)
    if zoned is None:
        return None
    index, zones = zoned
    rows, cols = (list(sides) for sides in zip(*zones.grids, strict=True))
    budgets = torch.bincount(index[kept], minlength=zones.count).tolist()
    one = len(zones.grids) == 1
    return {"rows": rows[0] if one else rows, "cols": cols[0] if one else cols, "budgets": budgets}


@contextmanager
def _timed(ms: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    ms[name] = 1e3 * (time.perf_counter() - start)

"""Relevance from CLIP: how well each patch matches the question, as CLIP's own text tower reads it.

    r_i = cos( W_v LN_post(h_i), W_t t_EOS(Q) )

h_i is the patch's hidden state of the penultimate layer, LN_post and W_v CLIP's own image head (GridPrune, arXiv
2511.10081; CLIP applies that head to the CLS token only).
"""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel, PreTrainedModel

from gridprune_cli.errors import BadInput
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.loading import load_part
from gridprune_cli.vlm.weights import tensors

_TEXTS = 8192  # questions whose vectors are held: 25 MB at 768 numbers each
_BATCH = 64  # texts that the text tower reads at once
# weights of a tower that are compared with its CLIP's: few, of its start and its middle, so that it costs no time
_COMPARED = tuple(f"{n}.weight" for n in ("patch_embedding", "layers.0.self_attn.q_proj", "layers.{}.self_attn.q_proj"))
_PLAIN = (torch.float16, torch.bfloat16, torch.float32)


def weights_differ(model: Path, clip: Path) -> bool:
    """Whether weights of a model's tower differ from its CLIP's or SigLIP's by more than rounding to 16 bits makes.

    The arguments are folders of checkpoints. What can't be compared, as quantised weights, counts as equal.
    """
    of_clip, of_model = _towers_weights(clip), _towers_weights(model)
    for name in of_clip.keys() & of_model.keys():
        model_weight, clip_weight = of_model[name], of_clip[name]
        plain = model_weight.dtype in _PLAIN and clip_weight.dtype in _PLAIN
        if plain and model_weight.shape == clip_weight.shape:
            gap = (model_weight.float() - clip_weight.float()).norm() / clip_weight.float().norm()
            if gap > 2**-8:  # bfloat16 rounds by 2**-9 of a value at most, and each of the two may have been
                return True
    return False


def _towers_weights(folder: Path) -> dict[str, Tensor]:
    """The compared weights of a checkpoint's vision tower, by the end of their names."""
    named = {name: tensor for name, tensor in tensors(folder) if "vision" in name}
    layers = sum(name.endswith("self_attn.q_proj.weight") for name in named)
    ends = [end.format(layers // 2) for end in _COMPARED]
    return {end: tensor for name, tensor in named.items() for end in ends if name.endswith(f".{end}")}


class ClipRelevance:
    """The companion CLIP checkpoint of a tower, without the tower. Loaded at first use.

    model_class  transformers' class of it
    without      dotted paths of what is not read: the vision tower, but for what stands behind its layers
    """

    model_class: ClassVar[type[PreTrainedModel]] = CLIPModel
    without: ClassVar[tuple[str, ...]] = (
        "vision_model.embeddings",
        "vision_model.pre_layrnorm",
        "vision_model.encoder",
    )

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: str):
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, device
        self._texts: dict[str, Tensor] = {}
        # vision features, their patches in CLIP's space as unit vectors, and the lengths that these had
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    @cached_property
    def model(self) -> Any:
        return load_part(self.model_class, self.checkpoint.folder, self.without, self.dtype, self.device)

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.checkpoint.folder, local_files_only=True)

    def load(self) -> None:
        """Loads it now."""
        _ = self.model, self.tokenizer

    @torch.inference_mode()
    def __call__(self, vision_features: Tensor, question: str) -> Tensor:
        """Cosines of patches' features `(N, C)` with the question, `(N,)` float32 on the CPU.

        Raises BadInput where the features are not of the width of this CLIP's tower.
        """
        return (self._unit_patches(vision_features)[0] @ self._text(question).T).mean(1).cpu()

    @torch.inference_mode()
    def patch_lengths(self, vision_features: Tensor) -> Tensor:
        """Lengths of patches' features `(N, C)` in CLIP's common space, `(N,)` float32 on the CPU. Raises BadInput as
        relevance itself: times the cosine it is the dot product with the question's unit vector.
        """
        return self._unit_patches(vision_features)[1].cpu()

    def _unit_patches(self, vision_features: Tensor) -> tuple[Tensor, Tensor]:
        """Patches in CLIP's common space as unit vectors `(N, D)`, and their lengths `(N,)`, in float32."""
        if self._last is None or self._last[0] is not vision_features:  # an image has often several questions in turn
            patches = self._patches(vision_features).float()
            self._last = vision_features, normalize(patches, dim=-1), patches.norm(dim=-1)
        return self._last[1:]

    def _patches(self, vision_features: Tensor) -> Tensor:
        """Patches' features `(N, D)` in CLIP's common space, as they come from its projection."""
        head = self.model.vision_model.post_layernorm
        if vision_features.shape[1] != len(head.weight):
            raise BadInput(
                f"its tower gives {len(head.weight)} numbers per patch, the model's {vision_features.shape[1]}; name "
                "the CLIP that the model's tower was taken from",
                field="clip",
                value=self.checkpoint.name,
            )
        return self.model.visual_projection(head(vision_features.to(self.device, self.dtype)))

    def _text(self, question: str) -> Tensor:
        """Unit vectors `(pieces, D)` of a question; cached, since one question is often asked of many images."""
        if question not in self._texts:
            self.read([question])
        return self._texts[question]

    @torch.inference_mode()
    def read(self, questions: Iterable[str]) -> None:
        """Reads questions that will be asked, those of one length together.

        A question longer than the text tower takes is read in pieces of its full length; the cosines of the pieces are
        averaged, so no word is dropped.
        """
        unread = [question for question in dict.fromkeys(questions) if question not in self._texts]
        lengths: dict[int, list[tuple[str, list[int]]]] = {}
        for question, of_question in zip(unread, self._pieces(unread), strict=True):
            for piece in of_question:
                lengths.setdefault(len(piece), []).append((question, piece))
        vectors: dict[str, list[Tensor]] = {}
        for pieces in lengths.values():
            for start in range(0, len(pieces), _BATCH):
                batch = pieces[start : start + _BATCH]
                ids = torch.tensor([piece for _, piece in batch], device=self.device)
                embeds = normalize(self.model.get_text_features(ids).pooler_output.float(), dim=-1)
                for (question, _), vector in zip(batch, embeds, strict=True):
                    vectors.setdefault(question, []).append(vector)
        self._texts |= {question: torch.stack(of_pieces) for question, of_pieces in vectors.items()}
        for question in list(self._texts)[:-_TEXTS]:
            del self._texts[question]

    def _pieces(self, questions: Sequence[str]) -> list[list[list[int]]]:
        """Token ids of questions as the text tower reads them, each in pieces that are no longer than it takes."""
        room = self.model.config.text_config.max_position_embeddings - 2
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return [[[first, *piece, last] for piece in pieces] for pieces in self._split(questions, room)]

    def _split(self, texts: Sequence[str], room: int) -> list[list[list[int]]]:
        """Token ids of texts without special tokens, `room` at a time; at least one piece each, which may be empty."""
        if not texts:
            return []
        # not `verbose`: it would warn of a length that is never read at once
        ids_of_texts = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [[ids[i : i + room] for i in range(0, max(1, len(ids)), room)] for ids in ids_of_texts]

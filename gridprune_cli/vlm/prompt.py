"""Writing prompts: the chat template, or the user's template, with each image's placeholders in it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gridprune_cli.errors import BadInput
from gridprune_cli.questions import Exchange
from gridprune_cli.tokens import EncodedImage
from gridprune_cli.vlm.chat_template import render, render_apart
from gridprune_cli.vlm.checkpoint import EMBEDDED, EMBEDDED_LOCALIZER
from gridprune_cli.vlm.parts import ModelParts


class PromptWriter(ModelParts):
    """What a model family adds to its parts to write prompts."""

    @property
    def prompt_token(self) -> str:
        """What stands for a whole image in a chat prompt."""
        return self.processor.image_token

    @property
    def filler(self) -> int:
        """The token id that fills shorter prompts of a batch."""
        tokenizer = self.processor.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def write_text(self, question: str, images: int, system: str | None, history: Sequence[Exchange] = ()) -> str:
        """The model's own chat prompt, with one `prompt_token` per image.

        Of `images` each exchange of `history` has its own, ahead of its question; the last question has the others.
        Raises BadInput where the model has no such prompt, or none that holds a conversation.
        """
        messages: list[dict[str, Any]] = []
        if system:
            messages.append({"role": "system", "content": [{"type": "text", "text": system}]})
        for exchange in history:
            messages.append(_user_message(exchange.question, exchange.images))
            messages.append({"role": "assistant", "content": [{"type": "text", "text": exchange.answer}]})
        messages.append(_user_message(question, images - sum(exchange.images for exchange in history)))
        template, name = self.processor.chat_template, self.checkpoint.name
        if isinstance(template, dict):  # several, by name
            template = template.get("default")
        if not isinstance(template, str):
            raise BadInput(f"{name} has no chat template; give a `template`")
        run = render if name in (EMBEDDED, EMBEDDED_LOCALIZER) else render_apart
        try:
            text = run(template, messages, self.processor.tokenizer.special_tokens_map)
        except BadInput as fault:
            if history:
                raise BadInput(f"the chat template of {name} can't hold this conversation ({fault})") from fault
            raise BadInput(f"the chat template of {name} can't be used ({fault}); give a `template`") from fault
        if not _holds(text, history):
            reason = "it leaves earlier turns out; ask each question by itself"
            raise BadInput(f"the chat template of {name} can't hold a conversation: {reason}")
        return text

    def write_prompt(
        self, question: str, images: Sequence[EncodedImage], system: str | None = None, template: str | None = None
    ) -> Tensor:
        """Token ids `(L,)` of the prompt, with an image token for every placeholder of every image.

        `template` takes the place of the model's chat template: a text with `{question}`, and `{image}` once per image
        or once for all of them. Raises BadInput where it is none, where the model's own template can't be used, and
        where the question itself holds a `prompt_token` or an image token.
        """
        return self.write_prompts([(question, images)], system, template)[0]

    def write_prompts(
        self,
        questions: Sequence[tuple[str, Sequence[EncodedImage]]],
        system: str | None = None,
        template: str | None = None,
        histories: Sequence[Sequence[Exchange]] | None = None,
    ) -> list[Tensor]:
        """`write_prompt` for each question and its images; the tokenizer is called once for all.

        `histories` are the earlier turns of each, whose images are among those of the question.
        """
        histories = histories or [()] * len(questions)
        texts = [
            self._prompt_text(*question, system, template, history)
            for question, history in zip(questions, histories, strict=True)
        ]
        tokenizer, ids_of = self.processor.tokenizer, dict[int, list[int]]()
        bos = tokenizer.bos_token
        has_bos = [bos is not None and text.startswith(bos) for text in texts]  # a second one would be too much
        for has in sorted(set(has_bos)):
            group = [n for n in range(len(texts)) if has_bos[n] is has]
            # verbose would warn of prompts that are too long, by their length before anything is pruned
            encoding = tokenizer(
                [texts[n] for n in group], add_special_tokens=not has, return_attention_mask=False, verbose=False
            )
            ids_of |= zip(group, encoding.input_ids, strict=True)
        prompts = [torch.tensor(ids_of[n]) for n in range(len(texts))]
        for ids, (_, images) in zip(prompts, questions, strict=True):
            if int((ids == self.image_token).sum()) != sum(len(image.placeholder_map) for image in images):
                raise BadInput("the question holds the model's image token; leave it out")
        return prompts

    def _prompt_text(
        self,
        question: str,
        images: Sequence[EncodedImage],
        system: str | None,
        template: str | None,
        history: Sequence[Exchange],
    ) -> str:
        """The prompt as a text, with the placeholders of its images."""
        if template is not None and history:
            raise BadInput("holds one question, and no conversation; leave it out", field="template")
        if template is not None:
            text = self._fill(template, question, len(images))
        else:
            text = self.write_text(question, len(images), system, history)
        pieces = text.split(self.prompt_token)
        if len(pieces) != len(images) + 1:
            raise BadInput(
                f"the prompt holds {self.prompt_token}, which stands for an image, {len(pieces) - 1} times for "
                f"{len(images)} images; leave it out of "
                + ("questions, answers and `system`" if history else "question and `system`, or give a `template`")
            )
        text = pieces[0]
        for image, piece in zip(images, pieces[1:], strict=True):
            text += image.prompt["placeholder"] + piece
        return text

    def _fill(self, template: str, question: str, images: int) -> str:
        places = template.count("{image}")
        if "{question}" not in template or places not in (1, images):
            raise BadInput("needs {question}, and {image} once for all images or once for each", field="template")
        image_tokens = self.prompt_token * (images if places == 1 else 1)
        return template.replace("{image}", image_tokens).replace("{question}", question)

    def count_words(self, text: str) -> int:
        """How many tokens a text takes."""
        return len(self.processor.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def check_length(self, positions: int, remedy: str) -> None:
        """Raises BadInput, with what to do, for a prompt of more positions than the language model was made for."""
        most = getattr(self.text_config, "max_position_embeddings", None)
        if most is not None and positions > most:
            raise BadInput(f"the prompt takes {positions} positions, and {self.checkpoint.name} has {most}; {remedy}")


def _user_message(question: str, images: int) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}


def _holds(text: str, history: Sequence[Exchange]) -> bool:
    """Whether a prompt has all earlier questions and answers in turn; templates may strip white space around them."""
    place = 0
    for exchange in history:
        for turn in (exchange.question.strip(), exchange.answer.strip()):
            place = text.find(turn, place)
            if place < 0:
                return False
            place += len(turn)
    return True

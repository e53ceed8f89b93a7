"""Answers in OpenAI's wire format: completions, chunks of streams, usage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gridprune_cli.choices import list_methods


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    text           the whole answer
    prompt_tokens  what the language model got, kept visual tokens among them
    image_tokens   those that stood for images
    reason         "stop" where the answer ended by itself or at a stop text, "length" where it was cut
    record         what pruning did, with the cache's part and milliseconds
    """

    text: str
    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    reason: str
    record: dict[str, Any]


def models_json(model: str, created: int, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The list of the one model. Beside it what requests may choose from, and get where they choose nothing."""
    entry: dict[str, Any] = {"id": model, "object": "model", "created": created, "owned_by": "gridprune"}
    entry["gridprune"] = {"methods": list_methods(), **defaults}
    return {"object": "list", "data": [entry]}


def usage_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
        "prompt_tokens_details": {"multimodal_tokens": {"image": outcome.image_tokens}},
    }


def completion_json(ident: str, created: int, model: str, outcome: Outcome) -> dict[str, Any]:
    message = {"role": "assistant", "content": outcome.text, "refusal": None}
    return {
        "id": ident,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.reason}],
        "usage": usage_json(outcome),
        "gridprune": outcome.record,
    }


@dataclass(frozen=True)
class Chunks:
    """The chunks of one streamed completion. With `include_usage` all but the last have an empty usage."""

    ident: str
    created: int
    model: str
    include_usage: bool

    def first(self) -> dict[str, Any]:
        return self._chunk({"role": "assistant", "content": ""})

    def text(self, text: str) -> dict[str, Any]:
        return self._chunk({"content": text})

    def last(self, outcome: Outcome) -> Sequence[dict[str, Any]]:
        """What ends the stream: the reason, with what pruning did, and the usage where it was asked for."""
        ending = self._chunk({}, outcome.reason) | {"gridprune": outcome.record}
        if not self.include_usage:
            return [ending]
        return [ending, self._chunk({}) | {"choices": [], "usage": usage_json(outcome)}]

    def _chunk(self, delta: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {
            "id": self.ident,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
        } | ({"usage": None} if self.include_usage else {})

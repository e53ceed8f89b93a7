"""OpenAI's wire format: bodies of requests to `ChatRequest`, failures to error objects. Answers are in `replies`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gridprune_cli.cache.files import deeper
from gridprune_cli.errors import BadInput, GridpruneError, NoScene
from gridprune_cli.questions import MAX_DEPTH, MAX_IMAGES, Exchange, check_history, check_question, check_text

MAX_STOPS = 4  # OpenAI's own bound
MAX_STOP = 1000  # characters of a stop text
MAX_UUID = 200  # characters

# ignored, since no answer depends on them
_INERT = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# taken with these values alone, which ask for nothing
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools there is nothing to choose
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
_KNOWN = (
    *("model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens"),
    *("temperature", "top_p", "seed", "stop", "user", "gridprune"),
)
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    503: "server_error",
    500: "server_error",
}


class Refusal(Exception):
    """A request that is not answered: an HTTP status, and the fields of OpenAI's error object.

    retry_after  seconds after which it may be sent again, where that can help
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_after: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def refusal_of(error: Exception) -> Refusal:
    """A failure of the library as a refusal: 400 where the input is at fault, else 500."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NoScene):  # who asks can't choose another model
        reason = "a picture can't be used: it is no scene, and the model that is served knows nothing else"
        return Refusal(400, reason, code="invalid_image")
    if isinstance(error, BadInput) and error.place == "-":  # pictures are bytes to the library
        return Refusal(400, f"a picture can't be used: {error.reason}", code="invalid_image")
    if isinstance(error, BadInput):
        return Refusal(400, str(error), code="invalid_value", param=error.field)
    text = str(error) if isinstance(error, GridpruneError) else f"unexpected {type(error).__name__}"
    return Refusal(500, text, code="internal_error")


@dataclass(frozen=True)
class PicturePart:
    """An image part of a message: a URL, or the uuid of a picture that was sent before, or both, to name it.

    place  of the part, as in `messages[0].content[1]`
    """

    place: str
    url: str | None = None
    uuid: str | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; questions of equal sampling are answered together."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def to_options(self) -> dict[str, Any]:
        """Options of transformers' `generate`."""
        if self.temperature == 0:
            return {}
        # 0 switches off what a checkpoint may set: OpenAI's API knows no top_k
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}


@dataclass(frozen=True)
class ChatRequest:
    """A body of `/v1/chat/completions`, checked but for the pictures and what only the model can tell.

    question    the user's last text, which pictures are pruned for
    pictures    of all the user's messages in turn; `history` says how many came with earlier ones
    max_tokens  None: the server's default
    pruning     options by name, as `Pruning.from_options` takes them
    cache       whether the cache of encoded images is read and written
    template    a text that takes the place of the model's chat template
    """

    model: str
    question: str
    pictures: tuple[PicturePart, ...]
    system: str | None = None
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    user: str = ""
    pruning: Mapping[str, Any] = field(default_factory=dict)
    cache: bool = True
    template: str | None = None
    figure: bool = False
    history: tuple[Exchange, ...] = ()


def parse_chat(body: bytes) -> ChatRequest:
    """The request of a body. Raises Refusal with 400 for what is no such request, or asks for what there is not."""
    values = read_object(body)
    # 1. what would change the answer, if it were ignored
    for name, value in values.items():
        if value is None or name in _INERT or name in _KNOWN:
            continue
        if name not in _NEUTRAL:
            raise _bad(name, "not supported here; leave it out", "unsupported_parameter")
        neutral = [other for other in _NEUTRAL[name] if isinstance(other, bool) == isinstance(value, bool)]
        if value not in neutral:
            raise _bad(name, f"not supported here but as {json.dumps(_NEUTRAL[name][0])}", "unsupported_parameter")
    # 2. the messages
    system, question, pictures, history = _messages(values.get("messages"))
    # 3. everything else
    options = values.get("gridprune") or {}
    if not isinstance(options, dict):
        raise _bad("gridprune", 'must be an object of options, as in {"keep": 0.2}')
    pruning = {
        name: value
        for name, value in options.items()
        if name not in ("cache", "template", "figure") and value is not None  # which is as if it were left out
    }
    if pruning.get("localizer") not in (None, "relevance", "vlm"):
        raise _bad("gridprune.localizer", "must be relevance or vlm: no other model is loaded for a request")
    template = options.get("template")
    if template is not None and not isinstance(template, str):
        raise _bad("gridprune.template", "must be a text")
    stream_options = values.get("stream_options") or {}
    if not isinstance(stream_options, dict) or stream_options.keys() - {"include_usage", "include_obfuscation"}:
        raise _bad("stream_options", 'must be {"include_usage": true} or left out')
    try:
        check_question(question, len(pictures))
        check_history(history, len(pictures))
        for name, text in (("the system message", system), ("`template`", template)):
            check_text(text or "", name)
    except BadInput as fault:
        raise refusal_of(fault) from fault
    return ChatRequest(
        model=_text(values, "model"),
        question=question,
        pictures=pictures,
        system=system,
        max_tokens=_max_tokens(values),
        sampling=_sampling(values),
        stop=_stops(values.get("stop")),
        stream=_flag(values, "stream"),
        include_usage=_flag(stream_options, "include_usage"),
        user=_text(values, "user", ""),
        pruning=pruning,
        cache=_flag(options, "cache", True),
        template=template,
        figure=_flag(options, "figure"),
        history=history,
    )


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal for what is none, or can't be written again."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body, parse_constant=refuse)
        deep = deeper(values, MAX_DEPTH)
    except RecursionError:
        deep = True
    except ValueError as fault:
        raise Refusal(400, f"the body is no JSON ({fault})", code="invalid_json") from fault
    if deep:
        raise Refusal(400, f"the body is nested more than {MAX_DEPTH} deep", code="invalid_json")
    if not isinstance(values, dict):
        raise Refusal(400, "the body must be a JSON object", code="invalid_json")
    return values


def _bad(param: str, reason: str, code: str = "invalid_value") -> Refusal:
    return Refusal(400, f"{param}: {reason}", code=code, param=param)


def _messages(messages: Any) -> tuple[str | None, str, tuple[PicturePart, ...], tuple[Exchange, ...]]:
    """System message, last question, pictures of all questions, and earlier turns.

    Messages are the system's, if any, then the user's and the assistant's by turns, the last one the user's.
    """
    if not isinstance(messages, list) or not messages:
        raise _bad("messages", "must be a list of messages")
    systems: list[str] = []
    pictures: list[PicturePart] = []
    turns: list[tuple[str, int]] = []  # texts of the user and the assistant by turns, each with its pictures
    for n, message in enumerate(messages):
        place = f"messages[{n}]"
        if not isinstance(message, dict):
            raise _bad(place, "must be an object with role and content")
        role = message.get("role")
        if role not in ("system", "developer", "user", "assistant"):
            raise _bad(f"{place}.role", "must be system, developer, user or assistant")
        if role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
            raise _bad(place, "not supported here: calls of tools", "unsupported_parameter")
        texts, of_message = _content(message.get("content"), place)
        if of_message and role != "user":
            raise _bad(place, "images belong into the user's messages")
        if role in ("system", "developer"):
            if turns:
                raise _bad(place, "must come before the first message of the user")
            systems += texts
            continue
        if (role == "user") != (len(turns) % 2 == 0):
            raise _bad(place, "the user's and the assistant's messages must come by turns, the user's first")
        turns.append(("\n".join(texts), len(of_message)))
        pictures += of_message
    if len(turns) % 2 == 0:
        raise _bad("messages", "the last one must be the user's")
    if not pictures:
        raise _bad("messages", "need an image_url part: questions are asked of images")
    if len(pictures) > MAX_IMAGES:
        raise _bad("messages", f"{len(pictures)} images; at most {MAX_IMAGES} can be asked about at once")
    pairs = zip(turns[:-1:2], turns[1::2], strict=True)
    history = tuple(Exchange(question, answer, images) for (question, images), (answer, _) in pairs)
    return "\n".join(systems) or None, turns[-1][0], tuple(pictures), history


def _content(content: Any, place: str) -> tuple[list[str], list[PicturePart]]:
    """Texts and image parts of a message."""
    if isinstance(content, str):
        return [content], []
    if not isinstance(content, list):
        raise _bad(f"{place}.content", "must be a text or a list of parts")
    texts, pictures = [], []
    for n, part_json in enumerate(content):
        where = f"{place}.content[{n}]"
        kind = part_json.get("type") if isinstance(part_json, dict) else None
        if kind == "text" and isinstance(part_json.get("text"), str):
            texts.append(part_json["text"])
        elif kind == "image_url":
            pictures.append(_picture(part_json, where))
        else:
            raise _bad(where, 'must be {"type": "text", "text": ...} or {"type": "image_url", "image_url": ...}')
    return texts, pictures


def _picture(part_json: Mapping[str, Any], place: str) -> PicturePart:
    image = part_json.get("image_url")
    if isinstance(image, dict):
        detail, image = image.get("detail"), image.get("url")
        if detail not in (None, "auto", "low", "high"):
            raise _bad(f"{place}.image_url.detail", "must be auto, low or high")
    uuid = part_json.get("uuid")
    if uuid is not None and not (isinstance(uuid, str) and 0 < len(uuid) <= MAX_UUID and uuid.isprintable()):
        raise _bad(f"{place}.uuid", f"must be a text of 1 to {MAX_UUID} printable characters")
    if image is not None and not isinstance(image, str):
        raise _bad(f"{place}.image_url", "must be a URL, or an object with one")
    if not image and uuid is None:
        raise _bad(f"{place}.image_url", "has no URL, and no uuid names a picture that was sent before")
    return PicturePart(place, image or None, uuid)


def _text(values: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, str):
        raise _bad(name, "must be a text")
    return value


def _flag(values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    value = values.get(name)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise _bad(name, "must be true or false")
    return value


def _number(values: Mapping[str, Any], name: str, least: float, most: float) -> float | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise _bad(name, f"must be a number from {least:g} to {most:g}")
    return float(value)


def _whole(values: Mapping[str, Any], name: str, least: int, most: int) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise _bad(name, f"must be a whole number from {least} to {most}")
    return value


def _max_tokens(values: Mapping[str, Any]) -> int | None:
    """The longest answer, under its new name or the old one."""
    newer, older = (_whole(values, name, 1, 1 << 31) for name in ("max_completion_tokens", "max_tokens"))
    if newer is not None and older is not None and newer != older:
        raise _bad("max_tokens", "not beside another max_completion_tokens")
    return older if newer is None else newer


def _sampling(values: Mapping[str, Any]) -> Sampling:
    """Greedy where neither temperature nor top_p says otherwise; top_p alone is at temperature 1, as with OpenAI."""
    top_p = _number(values, "top_p", 0, 1)
    if top_p == 0:
        raise _bad("top_p", "must be above 0")
    temperature = _number(values, "temperature", 0, 2)
    seed = _whole(values, "seed", -(1 << 63), (1 << 63) - 1)
    top_p = 1.0 if top_p is None else top_p
    if temperature is None:
        temperature = 1.0 if top_p < 1 else 0.0
    return Sampling(temperature, top_p, seed) if temperature else Sampling()


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    fits = isinstance(stops, list) and all(isinstance(text, str) and 0 < len(text) <= MAX_STOP for text in stops)
    if not fits or len(stops) > MAX_STOPS:
        raise _bad("stop", f"must be a text of up to {MAX_STOP} characters, or a list of up to {MAX_STOPS}")
    return tuple(stops)

"""OpenAI's wire format: what a body may say, and what is refused because an answer would not heed it."""

import functools
import itertools
import json

import pytest

from gridprune_cli.errors import BadInput, GridpruneError, NoScene
from gridprune_cli.questions import Exchange
from gridprune_cli.serve.wire import Refusal, Sampling, parse_chat, refusal_of

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "What is left of the star?"}
MESSAGES = [{"role": "user", "content": [TEXT, IMAGE]}]
ANSWER = {"role": "assistant", "content": "red", "refusal": None, "tool_calls": None}  # as the client gives it back


def body(**values: object) -> bytes:
    return json.dumps({"model": "scenes", "messages": MESSAGES} | values).encode()


def test_a_plain_request():
    chat = parse_chat(body())
    assert (chat.model, chat.question, chat.system, chat.max_tokens) == ("scenes", TEXT["text"], None, None)
    assert (chat.sampling, chat.stop, chat.stream, chat.cache, chat.pruning) == (Sampling(), (), False, True, {})
    (picture,) = chat.pictures
    assert (picture.place, picture.url, picture.uuid) == ("messages[0].content[1]", IMAGE["image_url"]["url"], None)


def test_all_that_a_request_may_say():
    images = [
        {"type": "image_url", "image_url": "file:///a.png"},
        {"type": "image_url", "image_url": {"url": "http://h/b.png", "detail": "low"}, "uuid": "b"},
        {"type": "image_url", "uuid": "c", "image_url": None},
    ]
    chat = parse_chat(
        body(
            messages=[
                {"role": "system", "content": "Be short."},
                {"role": "developer", "content": [{"type": "text", "text": "Be kind."}]},
                {"role": "user", "content": [*images, TEXT, {"type": "text", "text": "And right?"}]},
            ],
            max_completion_tokens=7,
            temperature=0.5,
            top_p=0.9,
            seed=3,
            stop=["\n", "."],
            stream=True,
            stream_options={"include_usage": True},
            user="ann",
            gridprune={"keep": 0.5, "method": None, "region": "none", "cache": False, "template": "{image}{question}"},
            # what asks for nothing, and what no answer depends on
            **{
                "n": 1,
                "logprobs": False,
                "presence_penalty": 0.0,
                "tools": None,
                "tool_choice": "auto",
                "metadata": {},
            },
        )
    )
    assert chat.system == "Be short.\nBe kind." and chat.question == "What is left of the star?\nAnd right?"
    assert [(p.url, p.uuid) for p in chat.pictures] == [("file:///a.png", None), ("http://h/b.png", "b"), (None, "c")]
    assert (chat.max_tokens, chat.stop, chat.stream, chat.include_usage, chat.user) == (
        7,
        ("\n", "."),
        True,
        True,
        "ann",
    )
    assert chat.sampling == Sampling(0.5, 0.9, 3)
    assert chat.sampling.to_options() == {"do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 0}
    assert (chat.pruning, chat.cache) == ({"keep": 0.5, "region": "none"}, False)
    assert chat.template == "{image}{question}"


def test_earlier_turns_with_their_pictures():
    last = {"role": "user", "content": [IMAGE | {"uuid": "b"}, {"type": "text", "text": "And now?"}]}
    parts = {"role": "assistant", "content": [{"type": "text", "text": "It is"}, {"type": "text", "text": "green."}]}
    system = {"role": "system", "content": "Be short."}
    between = {"role": "user", "content": "Which colour?"}
    chat = parse_chat(body(messages=[system, *MESSAGES, ANSWER, between, parts, last]))
    assert (chat.system, chat.question) == ("Be short.", "And now?")
    assert chat.history == (Exchange(TEXT["text"], "red", 1), Exchange("Which colour?", "It is\ngreen.", 0))
    assert [picture.place for picture in chat.pictures] == ["messages[1].content[1]", "messages[5].content[0]"]


@pytest.mark.parametrize(
    "values, sampling",
    [
        ({}, Sampling()),
        ({"temperature": 0, "top_p": 0.5, "seed": 1}, Sampling()),  # greedy whatever else is said
        ({"top_p": 0.5}, Sampling(1.0, 0.5)),
        ({"temperature": 1, "seed": 1}, Sampling(1.0, 1.0, 1)),
    ],
)
def test_answers_are_greedy_unless_asked_otherwise(values, sampling):
    assert parse_chat(body(**values)).sampling == sampling
    assert bool(sampling.to_options()) == bool(sampling.temperature)


def user(*content: object) -> list[object]:
    return [{"role": "user", "content": list(content)}]


@pytest.mark.parametrize(
    "values, param",
    [
        # what would change the answer
        ({"n": 2}, "n"),
        ({"n": True}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"best_of": 2}, "best_of"),
        # messages
        ({"messages": []}, "messages"),
        ({"messages": "What?"}, "messages"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "What?"}]}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*MESSAGES, *MESSAGES]}, "messages[1]"),
        ({"messages": [{"role": "assistant", "content": "red"}, *MESSAGES]}, "messages[0]"),
        ({"messages": [*MESSAGES, ANSWER]}, "messages"),
        ({"messages": [*MESSAGES, ANSWER, {"role": "system", "content": "x"}, *MESSAGES]}, "messages[2]"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": [IMAGE]}, *MESSAGES]}, "messages[1]"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": None}, *MESSAGES]}, "messages[1].content"),
        ({"messages": [*MESSAGES, ANSWER | {"tool_calls": [{}]}, *MESSAGES]}, "messages[1]"),
        ({"messages": [*user(IMAGE), ANSWER, *user(TEXT)]}, None),  # no first question
        ({"messages": [*MESSAGES, ANSWER | {"content": "x" * 65537}, *MESSAGES]}, None),
        ({"messages": [*MESSAGES, ANSWER | {"content": "x" * 60000}] * 9 + MESSAGES}, None),
        ({"messages": [{"role": "system", "content": [IMAGE]}, *MESSAGES]}, "messages[0]"),
        ({"messages": user(TEXT, {"type": "input_audio"})}, "messages[0].content[1]"),
        ({"messages": user(TEXT, {"type": "image_url"})}, "messages[0].content[1].image_url"),
        ({"messages": user(TEXT, {"type": "image_url", "uuid": 3})}, "messages[0].content[1].uuid"),
        ({"messages": user(TEXT, {"type": "image_url", "uuid": "\x1b[2J"})}, "messages[0].content[1].uuid"),
        ({"messages": user(TEXT, *[IMAGE] * 65)}, "messages"),
        ({"messages": user(IMAGE)}, None),  # no question
        ({"messages": user(IMAGE, {"type": "text", "text": "\ud800"})}, None),
        # values
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"other": 1}}, "stream_options"),
        ({"gridprune": [1]}, "gridprune"),
        ({"gridprune": {"localizer": "owner/name"}}, "gridprune.localizer"),
        ({"gridprune": {"template": 3}}, "gridprune.template"),
        ({"gridprune": {"cache": "no"}}, "cache"),
    ],
)
def test_what_is_refused_names_the_parameter(values, param):
    with pytest.raises(Refusal) as fault:
        parse_chat(body(**values))
    error = fault.value.to_json()["error"]
    assert fault.value.status == 400 and error["type"] == "invalid_request_error" and error["param"] == param
    assert error["message"] and error["code"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[1]", b"\xff\xfe\x00", b'{"model": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object(data):
    with pytest.raises(Refusal) as fault:
        parse_chat(data)
    assert fault.value.status == 400 and fault.value.code == "invalid_json"


def test_whatever_stands_in_a_body_is_taken_or_refused():
    """Bodies with values of other kinds in any place, or with places left out."""
    values = (None, True, 0, -1, 2.5, 10**400, "", "x", "\ud800", "\0", [], [1], [None], {}, {"a": 1}, {"": None})
    whole = json.loads(body(stop=["a"], stream_options={"include_usage": True}, gridprune={"keep": 0.5}, n=1, user="u"))

    def places(value: object, path: tuple = ()):
        for name in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield (*path, name)
            yield from places(value[name], (*path, name))

    taken = 0
    for path, value in itertools.product(places(whole), (*values, ...)):
        changed = json.loads(json.dumps(whole))
        holder = functools.reduce(lambda inner, name: inner[name], path[:-1], changed)
        if value is ...:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value
        try:
            parse_chat(json.dumps(changed).encode())
            taken += 1
        except Refusal as refusal:
            assert refusal.status == 400 and json.dumps(refusal.to_json())
    assert taken > 50


def test_failures_of_the_library_have_a_status():
    bad = refusal_of(BadInput("must be above 0", field="keep", value=-1))
    assert (bad.status, bad.param, bad.message) == (400, "keep", "keep=-1: must be above 0")
    no_scene = refusal_of(NoScene("b.png: no scene; name a real one: `model=x`, or gridprune models default x"))
    assert (no_scene.status, no_scene.code) == (400, "invalid_image")
    assert "no scene" in no_scene.message and "`" not in no_scene.message and "default" not in no_scene.message
    assert refusal_of(GridpruneError("the disk is full")).to_json()["error"]["type"] == "server_error"
    unexpected = refusal_of(ValueError("a secret"))
    assert unexpected.status == 500 and "secret" not in unexpected.message

"""Answers in OpenAI's wire format."""

import pytest

from gridprune_cli.serve.replies import Chunks, Outcome, completion_json

OUTCOME = Outcome("red star", 39, 28, 3, "stop", {"keep": 0.11})


def test_a_completion_counts_what_the_language_model_got():
    completion = completion_json("chatcmpl-1", 5, "scenes", OUTCOME)
    assert completion["usage"]["prompt_tokens"] == 39 and completion["usage"]["total_tokens"] == 42
    assert completion["usage"]["prompt_tokens_details"] == {"multimodal_tokens": {"image": 28}}
    assert completion["choices"][0]["message"]["content"] == "red star"
    assert completion["gridprune"] == OUTCOME.record


@pytest.mark.parametrize("include", [False, True])
def test_usage_comes_last_and_where_it_was_asked_for(include):
    chunks = Chunks("chatcmpl-1", 5, "scenes", include)
    assert chunks.first()["choices"][0]["delta"]["role"] == "assistant"
    assert ("usage" in chunks.text("red")) == include
    last = chunks.last(OUTCOME)
    assert len(last) == 1 + include and last[0]["choices"][0]["finish_reason"] == "stop"
    assert last[0]["gridprune"] == OUTCOME.record
    if include:
        assert last[1]["choices"] == [] and last[1]["usage"]["completion_tokens"] == 3

"""Errors of the library as the command line prints them."""

import pytest

from gridprune_cli.cli.describe import describe, error_fields, with_options
from gridprune_cli.errors import BadInput, GridpruneError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BadInput("must be above 0", field="keep", value=1.5), "--keep 1.5: must be above 0"),
        (BadInput("is no size", field="cache_limit"), "--cache-limit: is no size"),
        (BadInput("not so", field="share_budget", value=True), "--share-budget: not so"),
        (BadInput("not so", field="share_budget", value=False), "--share-budget False: not so"),
        (BadInput("needs {question}", field="template"), "--prompt-template: needs {question}"),
        (BadInput("a folder", field="output", value="x"), "--output x: a folder"),  # in no group
        (BadInput("no such layer", field="layer", value=9), "--method-option layer=9: no such layer"),
        (BadInput("no such layer", field="method_option", value="layer=9"), "--method-option layer=9: no such layer"),
        (GridpruneError("is torn", place="a.png"), "a.png: is torn"),
        (BadInput("too many", field="tokens", value=9).at("q.jsonl:7"), "q.jsonl:7: --tokens 9: too many"),
        (BadInput("a text with --flags and `code here`"), "a text with --flags and `code here`"),
    ],
)
def test_the_line_of_an_error(error, line):
    assert describe(error) == line
    assert error_fields(error) == {"error": line, "error_type": type(error).__name__}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("take `relevance=words`", "take --relevance words"),
        ("name it as `clip`, or `positions=compact`", "name it as --clip, or --positions compact"),
        ("`relevance_sign=1` takes it as it is", "--method-option relevance_sign=1 takes it as it is"),
        ("`cache_dtype=float8`; `prompt_template`", "--cache-dtype float8; --prompt-template"),
        ("only `to=vllm`; leave out `with_prefix`", "only --to vllm; leave out --with-prefix"),
        ("`region=0,1,2,3` or `localizer=some/model@v2`", "--region 0,1,2,3 or --localizer some/model@v2"),
        ("`id`, `gridprune models`, `colour=red`, `Keep`", "`id`, `gridprune models`, `colour=red`, `Keep`"),
    ],
)
def test_settings_in_backticks_are_options_and_the_rest_stays(text, shown):
    assert with_options(text) == shown
    assert describe(GridpruneError(text)) == shown


def test_a_place_is_put_in_front_once():
    error = BadInput("is torn", place="p.safetensors")
    assert error.about("p.safetensors") is error
    assert describe(BadInput("is torn").about("p.safetensors")) == "p.safetensors: is torn"

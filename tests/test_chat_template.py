"""Chat templates that come with a checkpoint: rendered as transformers does, and stopped at the bounds."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from tiny_families import write_checkpoint
from transformers.utils.chat_template_utils import render_jinja_template

from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm import chat_template
from gridprune_cli.vlm.chat_template import render_apart

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?\n é \ud800"}]}]
PLAIN = """{{ bos_token }}{% for message in messages %}{{ message.role|upper }}: {% for part in message.content -%}
{% if part.type == 'image' %}<image>{% else %}{{ part.text|trim }}{% endif %}{% endfor %}{% endfor %}
{% if add_generation_prompt %} {{ messages | tojson }} ASSISTANT:{% endif %}"""


@pytest.fixture(scope="module", autouse=True)
def _much_time():
    """A busy machine may take longer than the bound for what is refused for another reason."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(chat_template, "MAX_SECONDS", 120.0)
        chat_template._stop()  # the next is started with this bound
        yield
    chat_template._stop()


def test_a_plain_template_gives_what_transformers_gives():
    tokens = {"bos_token": "<s>"}
    (expected,), _ = render_jinja_template([MESSAGES], chat_template=PLAIN, add_generation_prompt=True, **tokens)
    assert "what?" in expected and render_apart(PLAIN, MESSAGES, tokens) == expected


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 10**10 }}", "MiB of memory"),  # computed while it is compiled
        ("{{ 'x'.center(10**10 * messages|length) }}", "MiB of memory"),
        ("{{ range(100000)|join('x' * 100000) }}", "MiB of memory"),
        ("{% set x = namespace(y='x') %}{% for i in range(99) %}{% set x.y = x.y ~ x.y %}{% endfor %}", "of memory"),
        ("{% for i in range(20) %}{{ 'x' * 10**5 }}{% endfor %}", "2,000,000 characters of this question"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "maximum recursion depth"),
        ("{{ raise_exception('no ' ~ 'system' * 1000) }}", "no systemsystem"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages[0].content + 1 }}", "can only concatenate"),
        ("{% for %}", "Expected"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_beyond_the_bounds_is_refused(template, reason):
    with pytest.raises(BadInput, match=reason) as fault:
        render_apart(template, MESSAGES, {})
    assert len(str(fault.value)) < 250 and "\n" not in str(fault.value)
    assert render_apart("{{ messages|length }}", MESSAGES, {}) == "1"  # the next one is served


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set n = 10**8 * messages|length %}{{ 7 ** n }}",  # one call of C
    ],
)
def test_a_template_that_runs_on_is_stopped(template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.5)
    chat_template._stop()  # the next is started with this bound
    start = time.monotonic()
    with pytest.raises(BadInput, match=r"it takes more than 0\.5 s"):
        render_apart(template, MESSAGES, {})
    assert time.monotonic() - start < 60


def test_threads_each_get_their_own_prompt():
    with ThreadPoolExecutor(8) as threads:
        prompts = threads.map(lambda n: render_apart("{{ n }}", [], {"n": str(n)}), range(100))
    assert list(prompts) == [str(n) for n in range(100)]


def test_ctrl_c_is_prompt_and_leaves_no_answer_behind():
    assert render_apart("{{ 1 }}", [], {}) == "1"
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        render_apart("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", [], {})
    assert time.monotonic() - start < 60  # half of what the template may take
    assert render_apart("{{ 2 }}", [], {}) == "2"


def test_a_fork_gets_a_process_of_its_own():
    assert render_apart("{{ 1 }}", [], {}) == "1"
    before = chat_template._process.pid
    if not (child := os.fork()):
        right = chat_template._process is None and render_apart("{{ 2 }}", [], {}) == "2"
        chat_template._stop()
        os._exit(0 if right else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_apart("{{ 3 }}", [], {}) == "3" and chat_template._process.pid == before


def test_the_model_is_named(tmp_path):
    folder = write_checkpoint("llava", tmp_path / "tiny")
    family = Pipeline(str(folder)).family
    refused = f"^the chat template of {folder} can't be used .*{{}}.*; give a `template`$"
    for template, reason in (("{{ 'x' * 10**10 }}", "it takes more than"), ({"default": "{{ x.y.z }}"}, "undefined")):
        family.processor.chat_template = template
        with pytest.raises(BadInput, match=refused.format(reason)):
            family.write_prompt("what?", [])
    family.processor.chat_template = ["no", "text"]
    with pytest.raises(BadInput, match="tiny has no chat template; give a `template`"):
        family.write_prompt("what?", [])


def test_the_embedded_model_starts_no_process():
    chat_template._stop()
    assert "what?" in Pipeline("scenes").family.write_text("what?", 1, None)
    assert chat_template._process is None

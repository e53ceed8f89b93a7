"""A running vLLM, asked over HTTP: what is sent, and answers, order, resuming and errors of `export` and `batch`."""

import base64
import io
import json
import signal
import socket
import threading
import time
from functools import partial

import pytest
import torch
from served import serving
from stub_vllm import MODEL, StubVllm

from gridprune_cli.client.connection import http_connection
from gridprune_cli.client.protocol import ServerFault
from gridprune_cli.errors import BadInput
from gridprune_cli.integrations import vllm_http
from gridprune_cli.integrations.vllm_http import VllmServer, send_all
from gridprune_cli.tokens import load_pruned

QUESTION, OTHER = "what colour is the left object?", "Is there a circle?"
COMPACT = ("--tokens", 5, "--positions", "compact")


@pytest.fixture
def stub(tiny_llava):
    """A stand-in that is running: (stub, its URL)."""
    stub = StubVllm(tiny_llava)
    with serving(stub.app) as port:
        yield stub, f"http://127.0.0.1:{port}"


@pytest.fixture
def sets(run, noise, tmp_path):
    """Two pruned sets with the chat template's prompt, and one with another prompt."""
    paths = [tmp_path / f"{name}.safetensors" for name in ("first", "second", "other")]
    noise((100, 80)).image.save(tmp_path / "p.png")
    for path, question, options in zip(
        paths,
        (QUESTION, OTHER, QUESTION),
        ((), (), ("--prompt-template", "{question} {image} ASSISTANT:")),
        strict=True,
    ):
        assert run("prune", tmp_path / "p.png", question, *COMPACT, *options, "-o", path)[0] == 0
    return paths


def decoded(item):
    assert item["type"] == "image_embeds" and item["uuid"]
    return torch.load(io.BytesIO(base64.b64decode(item["image_embeds"])), weights_only=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_answers_of_sets_are_those_of_generate(run, stub, sets):
    vllm, url = stub
    vllm.trusting = True
    expected, expected_json = run("generate", *sets)[1], run("generate", *sets, "--json")[1]
    assert len(set(expected.splitlines())) > 1
    to_vllm = ("export", *sets, "--to", "vllm", "--serve")
    assert run(*to_vllm, f"{url}/v1", "-q") == (0, expected, "")
    assert run(*to_vllm, url, "--json", "--batch-size", 1)[:2] == (0, expected_json)
    by_template, literal = vllm.bodies[-2:]
    for body, path in ((by_template, sets[1]), (literal, sets[2])):
        pruned = load_pruned(path)
        content = body["messages"][0]["content"]
        assert torch.equal(decoded(content[0]), pruned.image_embeds)
        settings = {"model": MODEL, "temperature": 0, "max_tokens": 4, "return_token_ids": True}
        assert settings.items() <= body.items()
    assert by_template["messages"][0]["content"][1:] == [{"type": "text", "text": OTHER}]
    assert "chat_template" not in by_template and len(literal["messages"][0]["content"]) == 1
    assert literal["chat_template_kwargs"]["literal_prompt"].endswith("<image> ASSISTANT :")


def test_what_fails_for_a_set(run, stub, sets, tmp_path):
    vllm, url = stub
    send = ("--to", "vllm", "--serve", url)
    code, out, err = run("export", sets[2], *send)
    assert (code, out, err.count("\n")) == (2, "", 1) and "--trust-request-chat-template is not set" in err
    vllm.refusals = {"circle": (500, "it fell\n over")}
    code, out, err = run("export", sets[1], *send)
    assert (code, out) == (1, "") and err == f"gridprune: {sets[1]}: {url}: it fell over\n"
    gaps = tmp_path / "gaps.safetensors"
    run("prune", tmp_path / "p.png", QUESTION, "--tokens", 5, "-o", gaps)
    code, out, err = run("export", sets[0], gaps, sets[1], tmp_path / "p.png", *send, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and "3 of 4 could not be answered from" in err
    assert [line.get("error_type") for line in lines] == [None, "BadInput", "GridpruneError", "BadInput"]
    assert "original positions" in lines[1]["error"] and lines[1]["pruned"] == str(gaps)
    vllm.preamble = "Be brief. "  # a chat template of its own
    code, out, err = run("export", sets[0], *send)
    assert (code, out) == (1, "") and "made another prompt of it" in err and "own chat template" in err


def test_what_fails_for_the_server(run, stub, sets, tiny_llava):
    vllm, url = stub

    def fails(*options, code=2):
        got, out, err = run("export", *sets[:2], "--to", "vllm", *options)
        assert (got, out, err.count("\n")) == (code, "", 1), err
        return err

    gone = f"http://127.0.0.1:{free_port()}"
    assert f"{gone}: can't be reached" in fails("--serve", gone, code=1)
    assert "--serve unix:/x: not http://HOST:PORT" in fails("--serve", "unix:/x")
    assert "give --output for files, or --serve" in fails()
    assert "give --output for files, or --serve" in fails("--serve", url, "-o", sets[0].parent)
    for option, value in (("--max-new-tokens", 9), ("--batch-size", 9), ("--api-key", "secret")):
        assert f"{option}: only with --serve" in fails("-o", sets[0].parent, option, value)
    vllm.key = "secret"
    assert "give its --api-key" in fails("--serve", url)
    assert run("export", *sets[:2], "--to", "vllm", "--serve", url, "--api-key", "secret")[0] == 0
    vllm.key, vllm.root = "", "another/model"
    code, out, err = run("export", sets[0], "--to", "vllm", "--serve", url)
    assert (code, out) == (2, "") and f"serves {MODEL}, not {tiny_llava}" in err and "--served-model-name" in err
    assert len(vllm.bodies) == 2  # of the one call that got an answer


@pytest.fixture
def questions(noise, tmp_path):
    """A file of questions about two pictures."""
    lines = []
    for seed in range(2):
        noise((60 + 20 * seed, 60), seed).image.save(tmp_path / f"{seed}.png")
        lines += [
            {"image": f"{seed}.png", "question": text} for text in (QUESTION, OTHER, "why?", "a circle or a cat?")
        ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_batch_gives_the_lines_of_a_local_one(run, stub, questions, tmp_path):
    _, url = stub
    options = ("--keep", 0.4, "--positions", "compact")
    there = ("--engine", "vllm", "--server", url, "--batch-size", 3)
    local = run("batch", questions, *options)[1]
    assert len({json.loads(line)["answer"] for line in local.splitlines()}) > 1
    code, out, err = run("batch", questions, *options, *there)
    assert (code, out) == (0, local) and "8 questions, 8 of images encoded already" in err
    results = tmp_path / "results.jsonl"
    results.write_text("".join(local.splitlines(keepends=True)[:3]))
    code, _, err = run("batch", questions, *options, *there, "--resume", results)
    assert code == 0 and results.read_text() == local and "5 questions, 3 done before" in err


def test_lines_that_fail_and_a_server_that_ends(run, stub, questions, tmp_path):
    vllm, url = stub
    call = ("batch", questions, "--tokens", 5, "--positions", "compact", "--engine", "vllm", "--server", url)
    expected = [json.loads(line) for line in run(*call)[1].splitlines()]
    vllm.refusals = {"why": (400, "no reasons"), "cat": (500, "no cats")}
    code, out, err = run(*call)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and "4 lines failed" in err
    assert [line.get("error", line.get("answer")) for line in lines] == [
        f"{url}: {reason}" if (reason := {2: "no reasons", 3: "no cats"}.get(n % 4)) else expected[n]["answer"]
        for n in range(8)
    ]
    assert run(*call, "--fail-fast")[0] == 2
    vllm.refusals = {"cat": (503, "it shuts down")}
    results = tmp_path / "results.jsonl"
    code, _, err = run(*call, "-o", results)
    kept = results.read_text()
    assert code == 1 and "it shuts down" in err and 0 < kept.count("\n") < 8
    vllm.refusals = {}
    code, _, err = run(*call, "--resume", results)
    assert code == 0 and [json.loads(line) for line in results.read_text().splitlines()] == expected


def test_a_line_with_a_share_that_vllm_cant_follow_fails_alone(run, stub, questions, tmp_path):
    _, url = stub
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    lines[5]["keep"] = 0.5
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, err = run("batch", questions, "--keep", 1.0, "--engine", "vllm", "--server", url)
    results = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and "1 line failed" in err
    assert [number for number, result in enumerate(results) if "error" in result] == [5] and len(results) == 8
    assert results[5]["error"] == "--positions original: vLLM numbers tokens without gaps; take --positions compact"


def test_what_is_under_way_ends_when_nobody_waits_for_it(monkeypatch):
    monkeypatch.setattr(vllm_http, "ANSWER_SECONDS", 30.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = VllmServer(f"http://127.0.0.1:{silent.getsockname()[1]}")
        answer = partial(server.answer, {}, [])
        results = send_all(server, [("first", BadInput("no")), *[("next", answer)] * 3], 2)
        assert next(results)[0] == "first"
        signal.signal(signal.SIGINT, signal.default_int_handler)
        start = time.monotonic()
        threading.Timer(0.5, signal.pthread_kill, [threading.get_ident(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            next(results)
        assert time.monotonic() - start < 15
        with pytest.raises(ServerFault, match="interrupted"):
            answer()


def test_a_server_that_hangs_up_is_an_error_and_no_signal_that_ends_the_command(
    run, stub, sets, questions, monkeypatch
):
    _, url = stub
    heeded = []

    def connect(address):
        heeded.append(signal.getsignal(signal.SIGPIPE))
        return http_connection(address)

    monkeypatch.setattr(vllm_http, "http_connection", connect)
    assert run("export", sets[0], "--to", "vllm", "--serve", url)[0] == 0
    assert run("batch", questions, "--positions", "compact", "--engine", "vllm", "--server", url)[0] == 0
    assert len(heeded) > 2 and set(heeded) == {signal.SIG_IGN}


def test_what_vllm_cant_do_is_refused_before_any_work(run, stub, questions, tiny_llava):
    vllm, url = stub

    def fails(*options, command="batch", what=questions):
        code, out, err = run(command, what, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    there = ("--engine", "vllm", "--server", url)
    compact = ("--positions", "compact")
    assert "--positions original: vLLM numbers tokens without gaps; take --positions compact" in fails(*there)
    assert "--ilp 0.5: prunes inside the language model" in fails(*there, *compact, "--ilp", 0.5)
    assert "--method fastv: prunes inside" in fails(*there, "--method", "fastv")
    assert "--generation top_p: vLLM answers greedily" in fails(*there, *compact, "--generation", "top_p=0.9")
    assert "--engine vllm: needs --server" in fails("--engine", "vllm")
    assert "--engine vllm: needs --server" in fails(*there, "--no-server")
    assert "--workers: only with --engine ray" in fails(*there, "--workers", 2)
    assert "not http://HOST:PORT" in fails("--engine", "vllm", "--server", "unix:/x")
    assert "'local', 'ray'" in fails("--engine", "vllm", command="encode", what=questions.parent / "0.png")
    vllm.root = "another/model"
    assert f"serves {MODEL}, not {tiny_llava}" in fails(*there, *compact)
    assert not vllm.bodies

"""`gridprune chat`: through a pipe, at a terminal, and interrupted."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import time
from pathlib import Path

import pytest
from forked import Command
from served import SAMPLES

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.questions import Exchange
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import load_pruned

SCENE, OTHER = SAMPLES / "scene-1.png", SAMPLES / "scene-2.png"
QUESTIONS = ["Which object has the T?", "What colour is it?", "How many stars are there?"]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline("scenes")


@pytest.fixture
def chat(command):
    """Has a conversation of these lines: (exit code, stdout, stderr)."""
    return lambda *lines, images=(SCENE,), options=(): command(
        "chat", *images, *options, stdin="\n".join(lines).encode("utf-8", "surrogateescape")
    )


def converse(pipeline, *questions, pruning=None, pin=False, images=(SCENE,), **settings):
    """The answers of a conversation, each asked anew with what was said before."""
    history, answers = [], []
    for question in questions:
        of_turn = Pruning(query=questions[0]) if pin else pruning or Pruning()
        answers.append(pipeline.ask(images, question, of_turn, history=history, **settings))
        history.append(Exchange(question, answers[-1].text, 0 if history else len(images)))
    return answers


def test_answers_go_through_a_pipe(chat, pipeline):
    expected = converse(pipeline, *QUESTIONS, system="Be short.")
    code, out, err = chat(QUESTIONS[0], "", f"  {QUESTIONS[1]}\r", QUESTIONS[2], options=["--system", "Be short."])
    assert (code, out.splitlines()) == (0, [answer.text for answer in expected])
    assert re.fullmatch(r"(28 of 256 visual tokens, \d+\.\d\d s\n){3}", err)
    assert chat(*QUESTIONS, options=["-q", "--stream", "--system", "Be short."]) == (0, out, "")


@pytest.mark.parametrize("pin", [False, True], ids=["each turn anew", "pinned"])
def test_each_turn_is_pruned_for_its_question_or_as_the_first(chat, pipeline, pin):
    expected = converse(pipeline, *QUESTIONS, pin=pin, images=(SCENE, OTHER))
    code, out, _ = chat(*QUESTIONS, images=(SCENE, OTHER), options=["--json", *(["--pin"] if pin else [])])
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["cache"] for record in records] == [["miss", "miss"], ["hit", "hit"], ["hit", "hit"]]
    for record, answer in zip(records, expected, strict=True):
        for times in (record, wanted := answer.to_json()):
            del times["ms"], times["cache"]
        assert record == json.loads(json.dumps(wanted))
    kept = [answer.pruned.kept.tolist() for answer in expected]
    assert (kept[0] == kept[1] == kept[2]) is pin
    if not pin:
        assert kept[1] == pipeline.prune([SCENE, OTHER], QUESTIONS[1]).kept.tolist()


def test_images_are_encoded_with_the_signals_that_the_method_needs(chat, pipeline):
    pruning = Pruning(method=make_method("hiprune"))
    (answer,) = converse(pipeline, QUESTIONS[0], pruning=pruning)
    code, out, _ = chat(QUESTIONS[0], options=["--method", "hiprune"])
    assert (code, out) == (0, f"{answer.text}\n")


def test_a_named_query_goes_before_the_pinned_one(chat, pipeline):
    (expected,) = converse(pipeline, QUESTIONS[0], pruning=Pruning(query="the star"))
    _, out, _ = chat(*QUESTIONS, options=["--pin", "--query", "the star", "--json"])
    assert {tuple(json.loads(line)["positions"]) for line in out.splitlines()} == {
        tuple(expected.to_json()["positions"])
    }


def test_commands(chat, command, pipeline, tmp_path):
    saved = tmp_path / "a set"
    first, _, last = converse(pipeline, *QUESTIONS)
    code, out, err = chat(
        *("/help", QUESTIONS[0], "/show", QUESTIONS[1], "/keep 0.5", QUESTIONS[2], f"/save {saved}", "/quit", "never")
    )
    assert code == 0
    assert re.findall(r"(\d+) of 256", err) == ["28", "28", "128"]
    assert "/save FILE" in err and "keeping 0.5 from now on" in err
    assert command("show", SCENE, QUESTIONS[0])[1] in err
    pruned, answers = load_pruned(saved), out.splitlines()
    assert len(answers) == 3 and answers[0] == first.text
    assert len(pruned.kept) == 128 and len(pruned.input_ids) == len(last.pruned.input_ids) + 100
    assert command("generate", saved)[:2] == (0, answers[2] + "\n")


def test_what_can_t_be_done_takes_a_line_and_the_conversation_goes_on(chat, pipeline, tmp_path):
    first, second = converse(pipeline, *QUESTIONS[:2])
    lines = {
        "/show": "/show: nothing was answered yet",
        "/save x": "/save: nothing was answered yet",
        "/keep 1.5": "/keep 1.5: needs a share",
        "/keep nan": "/keep nan: needs a share",
        "/keep": "/keep: needs a share",
        "/save": "/save: needs a file",
        f"/save {tmp_path}": f"/save {tmp_path}: a folder",
        f"/save {tmp_path}/no/set": f"/save {tmp_path}/no/set: there is no folder",
        "/quit now": "/quit: takes nothing",
        "/nothing \x1b[2J": "/nothing: no command; /help lists them",
        "x" * 70_000: "the question has 70000 characters",
        "word " * 9000: "the prompt takes",
        "an <image>": "leave it out",
    }
    code, out, err = chat(QUESTIONS[0], *list(lines)[2:], QUESTIONS[1])
    faults = [line for line in err.splitlines() if line.startswith("warning")]
    assert code == 3 and out.splitlines() == [first.text, second.text]  # what failed is no turn
    for fault, expected in zip(faults, [*list(lines.values())[2:], "11 lines failed"], strict=True):
        assert expected in fault
    code, out, err = chat(*list(lines)[:2], options=["-q"])
    assert (code, out) == (3, "") and all(expected in err for expected in list(lines.values())[:2])
    assert "/show: draws one image, not several" in chat(QUESTIONS[0], "/show", images=(SCENE, OTHER))[2]
    assert chat("\udcff\udcfe", options=["-q"])[0] == 0  # no UTF-8


@pytest.mark.parametrize(
    "images, options, reason",
    [
        (["missing.png"], [], "missing.png: no such file"),
        ([__file__], [], "not an image that can be read"),
        (["-"], [], "stdin is for the questions"),
        ([SAMPLES / "hills.jpg"], [], "no scene"),
        ([SCENE], ["--pin", "--ilp", "0.5"], "--pin: not with --ilp"),
        ([SCENE], ["--pin", "--method", "fastv"], "--pin: not with --method fastv"),
        ([SCENE], ["--keep", "0"], "--keep 0"),
        ([SCENE], ["--system", "x" * 70_000], "at most"),
    ],
)
def test_what_no_conversation_can_begin_with_is_refused(chat, images, options, reason):
    code, out, err = chat(QUESTIONS[0], images=images, options=options)
    assert (code, out, err.count("\n")) == (2, "", 1) and reason in err


def test_an_interrupted_answer_is_no_end(chat, pipeline, monkeypatch):
    """What was shown of it stays in the conversation, and nothing where nothing was."""
    ask, histories = Pipeline.ask, []

    def stop(pipeline, images, question, *rest, stream=None, history=(), **settings):
        histories.append([*history])
        if question == "stop":
            if stream:
                stream.write("half an ")
            raise KeyboardInterrupt
        return ask(pipeline, images, question, *rest, stream=stream, history=history, **settings)

    monkeypatch.setattr(Pipeline, "ask", stop)
    code, out, err = chat(QUESTIONS[0], "stop", QUESTIONS[1])
    assert code == 0 and out.splitlines() == [answer.text for answer in converse(pipeline, *QUESTIONS[:2])]
    assert err.count("stopped;") == 1
    histories.clear()
    code, out, _ = chat("stop", QUESTIONS[0], options=["--stream"])
    assert code == 0 and out.startswith("half an ") and histories[1] == [Exchange("stop", "half an", 1)]


LONG = ("--max-new-tokens", "1500", "--generation", "min_new_tokens=1500")


class Terminal:
    """What a command shows at a terminal, read up to what is waited for."""

    def __init__(self, number: int):
        self.number, self._shown = number, b""

    def wait_for(self, pattern: bytes, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self._shown)):
            if not select.select([self.number], [], [], max(0, end - time.monotonic()))[0]:
                raise TimeoutError(self._shown)
            self._shown += os.read(self.number, 4096)
        self._shown = self._shown[match.end() :]

    def interrupt_line(self, process: Command) -> None:
        """Ctrl-C until a line is begun anew: Python's `input` does not see one that comes before it waits for a key."""
        self.wait_for(b"> ")
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(TimeoutError):
                return self.wait_for(b"\n", 5)
        raise AssertionError("no Ctrl-C begins the line anew")

    def type(self, line: bytes) -> None:
        self.wait_for(b"> ")
        os.write(self.number, line)


def test_ctrl_c_at_a_terminal(server):
    ours, theirs = pty.openpty()
    process = server.start("chat", SCENE, "--pin", *LONG, streams=(theirs,) * 3)
    os.close(theirs)
    terminal = Terminal(ours)
    terminal.interrupt_line(process)  # the line is begun anew
    for question in (b"Which object has the T?\n", b"And now?\n"):
        terminal.type(question)
        terminal.wait_for(rb"\?\r\n\w+ \w+")  # the answer has begun
        process.send_signal(signal.SIGINT)
        terminal.wait_for(b"stopped;")
    terminal.type(b"/keep 0\n")
    terminal.wait_for(b"needs a share")
    terminal.type(b"\x04")
    assert process.wait(60) == 0
    os.close(ours)


def test_ctrl_c_where_nothing_is_asked_ends_a_pipe(server, tmp_path):
    reader, writer = os.pipe()
    out_reader, out_writer = os.pipe()
    with open(tmp_path / "err", "wb") as err:
        process = server.start("chat", SCENE, "-q", streams=(reader, out_writer, err.fileno()))
    os.close(reader), os.close(out_writer)
    os.write(writer, QUESTIONS[0].encode() + b"\n")
    assert os.read(out_reader, 100) == b"red star\n"  # before the next line is there
    while process.poll() is None:  # the first may come while the answer is still being reported
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.wait(60) == 130 and Path(tmp_path / "err").read_text() == ""
    os.close(writer), os.close(out_reader)

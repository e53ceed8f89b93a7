"""Renders a checkpoint's chat template within bounds of time, memory and length.

A chat template is a program by whoever published the checkpoint. The sandbox of transformers keeps it from files and
from Python, but lets it loop and build texts of any length, some of them in one call of C that nothing in the same
process can stop, and some while it is still compiled. So it is compiled and rendered in a process of its own, which is
started at the first prompt, serves all that follow, and is killed by the system when a prompt takes too long.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from gridprune_cli import bounded
from gridprune_cli.errors import BadInput

MAX_SECONDS = 5.0  # for one prompt, by the clock; templates of published models take milliseconds
MAX_MEMORY = 1 << 29  # bytes of address space beyond what the process takes before it has seen a template
MAX_LENGTH = 1 << 20  # characters of a prompt; the longest question and system message together have an eighth of them

_MAX_REASON = 200  # characters of the message of an error, which a template can raise by itself
_OUT_OF_MEMORY = 3  # exit code of the process

_lock = threading.Lock()  # one prompt at a time
_process: "subprocess.Popen[bytes] | None" = None


def render(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    """The prompt that a template renders from messages, in this process: for templates that are known to be harmless.

    `tokens` are the tokenizer's special tokens by name, which templates write.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **tokens)
    return cast(str, texts[0])


def render_apart(template: str, messages: Sequence[Mapping[str, Any]], tokens: Mapping[str, str]) -> str:
    """`render` within the bounds, for templates that come with a checkpoint. Threads may call it.

    Raises BadInput, with the reason alone, where the template fails or goes beyond a bound.
    """
    global _process
    request = json.dumps([template, messages, tokens]).encode() + b"\n"
    with _lock:
        if _process is None or _process.poll() is not None:
            _process = _start()
        try:
            reply = _exchange(_process, request)
        except BaseException:  # such as a Ctrl-C: what it writes later must not be taken for the next prompt
            _stop()
            raise
        if not reply.endswith(b"\n"):  # it ended
            code = _process.wait()
            if code == -signal.SIGALRM:
                raise BadInput(f"it takes more than {MAX_SECONDS:g} s")
            if code == _OUT_OF_MEMORY:
                raise BadInput(f"it takes more than {MAX_MEMORY >> 20} MiB of memory")
            raise BadInput(f"its process ended with {code}")
    answer: dict[str, str] = json.loads(reply)
    if "fault" in answer:
        raise BadInput(answer["fault"])
    return answer["text"]


def _exchange(process: "subprocess.Popen[bytes]", request: bytes) -> bytes:
    """The line that the process answers; less than a line where it ends before."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.write(request)
        process.stdin.flush()
    return process.stdout.readline()


def _start() -> "subprocess.Popen[bytes]":
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    paths = [os.path.abspath(path) for path in sys.path]
    # in a session of its own: a Ctrl-C is for this process, which kills the other where it waits for it
    return bounded.start(__name__, MAX_SECONDS, MAX_MEMORY, paths=paths, start_new_session=True, **pipes)


def _stop() -> None:
    """Ends the process, where there is one."""
    global _process
    if _process is not None:
        _process.kill()
        _process.communicate()
        _process = None


def _forget() -> None:
    """In the child of a fork: the process answers the parent."""
    global _process, _lock
    _process, _lock = None, threading.Lock()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)


# ---- in the process --------------------------------------------------------------------------------------------------


def serve(seconds: float, memory: int) -> None:
    """Answers lines of stdin on stdout, until the one who started it is gone."""
    import resource

    import transformers.utils.chat_template_utils  # noqa: F401  # neither its time nor its memory is the template's

    with suppress(OSError):  # no /proc
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bounded.limit(AS=pages * resource.getpagesize() + memory)
    for request in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # whose signal ends the process, also within a call of C
        try:
            reply = json.dumps(_answer(request)).encode() + b"\n"
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()


def _answer(request: bytes) -> dict[str, str]:
    try:
        text = render(*json.loads(request))
    except MemoryError:
        raise
    except Exception as fault:  # a template can bring about nearly every one
        reason = " ".join(str(fault)[:_MAX_REASON].split())
        return {"fault": reason or type(fault).__name__}
    if len(text) > MAX_LENGTH:
        return {"fault": f"it makes {len(text):,} characters of this question, more than {MAX_LENGTH:,}"}
    return {"text": text}

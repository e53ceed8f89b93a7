"""`gridprune` in processes of its own without importing torch each time: they are forked from one that has imported it.

A command started here differs from `python -m gridprune_cli` in that alone: it has its own pid, streams, environment
and working folder, gets signals, and runs what Python runs at its end. `forked.py ADDRESS ARGUMENT...` is such a
command for shell scripts.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STREAMS = (0, 1, 2)


class Command:
    """A running command, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        address: str,
        arguments: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        streams: Sequence[int | None] = STREAMS,
        script: str | Path | None = None,
    ):
        """`streams`: the file descriptors that become its stdin, stdout and stderr; None is a stream that is closed.

        `script`: a program in Python that is run with these arguments in place of `gridprune`.
        """
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(address)
        request = {"arguments": [*arguments], "cwd": str(cwd or os.getcwd()), "env": dict(env or os.environ)}
        request["script"] = script and str(script)
        data = json.dumps(request | {"streams": [stream is not None for stream in streams]}).encode()
        socket.send_fds(
            self._server, [struct.pack("!i", len(data))], [stream for stream in streams if stream is not None]
        )
        self._server.sendall(data)
        self.pid = self._number()

    def _number(self) -> int:
        return struct.unpack("!i", self._server.recv(4, socket.MSG_WAITALL))[0]

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code; where a signal ended it, minus its number. Raises TimeoutError after `timeout` seconds."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise TimeoutError(f"the command has not ended within {timeout} s")
            self.returncode = self._number()
            self._server.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that commands are forked from."""

    def __init__(self, folder: Path):
        """`folder`: an empty one, of a short path, for the socket and the program `gridprune`."""
        self.address = str(folder / "socket")
        paths = (Path(__file__).parent, Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import forked; forked.serve({self.address!r})"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
            stdin=subprocess.PIPE,  # which is closed when this process ends, however it does
        )
        while not os.path.exists(self.address):
            if self._process.poll() is not None:
                raise RuntimeError("the process that commands are forked from has ended")
            time.sleep(0.01)
        self.program = folder / "gridprune"
        self.program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "{__file__}" "{self.address}" "$@"\n')
        self.program.chmod(0o755)

    def start(self, *arguments: object, **options: object) -> Command:
        return Command(self.address, [*map(str, arguments)], **options)  # type: ignore[arg-type]

    def close(self) -> None:
        self._process.communicate()


def serve(address: str) -> None:
    """Forks a command for every request, until stdin is closed."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"  # as the command sets it before it imports transformers
    _import()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + ".new")
    listener.listen()
    gc.freeze()  # so that no child copies memory only to look through it
    os.rename(address + ".new", address)
    waiting: set[int] = set()  # the processes that wait for a command each
    while True:
        if 0 in select.select([0, listener], [], [])[0]:
            return
        client, _ = listener.accept()
        waiting -= {pid for pid in waiting if os.waitpid(pid, os.WNOHANG)[0]}
        if not (pid := os.fork()):
            listener.close()
            break
        waiting.add(pid)
        client.close()
    length, streams, _, _ = socket.recv_fds(client, 4, len(STREAMS))
    request = json.loads(client.recv(struct.unpack("!i", length)[0], socket.MSG_WAITALL))
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        client.sendall(struct.pack("!i", pid))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        client.sendall(struct.pack("!i", status))
        os._exit(0)
    client.close()
    _run(request, streams)


def _import() -> None:
    """Imports what the commands import when they answer."""
    from transformers import (  # noqa: F401
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPModel,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    import gridprune_cli.cli.app
    import gridprune_cli.generation
    import gridprune_cli.pipeline
    import gridprune_cli.runners.local
    import gridprune_cli.vlm.llava  # noqa: F401


def _run(request: dict, received: list[int]) -> None:
    """Runs a command in this process, with its streams as Python opens them at its start."""
    for number, is_open in zip(STREAMS, request["streams"], strict=True):
        if is_open:
            os.dup2(received[0], number)
            os.close(received.pop(0))
        else:
            os.close(number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    streams: list[Any] = [
        open(number, mode, 1, encoding, errors, closefd=False) if is_open else None  # noqa: SIM115
        for number, mode, errors, is_open in zip(
            STREAMS, "rww", ("strict", "strict", "backslashreplace"), request["streams"], strict=True
        )
    ]
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = streams
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["gridprune", *request["arguments"]]
    code: object = 0
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            runpy.run_module("gridprune_cli", run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    # as Python ends, but for the clearing of modules, which would copy all memory that is shared with the server
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _open_streams() -> list[int | None]:
    """This process's own streams, None for those that are closed."""
    streams: list[int | None] = []
    for number in STREAMS:
        try:
            os.fstat(number)
            streams.append(number)
        except OSError:
            streams.append(None)
    return streams


if __name__ == "__main__":
    code = Command(sys.argv[1], sys.argv[2:], streams=_open_streams()).wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)

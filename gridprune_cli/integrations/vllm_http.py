"""Pruned sets answered by a running vLLM: selection here, generation there.

The server gets image embeds as parts of a chat message and writes the prompt itself, by the model's chat template. A
set whose prompt is another one, such as one with a system message, is sent with its prompt as a template. Either way
the server returns the token ids that it answered from, and an answer from others than the set's is an error.
"""

import http.client
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from gridprune_cli.client.connection import http_connection, parse_address, request_headers
from gridprune_cli.client.protocol import ServerFault
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.integrations.vllm import to_vllm
from gridprune_cli.runners.batches import in_order
from gridprune_cli.runners.local import Pruned, Reply, Runner
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.family import Family

if TYPE_CHECKING:
    from gridprune_cli.vlm.checkpoint import Checkpoint

T = TypeVar("T")

ANSWER_SECONDS = 600.0  # for one answer, which may wait for others in the server


@dataclass(frozen=True)
class VllmAnswer:
    """What vLLM answered from a pruned set: the text, and its token ids with the end token."""

    text: str
    ids: tuple[int, ...]


class VllmServer:
    """A running vLLM. Threads may share it.

    url    http://HOST:PORT, which may end in /v1
    key    what it was started with as --api-key
    field  the setting that named it, for errors
    """

    def __init__(self, url: str, key: str | None = None, *, field: str = "server"):
        wrong = BadInput("not http://HOST:PORT or https://HOST", field=field, value=url)
        try:
            self._address = parse_address(url)
        except BadInput as fault:
            raise wrong from fault
        if self._address.socket is not None:
            raise wrong
        self._key = key
        self._open: set[socket.socket] = set()
        self._lock, self._closed = Lock(), False

    def close(self) -> None:
        """Ends all requests that are on their way, and with them the server's work on them. None can follow."""
        with self._lock:
            self._closed = True
            for open_socket in self._open:
                with suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads from it

    def find_model(self, checkpoint: "Checkpoint") -> str:
        """The name by which the server has a model. Raises BadInput where it serves others only.

        A server says of a model under which names it is asked for, and from which folder or repository it came.
        """
        served = self._exchange("GET", "/v1/models").get("data") or []
        names = {checkpoint.name, checkpoint.repo}
        folder = os.path.realpath(checkpoint.folder)
        for model in served:
            root = model.get("root") or model["id"]
            if model["id"] in names or root in names or os.path.realpath(root) == folder:
                return model["id"]
        others = ", ".join(model["id"] for model in served)
        raise BadInput(
            f"serves {others or 'no model'}, not {checkpoint.name}; if it is the same, start it with "
            f"--served-model-name {checkpoint.name}",
            place=self._address.name,
        )

    def answer(self, chat: Mapping[str, Any], prompt: Sequence[int]) -> VllmAnswer:
        """The answer to a chat, as `write_chat` gives it, whose prompt has these token ids.

        Raises ServerFault where there is no answer, GridpruneError where the server answered from another prompt.
        """
        reply = self._exchange("POST", "/v1/chat/completions", chat)
        try:
            (choice,) = reply["choices"]
            text, ids, answered = choice["message"]["content"], choice["token_ids"], reply["prompt_token_ids"]
            answer = VllmAnswer((text or "").strip(), tuple(ids))
        except (KeyError, TypeError, ValueError) as fault:
            raise self._fault("answered without token ids, as a vLLM from 0.32 on gives them") from fault
        if answered != list(prompt):
            raise GridpruneError(
                f"{self._address.name} made another prompt of it, of {len(answered)} tokens for {len(prompt)}; start "
                "the server with the model's own chat template"
            )
        return answer

    def _exchange(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The object that the server gives for a request. Raises ServerFault where it gives none."""
        connection = http_connection(self._address)
        open_socket = None
        try:
            try:
                connection.connect()
            except OSError as error:
                reason = f"can't be reached ({_reason(error)}); start it with `vllm serve MODEL --enable-mm-embeds`"
                raise self._fault(reason) from error
            open_socket = connection.sock  # which the connection forgets once a response is there
            open_socket.settimeout(ANSWER_SECONDS)
            with self._lock:
                if self._closed:
                    raise self._fault("interrupted")
                self._open.add(open_socket)
            data = None if body is None else json.dumps(body, allow_nan=False).encode("ascii")
            connection.request(method, path, data, request_headers(self._key))
            response = connection.getresponse()
            content, status = response.read(), response.status
        except (OSError, http.client.HTTPException) as error:
            raise self._fault(f"ended the connection before it had answered ({_reason(error)}); see its log") from error
        finally:
            with self._lock:
                self._open.discard(open_socket)
            connection.close()
        try:
            value = json.loads(content)
            if status == 200 and isinstance(value, dict):
                return value
            message = " ".join(str(value["error"]["message"]).split())
        except (ValueError, KeyError, TypeError):
            message = f"answered {path} with status {status} and no object that a vLLM would give"
        if status == 401:
            message += "; give its `api_key`"
        raise self._fault(message, status)

    def _fault(self, reason: str, status: int | None = None) -> ServerFault:
        return ServerFault(reason, status=status, place=self._address.name)


def write_chat(family: Family, pruned: PrunedSet, model: str, max_new_tokens: int) -> dict[str, Any]:
    """The body of a request to which vLLM answers greedily from a pruned set, by the model of this name.

    Where the model's chat template makes the set's prompt of its question, the server's own is left to do so. Another
    prompt goes as a template in itself, which the server takes if it was started with --trust-request-chat-template.

    Raises BadInput as `to_vllm` does, and for a prompt whose text gives other tokens, as few tokenizers' do.
    """
    request = to_vllm(family, pruned)
    tokenizer, ids = family.processor.tokenizer, request.prompt_token_ids.tolist()
    body = {"model": model, "temperature": 0, "max_tokens": max_new_tokens, "return_token_ids": True}
    content = request.parts()
    # 1. the chat template's
    try:
        text = family.write_text(pruned.question, len(pruned.images), None)
    except BadInput:  # it has none
        text = ""
    special = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    if text and tokenizer(text, add_special_tokens=special, verbose=False).input_ids == ids:
        content.append({"type": "text", "text": pruned.question})
        return body | {"messages": [{"role": "user", "content": content}], "add_special_tokens": special}
    # 2. another one
    literal = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if tokenizer(literal, add_special_tokens=False, verbose=False).input_ids != ids:
        raise BadInput("its prompt as a text gives other tokens, so it can't go over HTTP; use vLLM's own process")
    template = {"chat_template": "{{ literal_prompt }}", "chat_template_kwargs": {"literal_prompt": literal}}
    return body | template | {"messages": [{"role": "user", "content": content}], "add_special_tokens": False}


def as_job(
    server: VllmServer, family: Family, pruned: PrunedSet, model: str, max_new_tokens: int
) -> Callable[[], VllmAnswer] | GridpruneError:
    """What a thread has to do for the answer from a set, or why it can't be sent."""
    try:
        chat = write_chat(family, pruned, model, max_new_tokens)
    except GridpruneError as fault:
        return fault
    return partial(server.answer, chat, pruned.input_ids.tolist())


def send_all(
    server: VllmServer, jobs: Iterable[tuple[T, Callable[[], VllmAnswer] | GridpruneError]], at_once: int
) -> Iterator[tuple[T, VllmAnswer | GridpruneError]]:
    """What comes of each job, or the error that stands in its place, in turn, with `at_once` of them under way.

    vLLM makes its batches from these. Raises ServerFault where every other request would fail the same way. Then, and
    where nobody waits for the rest, the server is closed: requests under way end at once.
    """
    threads = ThreadPoolExecutor(at_once)
    in_flight: deque[tuple[T, Future[VllmAnswer] | GridpruneError]] = deque()

    def receive() -> tuple[T, VllmAnswer | GridpruneError]:
        name, result = in_flight[0]
        if isinstance(result, Future):
            try:
                answer: VllmAnswer | GridpruneError = result.result()
            except GridpruneError as fault:
                if isinstance(fault, ServerFault) and fault.for_all:
                    raise
                answer = fault
        else:
            answer = result
        in_flight.popleft()  # what was waited for in vain is under way as before
        return name, answer

    def ready() -> bool:
        future = in_flight[0][1]
        return isinstance(future, GridpruneError) or future.done() or len(in_flight) > at_once

    try:
        for name, job in jobs:
            in_flight.append((name, job if isinstance(job, GridpruneError) else threads.submit(job)))
            while in_flight and ready():
                yield receive()
        while in_flight:
            yield receive()
    except BaseException:
        if in_flight:
            server.close()
        raise
    finally:
        threads.shutdown(cancel_futures=True)


def check_pruning(pruning: Pruning) -> None:
    """Raises BadInput for a pruning that vLLM can't follow: one prompt for all layers, positions in turn."""
    if pruning.ilp is not None or pruning.method.inner:
        field, value = ("ilp", pruning.ilp) if pruning.ilp is not None else ("method", pruning.method.name)
        raise BadInput("prunes inside the language model, which vLLM can't do; leave it out", field=field, value=value)
    if pruning.positions == "original" and (pruning.keep < 1 or pruning.tokens is not None):
        reason = "vLLM numbers tokens without gaps; take `positions=compact`"
        raise BadInput(reason, field="positions", value="original")


@dataclass(frozen=True)
class Vllm:
    """Answers requests with a running vLLM, as `Runner.answer` does with a model of this process."""

    server: VllmServer
    starts_once: ClassVar[bool] = False  # requests may come in several calls of `answer`

    def answer(
        self, runner: Runner, requests: Sequence[Request], *, max_new_tokens: int = 128, **options: Any
    ) -> Iterator[Reply | GridpruneError]:
        """Encodes, localises and prunes here, and has vLLM answer: each answer, or its error, in turn.

        Raises BadInput for what vLLM can't do for any request, and for a server with another model; ServerFault where
        the server fails. A pruning as of `check_pruning` fails for its own request.
        """
        # 1. what would fail for every request
        family = runner.family
        if options:
            raise BadInput("vLLM answers greedily here; leave it out", field="generation", value=next(iter(options)))
        if family.vllm:
            kind = family.checkpoint.family
            raise BadInput(f"can't answer for model type {kind}: {family.vllm}", field="engine", value="vllm")
        model = self.server.find_model(family.checkpoint)

        # 2. pruned sets go out as they come, in no order
        def jobs() -> Iterator[tuple[tuple[int, Pruned | None], Callable[[], VllmAnswer] | GridpruneError]]:
            possible: list[int] = []  # indices of requests
            for index, request in enumerate(requests):
                try:
                    check_pruning(request.pruning)
                    possible.append(index)
                except BadInput as fault:
                    yield (index, None), fault
            for place, pruned in runner.prune([requests[index] for index in possible], with_prefix=False):
                index = possible[place]
                if isinstance(pruned, GridpruneError):
                    yield (index, None), pruned
                else:
                    yield (index, pruned), as_job(self.server, family, pruned.pruned, model, max_new_tokens)

        def replies() -> Iterator[tuple[int, Reply | GridpruneError]]:
            for (index, pruned), answer in send_all(self.server, jobs(), runner.batch_sizes[1]):
                if isinstance(answer, GridpruneError):
                    yield index, answer
                else:
                    assert pruned is not None
                    yield index, Reply(answer.text, pruned.pruned.to_json(), pruned.hit, pruned.image_notes)

        return in_order(replies())


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "it gave no sign for too long"
    return (getattr(error, "strerror", None) or str(error).partition("\n")[0]) or type(error).__name__

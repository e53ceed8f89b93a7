"""Lines of questions, `{"image": ..., "question": ...}` a line: read, and matched with the results of an earlier run.

`batch`, `prune --batch` and `eval` read them here, within the bounds below. Nothing here needs torch.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any, BinaryIO, TypeVar

from gridprune_cli.cache.files import canonical, deeper, digest
from gridprune_cli.errors import BadInput

MAX_LINE = 1 << 20  # bytes; some 100 pages of text beside a question, and 1,000 such lines fit in memory
MAX_DEPTH = 100  # levels of lists and objects in a line; Python's own limit lies near 1,000 and moves with the caller
MAX_QUESTION = 1 << 16  # characters, some 16,000 tokens: longer ones take seconds to tokenize and to match
MAX_CONVERSATION = 8 * MAX_QUESTION  # characters of all earlier turns: more tokens than most models have positions
MAX_IMAGES = 64  # of one question, all of which are held until it is answered
_WINDOW_BYTES = 16 * MAX_LINE  # of lines that are processed together; parsed, they take up to 30 times as much
_QUEUE = 16  # lines that are read ahead
_MAX_RESULT = 16 * MAX_LINE  # bytes of a line of results: the line that it repeats, with escapes, and the answer

_KNOWN = ("id", "image", "question", "keep")  # names in a line; the others are `Item.extra`
_START = b'{"id": '  # of every line that `batch` writes
_GRACE = 0.02  # seconds that a line is waited for before work starts on those that are there

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """A question that was asked earlier in a conversation, and its answer.

    images  how many of the conversation's images came with it, behind those of the exchanges before it
    """

    question: str
    answer: str
    images: int = 0


@dataclass(frozen=True)
class Item:
    """A line. `fault` says what is wrong with it, and then only `id` and `place` need to be there.

    id        as given; else 16 hex digits of the sha256 of the line's content
    place     of the line, as in `questions.jsonl:7`
    images    paths as written in the line, one or several
    keep      the share of visual tokens to keep, for this line alone
    extra     what else the line holds, by name
    size      bytes of the line
    """

    id: Any
    place: str
    images: tuple[str, ...] = ()
    question: str = ""
    keep: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    fault: str | None = None
    size: int = 0

    def echo(self) -> dict[str, Any]:
        """The part of a result that repeats the line."""
        if not self.images:  # a line that could not be read
            return {"id": self.id}
        images = self.images[0] if len(self.images) == 1 else list(self.images)
        return {"id": self.id, "image": images, "question": self.question}


def parse(line: bytes, place: str) -> Item:
    """The item of a line, with a fault where it can't be asked. `place` is how the fault calls the line."""
    ident = digest(line.decode("latin-1"))[:16]
    if len(line.rstrip(b"\r\n")) > MAX_LINE:
        return Item(ident, place, fault=f"{place}: longer than {MAX_LINE} bytes; leave out what is no question")
    deep = f"{place}: nested more than {MAX_DEPTH} deep; write it flatter"
    try:
        value = json.loads(line, parse_constant=_refuse)
        if deeper(value, MAX_DEPTH):  # what is read here must be writable, and readable again from the results
            return Item(ident, place, fault=deep)
        ident = digest(value)[:16]
    except RecursionError:
        return Item(ident, place, fault=deep)
    except ValueError as error:
        return Item(ident, place, fault=f"{place}: not JSON ({error}); write an object a line")
    if not isinstance(value, dict):
        return Item(ident, place, fault=f'{place}: not an object; write {{"image": ..., "question": ...}}')
    image, question, keep = value.get("image"), value.get("question"), value.get("keep")
    line_id = value.get("id")
    if isinstance(line_id, dict | list | bool):
        return Item(ident, place, fault=f"{place}: id is no text and no number; change it, or leave it out")
    ident = ident if line_id is None else line_id
    images = (image,) if isinstance(image, str) else tuple(image) if isinstance(image, list) else ()
    if not images or not all(isinstance(name, str) and name for name in images):
        return Item(ident, place, fault=f"{place}: image is no path and no list of paths; name an image file")
    if "-" in images:
        return Item(ident, place, fault=f"{place}: image -: stdin is none of a line's images; name an image file")
    if not isinstance(question, str):
        return Item(ident, place, fault=f"{place}: question is no text; ask something")
    extra = {name: other for name, other in value.items() if name not in _KNOWN}
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1):
        fault = f"{place}: keep {repr(keep)[:40]}: must be above 0 and at most 1"
        return Item(ident, place, images, question, None, extra, fault)
    try:
        check_question(question, len(images))
    except BadInput as error:
        return Item(ident, place, images, question, keep, extra, str(error.at(place)))
    return Item(ident, place, images, question, keep, extra)


def check_question(question: str, images: int = 1) -> None:
    """Raises BadInput for a question that is empty, too long, no Unicode text as JSON can hold it, or of many images.

    The bounds are `MAX_QUESTION` and `MAX_IMAGES`.
    """
    if not question.strip():
        raise BadInput("the question is empty; ask something")
    check_text(question, "the question")
    if images > MAX_IMAGES:
        raise BadInput(f"the question is about {images} images; at most {MAX_IMAGES} can be asked about at once")


def check_history(history: Sequence[Exchange], images: int) -> None:
    """Raises BadInput for earlier turns that no prompt can hold, or that have more than the `images` there are."""
    for number, exchange in enumerate(history, 1):
        if not exchange.question.strip():
            raise BadInput(f"question {number} of the conversation is empty; ask something")
        check_text(exchange.question, f"question {number} of the conversation")
        check_text(exchange.answer, f"answer {number} of the conversation")
        if exchange.images < 0:
            raise BadInput(f"question {number} of the conversation has {exchange.images} images; count them from 0")
    if sum(exchange.images for exchange in history) > images:
        raise BadInput(f"the earlier questions have more images than the {images} that there are")
    length = sum(len(exchange.question) + len(exchange.answer) for exchange in history)
    if length > MAX_CONVERSATION:
        raise BadInput(
            f"the conversation has {length} characters; at most {MAX_CONVERSATION} can go on; begin a new one"
        )


def check_text(text: str, name: str) -> None:
    """Raises BadInput for a text of a prompt, called `name`, that is too long, or no Unicode text."""
    if len(text) > MAX_QUESTION:
        raise BadInput(f"{name} has {len(text)} characters; at most {MAX_QUESTION} can be asked")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"{name} holds half a character, a surrogate alone; write it whole, in UTF-8")


def cache_outcome(hits: Sequence[bool]) -> str | list[str]:
    """ "hit" or "miss", as results have it; of several images a list."""
    outcomes = ["hit" if hit else "miss" for hit in hits]
    return outcomes[0] if len(outcomes) == 1 else outcomes


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class Done:
    """The results that an earlier run wrote to a file, whose lines are skipped. A torn last line is removed first.

    As long as lines are looked up in the order of the results, as when a run that was cut off is continued, the file is
    read along and nothing is held in memory; from the first that is not, the ids of the remaining results are.

    Raises BadInput where the file holds anything but results.
    """

    def __init__(self, path: Path):
        self.path, self.failed, self._line = path, 0, 0
        self._next: str | None = None  # id of the line that comes next
        self._rest: Counter[str] | None = None
        if not path.exists():  # nothing is done yet
            return
        self._file = _open(str(path))
        start = self._file.read(len(_START))
        self._end = _whole(self._file)
        if not self._end and start != _START[: len(start)]:
            raise self._foreign(1)
        self._file.seek(0)
        self._next = self._read()  # raises for what is no result before anything is changed
        if self._end < os.path.getsize(path):
            os.truncate(path, self._end)

    def take(self, ident: Any) -> bool:
        """Whether a line of this id is done. Each line that was written counts for one that is asked for."""
        wanted = canonical(ident)
        if self._rest is None:
            if self._next is None:
                return False
            if self._next == wanted:
                self._next = self._read()
                return True
            self._rest = Counter()
            while self._next is not None:
                self._rest[self._next] += 1
                self._next = self._read()
        if not self._rest[wanted]:
            return False
        self._rest[wanted] -= 1
        return True

    def _read(self) -> str | None:
        """Id of the next line, as canonical JSON."""
        if self._file.tell() >= self._end:  # what follows is being written now
            return None
        self._line += 1
        line = self._file.readline(_MAX_RESULT)
        try:
            if not line.endswith(b"\n"):
                raise ValueError(f"longer than {_MAX_RESULT} bytes")
            record = json.loads(line)
            ident, failed = canonical(record["id"]), "error" in record
            if not failed and not isinstance(record["answer"], str):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError) as fault:
            raise self._foreign(self._line) from fault
        self.failed += failed
        return ident

    def _foreign(self, line: int) -> BadInput:
        reason = f"line {line} is no result of `gridprune batch`; name its output"
        return BadInput(reason, field="resume", value=self.path)


def _whole(file: BinaryIO) -> int:
    """Where the last whole line ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        at = file.read(end - start).rfind(b"\n")
        if at >= 0:
            return start + at + 1
        end = start
    return 0


class Reader:
    """The lines of a file, or of stdin for `-`, that are still to be done. `skipped` counts the others so far.

    `in_shard` says of an image, or of several joined by newlines, whether its lines are this process's; None: all are.
    """

    def __init__(self, path: str, *, done: Done | None = None, in_shard: Callable[[str], bool] | None = None):
        self.name = "stdin" if path == "-" else path
        self.plain = path != "-" and os.path.isfile(path)
        self.folder = Path(path).parent if self.plain else Path()
        self.skipped = 0
        self._done, self._in_shard = done, in_shard
        self._file = _stdin() if path == "-" else _open(path)

    def __iter__(self) -> Iterator[Item]:
        for number, line in enumerate(bounded_lines(self._file), 1):
            if not line.strip():
                continue
            item = replace(parse(line, f"{self.name}:{number}"), size=len(line))
            # questions about one image stay together
            if self._in_shard is not None and not self._in_shard("\n".join(item.images) or str(item.id)):
                continue
            if self._done is not None and self._done.take(item.id):
                self.skipped += 1
                continue
            yield item

    def place(self, image: str) -> str:
        """The path of an image of a line: relative ones start at the file's folder."""
        return str(self.folder / image)

    def count(self) -> int | None:
        """How many lines there are, blank ones left out; None where that can't be known before they are read."""
        if self._in_shard is not None or not self.plain:
            return None
        with open(self.name, "rb") as file:
            return sum(1 for line in bounded_lines(file) if line.strip())


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """Every line; of one that is longer than `MAX_LINE`, as many bytes as show that, and the rest is passed over."""
    while line := file.readline(MAX_LINE + 1):
        rest = line
        while len(rest) > MAX_LINE and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE + 1)
        yield line


def _open(path: str) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as fault:
        raise BadInput(f"can't be read ({fault.strerror}); check the path", place=path) from fault


def _stdin() -> BinaryIO:
    """stdin, opened anew: a thread that waits at Python's own object would block the end of the process."""
    if sys.stdin is None or sys.stdin.isatty():
        raise BadInput("nothing is piped into stdin; give lines of questions there", place="-")
    try:
        return open(os.dup(sys.stdin.fileno()), "rb")
    except OSError:  # no real file, as in tests
        return sys.stdin.buffer


def windows(lines: Iterable[T], most: int, size: Callable[[T], int] = lambda _: 0) -> Iterator[list[T]]:
    """Lists of up to `most` lines, as they come: a slow source is not waited for, and a fast one not read far ahead.

    A list ends early where no line comes for `_GRACE` seconds, or its lines, by `size`, have `_WINDOW_BYTES`. What the
    source raises is raised behind its last lines.
    """
    queue: Queue[tuple[T] | BaseException | None] = Queue(min(most, _QUEUE))

    def read() -> None:
        try:
            for line in lines:
                queue.put((line,))
            queue.put(None)
        except BaseException as fault:
            queue.put(fault)

    Thread(target=read, daemon=True).start()
    window: list[T] = []
    while True:
        try:
            got = queue.get(timeout=_GRACE if window else None)
        except Empty:
            yield window
            window = []
            continue
        if isinstance(got, tuple):
            window.append(got[0])
        full = len(window) == most or sum(map(size, window)) >= _WINDOW_BYTES
        if window and (full or not isinstance(got, tuple)):
            yield window
            window = []
        if isinstance(got, BaseException):
            raise got
        if got is None:
            return

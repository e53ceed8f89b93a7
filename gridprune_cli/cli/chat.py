"""`gridprune chat`: a conversation about images, at a terminal or through a pipe."""

import io
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from gridprune_cli.cache.files import write_atomic
from gridprune_cli.cli import options, remote
from gridprune_cli.cli.command import examples
from gridprune_cli.cli.describe import describe
from gridprune_cli.cli.drawing import figure_text, is_colour
from gridprune_cli.cli.output import check_target, emit_json, emit_text, put, say, set_quiet, stdout, warn
from gridprune_cli.client.remote import RemoteAnswer, RemotePipeline, RemoteRequest
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.image_files import NamedImage, read_image
from gridprune_cli.questions import Exchange, bounded_lines, check_text

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Answer, Pipeline
    from gridprune_cli.tokens import EncodedImage

_HELP = """\
/show         draw which tokens the latest answer had, and why
/keep SHARE   keep this share of the visual tokens from now on
/save FILE    write the pruned set of the latest answer
/help         these lines
/quit         end, as Ctrl-D does
Ctrl-C stops an answer. Everything else is a question."""


@examples(
    "gridprune chat street.png --model ./llava-1.5-7b",
    "gridprune chat street.png --pin --keep 0.3",
    "gridprune chat before.png after.png --json < questions.txt",
)
@options.takes(
    server=remote.server,
    pipeline=options.pipeline,
    pruning=options.pruning,
    generation=options.generation,
    hidden=options.RARE,
)
def chat(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Image files.", show_default=False)],
    pipeline: "Pipeline | RemotePipeline",
    pruning: Any,
    generation: dict[str, Any],
    pin: Annotated[
        bool,
        options.option(
            "Keep what the first question keeps, and go on from what the language model made of it.",
            options.PRUNING,
            "--pin",
        ),
    ] = False,
    system: options.System = None,
    stream: options.Stream = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask questions about images in turn: each is pruned for anew, and knows what was said before.

    A line is a question, or a command: `/help` lists these. In a pipe, answers go to stdout in the order of the lines.

    More options, taken here too: `gridprune batch --help`, `--stream/--no-stream`.
    """
    set_quiet(quiet)
    check_text(system or "", "`system`")
    if "-" in images:
        raise BadInput("stdin is for the questions; name an image file", place="-")
    if sys.stdin is None:
        raise BadInput("stdin is closed; give questions there, a line each", place="-")
    files = tuple(NamedImage(read_image(image), image) for image in images)
    beams = generation.get("num_beams") not in (None, 1)  # of which none is the answer before the end
    flows = not json and (stdout().isatty() and not beams if stream is None else stream)
    handler = signal.getsignal(signal.SIGINT)
    failed = 0
    with pipeline:
        conversation = _Conversation(pipeline, files, pruning, system, generation, pin)
        for line in _lines():
            try:
                if line.startswith("/"):
                    if not _obey(conversation, line):
                        break
                    continue
                shown = _Shown(stdout()) if flows else None
                answer = conversation.ask(line, shown)
                if json:
                    emit_json(answer.to_json())
                elif not flows:
                    emit_text(answer.text)
                _report(conversation, answer)
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, handler)  # which the first Ctrl-C has changed
                if sys.stderr.isatty() or flows:
                    print(file=sys.stderr)
                say("stopped; Ctrl-D ends the conversation")
            except GridpruneError as fault:
                failed += 1
                warn(describe(fault))
    if failed and not sys.stdin.isatty():
        warn(f"{failed} line{'s' * (failed != 1)} failed")
        raise typer.Exit(3)


@dataclass(frozen=True)
class _Latest:
    """The latest turn that was answered: its question, what was kept for it, and the turns before it."""

    question: str
    pruning: Any
    history: tuple[Exchange, ...]
    answer: "Answer | RemoteAnswer"


class _Conversation:
    """Images and what was said about them so far.

    pruning  of the next turn: `Pruning`, or options by name where a server does the work
    """

    def __init__(
        self,
        pipeline: "Pipeline | RemotePipeline",
        files: tuple[NamedImage, ...],
        pruning: Any,
        system: str | None,
        generation: dict[str, Any],
        pin: bool,
    ):
        """Has the images encoded. Raises BadInput where one can't be read, and for a pruning that can't be pinned."""
        self.history: tuple[Exchange, ...] = ()
        self.latest: _Latest | None = None
        self.noted: set[str] = set()
        self.pruning, self.files = pruning, files
        self._pipeline, self._system, self._generation, self._pin = pipeline, system, generation, pin
        self._continued: dict[str, Any] = {}  # has `ask` go on from what it computed for the turn before
        self._images: tuple[NamedImage | EncodedImage, ...] = files
        self._hits: tuple[bool, ...] = ()
        if isinstance(pipeline, RemotePipeline):
            if pin:
                self._continued = {"pin": True}
            # the server has no exchange for encoding alone: it prunes for any question, whatever `tokens` the image has
            request = RemoteRequest(files, "?", _change(pruning, tokens=None), pin=pin)
            self._hits = pipeline.run(request, outputs={"with_prefix": False}).hits
            return
        if pin:
            from gridprune_cli.settings import check_pin
            from gridprune_cli.vlm.conversations import Conversations

            check_pin(pruning)
            self._continued = {"conversations": Conversations(0)}
        encoded = [pipeline.encode(file, several=len(files) > 1, optional=pruning.optional) for file in files]
        self._images, self._hits = (tuple(values) for values in zip(*encoded, strict=True))

    def ask(self, question: str, shown: "_Shown | None") -> "Answer | RemoteAnswer":
        """The answer to the next question. Raises its error, and then the conversation is as it was.

        Where a Ctrl-C ends it, what was shown of the answer stays in the conversation.
        """
        pruning = self.pruning
        if self._pin and _get(pruning, "query") is None:  # relevance of the first question is that of all
            pruning = _change(pruning, query=self.history[0].question if self.history else question)
        settings = self._generation | self._continued | {"stream": shown, "system": self._system}
        images = 0 if self.history else len(self.files)
        try:
            answer = self._pipeline.ask(self._images, question, pruning, history=self.history, **settings)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            if shown and shown.text.strip():
                self.history = (*self.history, Exchange(question, shown.text.strip(), images))
            raise
        if self._hits:
            answer, self._hits = replace(answer, hits=self._hits), ()
        self.latest = _Latest(question, pruning, self.history, answer)
        self.history = (*self.history, Exchange(question, answer.text, images))
        return answer

    def set_share(self, share: float) -> None:
        """Prunes to this share of the visual tokens from the next turn on."""
        self.pruning = _change(self.pruning, keep=share, tokens=None)

    def draw(self) -> str:
        """The figure of the latest turn. Raises BadInput where there is none."""
        if len(self.files) > 1:
            raise BadInput("draws one image, not several; talk about each by itself", place="/show")
        pruned = self._answered("/show").answer.pruned
        if isinstance(self._pipeline, RemotePipeline):
            pruned = self._repeat(figure="colour" if is_colour() else "plain", with_prefix=False).pruned
        return figure_text(self.files[0], pruned)

    def save(self, path: Path) -> None:
        """Writes the pruned set of the latest turn. Raises BadInput where there is none, or it can't be written."""
        pruned = self._answered("/save").answer.pruned
        if isinstance(self._pipeline, RemotePipeline):
            pruned = self._repeat(file=True).pruned
        write_atomic(path, pruned.to_bytes(), sync=True)

    def _answered(self, command: str) -> _Latest:
        if self.latest is None:
            raise BadInput("nothing was answered yet; ask something", place=command)
        return self.latest

    def _repeat(self, **outputs: Any) -> RemoteAnswer:
        """Has the server prune for the latest turn again, which selects the same, and send what else it gives."""
        assert isinstance(self._pipeline, RemotePipeline) and self.latest is not None
        turn = self.latest
        request = RemoteRequest(self.files, turn.question, turn.pruning, self._system, history=turn.history)
        return self._pipeline.run(request, outputs=outputs)


class _Shown(io.TextIOBase):
    """A stream that also holds what was written to it."""

    def __init__(self, stream: TextIO):
        self._stream, self.text = stream, ""

    def write(self, text: str) -> int:
        self.text += text
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


def _lines() -> Iterator[str]:
    """Lines that are typed or piped in, without white space around them; empty ones are left out."""
    if sys.stdin.isatty():
        say("Ask about the images; /help lists commands, Ctrl-D ends.")
        lines = _typed_lines()
    else:
        lines = (line.decode("utf-8", "replace") for line in bounded_lines(sys.stdin.buffer))
    yield from filter(None, (line.strip() for line in lines))


def _typed_lines() -> Iterator[str]:
    """Lines from a terminal. Ctrl-C begins a line anew."""
    import readline  # noqa: F401  # lends `input` its editing

    handler = signal.getsignal(signal.SIGINT)
    while True:
        try:
            line = input("> ") if stdout().isatty() else _prompt_on_stderr()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, handler)
            print(file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return
        except UnicodeDecodeError:
            warn("that line is no text in this terminal's encoding; write it again")
        else:
            yield line


def _prompt_on_stderr() -> str:
    """A line of stdin, asked for where stdout is for answers alone. Raises EOFError at the end."""
    print("> ", end="", file=sys.stderr, flush=True)
    if not (line := sys.stdin.readline()):
        raise EOFError
    return line


def _obey(conversation: _Conversation, line: str) -> bool:
    """Does what a command says, and gives whether the conversation goes on. Raises BadInput for what is none."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/show", "/help", "/quit") and argument:
        raise BadInput("takes nothing behind it", place=name)
    if name == "/quit":
        return False
    if name == "/help":
        print(_HELP, file=sys.stderr)
    elif name == "/show":
        _show(conversation.draw())
    elif name == "/keep":
        conversation.set_share(_share(argument))
        say(f"keeping {argument} from now on")
    elif name == "/save":
        path = Path(os.path.expanduser(argument))
        if not argument:
            raise BadInput("needs a file", place=name)
        try:
            check_target(path, "save")
        except BadInput as fault:
            raise BadInput(fault.reason, place=f"{name} {argument}") from fault
        conversation.save(path)
        say(f"{path}: written")
    else:
        raise BadInput("no command; /help lists them", place=name)
    return True


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise BadInput("needs a share above 0 and at most 1", place=f"/keep {text}".strip())
    return share


def _show(figure: str) -> None:
    """A figure at a terminal; on stderr where stdout is for answers alone."""
    if stdout().isatty():
        put(figure)
    else:
        print(figure, file=sys.stderr)


def _report(conversation: _Conversation, answer: "Answer | RemoteAnswer") -> None:
    """Says what a turn took, and what is new of the notes."""
    for note in answer.notes:
        if note not in conversation.noted:
            conversation.noted.add(note)
            say(note)
    say(f"{answer.pruned.counts}, {answer.ms['total'] / 1e3:.2f} s")


def _get(pruning: Any, name: str) -> Any:
    return pruning.get(name) if isinstance(pruning, Mapping) else getattr(pruning, name)


def _change(pruning: Any, **settings: Any) -> Any:
    """A pruning with other settings: `Pruning`, or its options by name."""
    return {**pruning, **settings} if isinstance(pruning, Mapping) else replace(pruning, **settings)

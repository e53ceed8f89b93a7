"""Models by hub name. huggingface_hub does the work, so its settings hold: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, ...

A failure becomes one line that says what to do.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, tqdm

from gridprune_cli.errors import DOWNLOAD, BadInput, GridpruneError

# what transformers reads of a checkpoint; never Python files
PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")
PICKLED = ("pytorch_model.bin", "pytorch_model-*.bin")  # weights, where a repository has no safetensors


def is_name(text: str) -> bool:
    """Whether a text reads as `owner/name`."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", text, re.ASCII) is not None


def locate(name: str, revision: str | None, subject: Mapping[str, str], *, cached: bool = False) -> Path:
    """The snapshot's folder, named by its commit, with config.json in it; the rest may not be there yet.

    `cached` looks in the hub's cache alone. Raises BadInput or GridpruneError where there is none; `subject` says what
    they are about, as arguments of theirs.
    """
    with _explained(name, revision, subject), _bars(False), _unbroken():
        return Path(hf_hub_download(name, "config.json", revision=revision, local_files_only=cached)).parent


def fetch(
    name: str, commit: str, subject: Mapping[str, str], *, bars: bool, patterns: tuple[str, ...] = PATTERNS
) -> None:
    """Fetches what is missing of a snapshot. Raises as `locate` does."""
    with _explained(name, commit, subject), _bars(bars), _unbroken():
        try:
            _stoppable(
                lambda bar: snapshot_download(name, revision=commit, allow_patterns=list(patterns), tqdm_class=bar)
            )
        except KeyboardInterrupt:
            _drop_partial(name)
            raise


def _stoppable(download: Callable[[type[tqdm]], object]) -> None:
    """Runs a download so that Ctrl-C ends it at once: the client itself would first wait for the files it has begun.

    It runs in threads of its own, which the interrupt leaves behind; there the progress bar, which every piece of a
    file passes, breaks off. Files that are whole stay in the hub's cache, and the next download fetches the others.
    """
    stopped = threading.Event()
    failures: list[BaseException] = []

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            if stopped.is_set():
                raise InterruptedError("the download was stopped")
            return super().update(n)

    def run() -> None:
        try:
            download(Bar)
        except BaseException as fault:
            failures.append(fault)

    thread = threading.Thread(target=run, name=DOWNLOAD, daemon=True)
    thread.start()
    try:
        thread.join()
    except KeyboardInterrupt:
        stopped.set()
        raise
    if failures:
        raise failures[0]


def _drop_partial(name: str) -> None:
    """Removes the files that this process has begun to fetch of a model: the client never takes them up again."""
    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")
    opened = set()
    with suppress(OSError):  # where the system has no /dev/fd, they stay
        for number in os.listdir("/dev/fd"):
            with suppress(OSError):
                opened.add(_inode(os.fstat(int(number))))
    for path in folder.glob("*.incomplete"):
        with suppress(OSError):
            if _inode(path.stat()) in opened:
                path.unlink()


def _inode(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


@contextmanager
def _explained(name: str, revision: str | None, subject: Mapping[str, str]) -> Iterator[None]:
    """Makes one line of what the client raises, about a subject."""
    try:
        yield
    except GatedRepoError as fault:
        raise BadInput(
            f"needs a licence accepted; do so at {constants.ENDPOINT}/{name}, then log in with `hf auth login` or set "
            "HF_TOKEN",
            **subject,
        ) from fault
    except RepositoryNotFoundError as fault:
        raise BadInput(
            "no such folder, and no such model on the hub; check the name, or log in with `hf auth login` if it is "
            "private",
            **subject,
        ) from fault
    except RevisionNotFoundError as fault:
        raise BadInput(f"no branch, tag or commit {revision}; check its name", **subject) from fault
    except LocalEntryNotFoundError as fault:
        kind, why = GridpruneError, "the hub can't be reached; check the network"
        if constants.HF_HUB_OFFLINE:
            kind, why = BadInput, "HF_HUB_OFFLINE forbids to fetch it"
        raise kind(f"no such folder, not whole in the hub's cache, and {why}", **subject) from fault
    except EntryNotFoundError as fault:
        raise BadInput("has no config.json on the hub; it is no model for transformers", **subject) from fault
    except HFValidationError as fault:
        raise BadInput("no such folder, and no name that the hub could have; check it", **subject) from fault
    except Exception as fault:  # of the network, the disk, the server: the client lets all sorts of them through
        reason = (str(fault).splitlines() or [""])[0] or type(fault).__name__
        raise GridpruneError(f"can't be fetched from the hub ({reason}); try again", **subject) from fault


@contextmanager
def _unbroken() -> Iterator[None]:
    """Lets a connection that breaks raise, where the command line has a closed pipe end the process without a word."""
    if not hasattr(signal, "SIGPIPE") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGPIPE, before)


@contextmanager
def _bars(show: bool) -> Iterator[None]:
    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()

"""Every test runs without network, without the user's settings and cache, and without forced colours."""

import copy
import functools
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked import Server
from hypothesis import settings

settings.register_profile("unhurried", deadline=None, derandomize=True)  # a busy machine is no fault of the code
settings.load_profile("unhurried")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: some tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)

# read when the libraries are imported
os.environ["OMP_NUM_THREADS"] = "1"  # each core has a process of its own that runs tests
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = os.path.join(tempfile.gettempdir(), "gridprune-tests-no-hub")  # never created
for _name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)
for _name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "NO_COLOR"):
    os.environ.pop(_name, None)


_SIGNALS = (signal.SIGINT, signal.SIGPIPE)  # those that commands set; a test may take a name from the module


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """Commands set what signals do for the rest of their process, which here goes on: with SIGPIPE as they set it, the
    first write to a connection that a server has closed would end it."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _each_test_with_the_signals_of_before() -> Iterator[None]:
    with _signals_as_before():
        yield


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GRIDPRUNE_")]:
        monkeypatch.delenv(name)
    from gridprune_cli.cli.output import set_quiet

    set_quiet(False)
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))  # where no server listens


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint("llava")`: the folder of the tiny checkpoint of a family, written once per process; never changed."""
    from tiny_families import write_checkpoint

    return functools.cache(lambda name: write_checkpoint(name, tmp_path_factory.mktemp("tiny") / name))


@pytest.fixture(scope="session")
def tiny_llava(checkpoint: Callable[[str], Path]) -> Path:
    """The tiny LLaVA with its CLIP, on disk. Copy it to change it."""
    return checkpoint("llava")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty hub cache, offline, as the hub's own client sees it."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Calls `gridprune` in this process, as a user calls it: (exit code, stdout, stderr)."""
    from gridprune_cli.cli.app import main

    def call(*arguments: object, stdin: bytes = b"") -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["gridprune", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        code: object = 0
        try:
            with _signals_as_before():
                main()
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Starts `gridprune` in processes of its own that need not import torch again."""
    with tempfile.TemporaryDirectory() as folder:  # of a short path, unlike pytest's own
        server = Server(Path(folder))
        yield server
        server.close()


RAY = """
import sys, ray
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 28)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a Ray on two CPUs, which runs until the tests end."""
    from gridprune_cli.runners.ray import _DEFAULTS

    process = subprocess.Popen(
        [sys.executable, "-c", RAY],
        # its token is known below its own process alone; and a busy machine may need longer than 30 s to start it
        env=os.environ | _DEFAULTS | {"RAY_AUTH_MODE": "disabled", "RAY_raylet_start_wait_time_s": "300"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdin and process.stdout
    line = process.stdout.readline().strip()
    assert line, "Ray did not start"
    yield line
    process.stdin.close()
    process.wait()


@pytest.fixture
def noise():
    """Makes pictures of random pixels: `noise((width, height), seed=0)`."""
    import hashlib

    import numpy as np
    from PIL import Image

    from gridprune_cli.images import Picture

    def draw(size: tuple[int, int], seed: int = 0) -> Picture:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
        return Picture(Image.fromarray(pixels), hashlib.sha256(pixels.tobytes()).hexdigest(), f"noise {seed}", ())

    return draw


@pytest.fixture(scope="session")
def loaded_models() -> dict[Any, Any]:
    """The parts of models that were loaded in this process, as they were read."""
    return {}


@pytest.fixture(autouse=True)
def _load_once(monkeypatch: pytest.MonkeyPatch, loaded_models: dict[Any, Any]) -> None:
    """The same weights of the same files are read once per process, which is ten times as fast.

    Each who loads them gets modules, hooks and configs of his own; the weights are shared, so no test may write to
    them. What lies on several devices or is quantised is always read.
    """
    modules = [sys.modules.get(f"gridprune_cli.vlm.{name}") for name in ("clip", "parts", "word_relevance")]
    if not all(modules):
        return  # of tests that load nothing; they need not wait for torch
    from gridprune_cli.vlm.loading import load_part

    def load(cls: Any, folder: Path, without: Collection[str], dtype: Any, device: Any, quantised: Any = None) -> Any:
        if device is None or quantised is not None:
            return load_part(cls, folder, without, dtype, device, quantised)
        files = tuple((path.name, path.stat().st_mtime_ns) for path in sorted(folder.iterdir()))
        key = (cls, folder, tuple(without), files, dtype, str(device))
        if key not in loaded_models:
            loaded_models[key] = load_part(cls, folder, without, dtype, device)
        model = loaded_models[key]
        weights = (*model.parameters(), *model.buffers())
        return copy.deepcopy(model, {id(weight): weight for weight in weights})

    for module in modules:
        monkeypatch.setattr(module, "load_part", load)


@pytest.fixture
def run(monkeypatch, command, tiny_llava):
    """Calls `gridprune` with the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.setenv("GRIDPRUNE_MODEL", str(tiny_llava))
    monkeypatch.setenv("GRIDPRUNE_MAX_NEW_TOKENS", "4")
    return command

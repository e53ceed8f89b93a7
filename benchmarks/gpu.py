"""Acceptance on one GPU, in at most 10 minutes, from a bare checkout.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --device cpu --out report.json

Installs what is missing of the package's requirements, looks how much memory there is, runs the checks of
`benchmarks/acceptance.py` in turn, and writes one table to stdout and one JSON file. The exit code is 0 where every
target is met. A check that fails is a row of the table, and so is one for which no time was left. On a CPU the
checks run on tiny shapes, and no target of speed counts.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.machine import Machine, Row

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("torch", "transformers", "huggingface_hub", "safetensors", "typer", "rich", "PIL", "numpy", "jinja2")


def install() -> None:
    """Installs the package with its requirements where one of them is missing. Exits where pip fails."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if not missing:
        return
    print(f"installing {', '.join(missing)}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "install", "-q", "-c", "constraints.txt", "-e", "."]
    if code := subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode:
        sys.exit(f"benchmarks.gpu: pip failed with {code}; install the package by hand, as docs/install.md says")
    importlib.invalidate_caches()


def find_machine(device: str, folder: Path) -> "Machine":
    """The machine with a device, `auto` being the GPU where there is one. Exits where the device can't be used."""
    import torch

    from benchmarks.machine import Machine, find_tests

    find_tests(ROOT)
    if device == "pretend":
        importlib.import_module("accelerator")  # of the tests: it gives torch the device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        return Machine(device, f"{device}, {torch.get_num_threads()} threads", None, folder)
    if not torch.cuda.is_available():
        sys.exit(f"benchmarks.gpu: torch {torch.__version__} finds no GPU; install a build for CUDA, or `--device cpu`")
    return Machine(device, torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)[0], folder)


def run(machine: "Machine", names: list[str], seconds: float) -> Iterator["Row"]:
    """The rows of the checks. One that fails is a row with its error, one that there is no time for a row that says so.

    A check is not cut short: the last one may end after its time.
    """
    from benchmarks.acceptance import CHECKS
    from benchmarks.machine import Row, attempt

    end = time.monotonic() + seconds
    for name in names:
        if time.monotonic() > end:
            yield Row(name, "not run: out of time", "run", False)
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        with redirect_stdout(sys.stderr):  # stdout is the table's
            rows = list(attempt(name, partial(CHECKS[name], machine)))
        yield from rows
        machine.release()


def write_table(rows: list["Row"]) -> None:
    """The rows as a table in Markdown, on stdout."""
    print("| check | value | target | met |\n|---|---|---|---|")
    for row in rows:
        met = {True: "yes", False: "**no**", None: ""}[row.met]
        print(f"| {row.check} | {row.value} | {row.target} | {met} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu, or the tests' pretend")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="the JSON file")
    parser.add_argument("--minutes", type=float, default=10, help="after which no further check begins")
    parser.add_argument("--only", help="names of checks, with commas")
    options = parser.parse_args()
    start = time.monotonic()
    install()
    import torch

    from benchmarks.acceptance import CHECKS

    names = options.only.split(",") if options.only else list(CHECKS)
    if unknown := set(names) - set(CHECKS):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(CHECKS)}")
    with tempfile.TemporaryDirectory() as folder:
        machine = find_machine(options.device, Path(folder))
        rows = list(run(machine, names, 60 * options.minutes - (time.monotonic() - start)))
    print(f"{machine.name}, torch {torch.__version__}, {time.monotonic() - start:.0f} s\n")
    write_table(rows)
    about = {"device": machine.device, "name": machine.name, "free_bytes": machine.free, "torch": torch.__version__}
    report = about | {"seconds": round(time.monotonic() - start, 1), "rows": [vars(row) for row in rows]}
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(0 if all(row.met is not False for row in rows) else 1)


if __name__ == "__main__":
    main()

"""What a large cache costs to list, to sum up and to tidy: `python -m benchmarks.cache [ENTRIES...]`.

Fills a temporary folder with entries whose headers are those of LLaVA-1.5 images, 576 visual tokens with one number
each so that the disk has room, and runs the commands as whole processes. Seconds: until the first line, until
the end, and of the CPU, user and system together; beside others on a machine, the last are what the command takes.
Memory is the peak of the process, as the kernel counts it.
"""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gridprune_cli.cache.store import Store, entry_key

ENTRIES = (10_000, 100_000)
SIDE = 24  # of the grid
ENCODER = {
    "family": "llava",
    "checkpoint": "llava-hf/llava-1.5-7b-hf@" + "0" * 40,
    "dtype": "bfloat16",
    "processor": "0" * 64,
    "backend": "CLIPImageProcessor",
    "version": 1,
}


def fill(root: Path, entries: int) -> None:
    """Writes entries, as `encode` would. In a process of its own: a command's peak counts from its parent's on."""
    import torch

    from gridprune_cli.pruning.signals import View
    from gridprune_cli.tokens import EncodedImage

    store, count = Store(root, None), SIDE * SIDE
    for number in range(entries):
        image = hashlib.sha256(str(number).encode()).hexdigest()
        key = entry_key(image, ENCODER, ("saliency",))
        vision_features = torch.full((count, 1), number, dtype=torch.bfloat16)
        encoded = EncodedImage(
            key=key,
            model="llava-hf/llava-1.5-7b-hf",
            image=image,
            name=f"photos/{number // 1000:03}/{number:06}.jpg",
            encoder=ENCODER,
            size=(640, 480),
            views=(View(SIDE, SIDE, (0.125, 0.0, 0.875, 1.0)),),
            vision_features=vision_features,
            saliency=vision_features[:, 0],
            placeholder_map=torch.arange(count, dtype=torch.int32),
            prompt={"placeholder": "<image>" * count},
        )
        if not store.put(ENCODER, key, encoded.to_bytes()):
            sys.exit("the entries can't be written")


def measure(root: Path, *arguments: str) -> tuple[float, float, float, float]:
    """Runs `gridprune cache`: seconds to its first line, to its end and of the CPU, and its peak memory in MB."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "gridprune_cli", "cache", *arguments, "--cache-dir", str(root)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    first = None
    while os.read(process.stdout.fileno(), 1 << 16):
        first = first or time.perf_counter() - start
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)}: failed")
    return first or wall, wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e6


def main() -> None:
    counts = [int(argument) for argument in sys.argv[1:]] or ENTRIES
    print(f"{'entries':>7}  {'command':<22}  {'first line':>10}  {'wall':>6}  {'CPU':>6}  {'memory':>7}", flush=True)
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            filling = multiprocessing.get_context("spawn").Process(target=fill, args=(root, count))
            filling.start()
            filling.join()
            sizes = [entry.bytes for entry in Store(root, None).entries()]
            if len(sizes) != count:
                sys.exit(f"{len(sizes)} of {count} entries were written")
            for name, *arguments in (
                ("ls", "ls"),
                ("ls --json", "ls", "--json"),
                ("info", "info"),
                ("gc, nothing to remove", "gc", "--max-size", "0"),
                ("gc, half to remove", "gc", "--max-size", str(sum(sizes) // 2)),
            ):
                first, wall, cpu, memory = measure(root, *arguments)
                print(
                    f"{count:7}  {name:<22}  {first:8.2f} s  {wall:4.1f} s  {cpu:4.1f} s  {memory:4.0f} MB", flush=True
                )


if __name__ == "__main__":
    main()

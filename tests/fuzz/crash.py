"""A cache under kill -9: eight writers, readers, `gc`, `clear` and `verify`, each killed at random and started again.

    python tests/fuzz/crash.py [SECONDS] [FOLDER]

What must hold, at any time and in the end: nobody reads an entry that was not written so, nobody ends but by its kill,
`clear` leaves nothing but the root's marks, and those are there. Says what it saw; exit code 1 where something of this
did not hold.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from gridprune_cli.cache import files
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.layout import SCHEMA
from gridprune_cli.cache.root import IGNORE, TAG
from gridprune_cli.cache.store import Store, entry_key

KEYS = 12  # entries that all fight for, of each of two encoders
ENCODERS = [{"family": "llava", "checkpoint": name * 64, "dtype": "bfloat16"} for name in "ab"]
LIMIT = 400_000  # bytes, which a third of the entries take


def entry(encoder: int, number: int, version: int) -> tuple[str, bytes]:
    """Key and bytes of an entry; its tensor follows from its number and its version."""
    image = f"{number:064x}"
    key = entry_key(image, ENCODERS[encoder], ["saliency"])
    header = {"schema": SCHEMA, "key": key, "encoder": ENCODERS[encoder], "image": image, "number": [number, version]}
    size = 20_000 + 5_000 * (number % 4)
    return key, files.encode(
        {"vision_features": RawTensor("U8", (size,), bytes([number, version % 256]) * (size // 2))}, header
    )


def write(store: Store, rng: random.Random) -> None:
    if rng.random() < 0.3:
        store.remember(f"{rng.randrange(100):064x}", f"{rng.randrange(100):064x}")
    encoder, number = rng.randrange(2), rng.randrange(KEYS)
    key, data = entry(encoder, number, rng.randrange(1000))
    warnings: list[str] = []
    fresh = Store(store.root, LIMIT, warnings.append)  # as a command of its own, which looks at the root
    if not fresh.put(ENCODERS[encoder], key, data):
        raise AssertionError(f"not written: {warnings}")
    fresh.finish()


def read(store: Store, rng: random.Random) -> bool:
    """Whether there was an entry to be read."""
    encoder, number = rng.randrange(2), rng.randrange(KEYS)
    key, _ = entry(encoder, number, 0)
    if parts := store.get(ENCODERS[encoder], key):
        header, tensors = parts
        number, version = header["number"]
        expected = files.decode(entry(encoder, number, version)[1])
        if (header, tensors) != expected or header["key"] != key:
            raise AssertionError(f"another content under {key}")
    recalled = store.recall(f"{rng.randrange(100):064x}")
    if recalled is not None and int(recalled, 16) >= 100:
        raise AssertionError(f"{recalled} was never remembered")
    return parts is not None


def gc(store: Store, rng: random.Random) -> None:
    store.gc(max_bytes=LIMIT, older_than=rng.choice((None, 0.5)))


def clear(store: Store, rng: random.Random) -> None:
    store.clear()
    time.sleep(rng.random())


def verify(store: Store, rng: random.Random) -> None:
    for entry, fault in store.verify(delete=rng.random() < 0.5):
        if fault:  # whatever is killed, a file is whole or not there
            raise AssertionError(f"{entry.path}: {fault}")


def strip(store: Store, rng: random.Random) -> None:
    """Takes the root's marks away, so that they are written, and their writers killed, again and again."""
    time.sleep(0.05)
    for name in (TAG, IGNORE):
        try:
            os.unlink(store.root / name)
        except OSError:
            continue


ROLES: list[Callable[[Store, random.Random], object]] = [write] * 8 + [read] * 3 + [gc, clear, verify, strip]


def start(role: Callable[[Store, random.Random], object], root: Path, seed: int) -> int:
    """A process that plays a role until it is killed. Forked, so that it costs no start of Python's."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        store, rng = Store(root, LIMIT, lambda message: None), random.Random(seed)
        while True:
            role(store, rng)
    except BaseException as fault:
        os.write(2, f"{role.__name__}: {type(fault).__name__}: {fault}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(code)


def soak(seconds: float, root: Path, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Kills for some seconds: what was counted, and what did not hold."""
    rng, counts, faults = random.Random(seed), Counter[str](), list[str]()
    running = {start(role, root, rng.randrange(1 << 32)): role for role in ROLES}
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            time.sleep(rng.random() * 0.05)
            victim = rng.choice(sorted(running))
            role = running.pop(victim)
            os.kill(victim, signal.SIGKILL)
            status = os.waitpid(victim, 0)[1]
            counts["kills"] += 1
            if not os.WIFSIGNALED(status):
                faults.append(f"{role.__name__} ended by itself")
            names = [path.name for path in root.iterdir()] if root.exists() else []
            counts["reads"] += 1
            counts["hits"] += read(Store(root, None), rng)
            counts["leftovers in the root"] += sum(name.endswith(".tmp") for name in names)
            running[start(role, root, rng.randrange(1 << 32))] = role
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return counts, faults + leftovers(root)


def leftovers(root: Path) -> list[str]:
    """What does not hold of a cache whose processes are all gone."""
    faults, store = [], Store(root, None)
    faults += [f"{entry.path}: {fault}" for entry, fault in store.verify() if fault]
    key, data = entry(0, 0, 0)
    if not store.put(ENCODERS[0], key, data) or store.get(ENCODERS[0], key) is None:
        faults.append("an entry can't be written")
    faults += [f"{name} is not there" for name in (TAG, IGNORE) if not (root / name).exists()]
    long_ago = time.time() - 2 * 86_400
    for path in root.rglob("*.tmp"):
        os.utime(path, (long_ago, long_ago))
    store.gc()
    faults += [f"{path} is left by gc" for path in root.rglob("*.tmp")]
    (root / f".{TAG}.1.0123abcd.tmp").touch()
    store.remember("0" * 64, "1" * 64)
    store.clear()
    left = sorted(path.name for path in root.iterdir())
    if left != [IGNORE, TAG]:
        faults.append(f"clear left {left}")
    return faults


def main() -> int:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        counts, faults = soak(seconds, Path(folder, "cache"), seed=int(time.time()))
    print(f"{seconds:.0f} s: {dict(counts)}, {len(faults)} faults")
    for fault in faults[:20]:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

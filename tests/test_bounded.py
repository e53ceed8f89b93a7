"""Processes with limits of their own."""

import sys
from pathlib import Path

import pytest

from gridprune_cli import bounded


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX")
def test_a_limited_process_leaves_no_bytecode_behind(tmp_path: Path) -> None:
    """What Python has written of a `.pyc` up to the limit it takes for whole, and no process could import it again."""
    (tmp_path / "large.py").write_text("NAMES = " + repr([f"name {n}" for n in range(10_000)]))
    (tmp_path / "worker.py").write_text(
        "from gridprune_cli import bounded\n\ndef serve():\n    bounded.limit(FSIZE=1 << 16)\n    import large\n"
        "    print(len(large.NAMES))\n"
    )
    process = bounded.start("worker", paths=[str(tmp_path)])
    assert process.communicate(timeout=60)[0].split() == [b"10000"] and process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.py", "worker.py"]

"""The page on sizing says what its command prints, for every family."""

import re
from pathlib import Path

from benchmarks.sizing import LAYOUTS, PICTURES, picture, prefix_bytes, thin
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm import FAMILIES

ROOT = Path(__file__).parents[1]


def test_the_table_is_what_the_command_counts(tmp_path):
    page = (ROOT / "docs" / "sizing.md").read_text("utf-8")
    lines = re.findall(r"^ +(\w+) +(\d+)x(\d+) +(\d+) +(\d+) +([\d,]+) +([\d.]+) +([\d,]+) +([\d.]+) +\S+$", page, re.M)
    assert [row[0] for row in lines] == [family for family in FAMILIES for _ in PICTURES]
    assert [layout.config["model_type"] for layout in LAYOUTS] == list(FAMILIES)
    for name, _, _, tokens, width, size, mib, most, prefix in lines:
        count, total = int(tokens), int(size.replace(",", ""))
        bare = 2 * count * (int(width) + 1) + 4 * count  # features and saliency in 16 bits, the map in 32
        assert bare < total < 1.03 * bare + 4096
        assert (float(prefix) == 0) == (name == "paligemma")
        assert float(mib) == round(total / 2**20, 1) and int(most.replace(",", "")) == 20 * 2**30 // total
    (image,) = Pipeline(thin(LAYOUTS[0], tmp_path)).encoder.run_tower([picture(*PICTURES[0])])
    assert lines[0][3:6] == (str(image.count), "1024", f"{len(image.to_bytes()):,}")
    # 16 of 32 layers, 32 heads of 128 numbers, keys and values, and 4096 numbers of a hidden state, in 16 bits
    assert prefix_bytes(LAYOUTS[0], image) == (16 * 32 * 128 * 2 + 4096) * 2 * 576
    assert lines[0][8] == f"{prefix_bytes(LAYOUTS[0], image) / 2**20:.1f}"

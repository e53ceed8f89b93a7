"""Whole-process time of `gridprune ask` on a cached image against plain transformers: `python -m benchmarks.ask`.

The plain script loads the same folder with `from_pretrained` and generates from the full image. The two run in turn;
the ratio is taken pair by pair.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gridprune_cli.scenes import CHECKPOINT

IMAGE = Path(__file__).parent.parent / "sample_images/scene-1.png"
QUESTION = "Which object has the T?"
PLAIN = f"""
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder = {str(CHECKPOINT)!r}
model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
processor = AutoProcessor.from_pretrained(folder)
content = [{{"type": "image"}}, {{"type": "text", "text": {QUESTION!r}}}]
text = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True)
inputs = processor(images=[Image.open({str(IMAGE)!r})], text=text, return_tensors="pt")
out = model.generate(**inputs, max_new_tokens=128, do_sample=False)
print(processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""


def seconds(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as cache:
        ask = [sys.executable, "-m", "gridprune_cli", "ask", str(IMAGE), QUESTION, "--cache-dir", cache, "-q"]
        plain = [sys.executable, "-c", PLAIN]
        answers = {seconds(ask)[1], seconds(plain)[1]}  # fills the cache, and warms the disk
        timed = [(seconds(ask)[0], seconds(plain)[0]) for _ in range(pairs)]
    if len(answers) > 1:
        sys.exit(f"the two answer differently: {', '.join(sorted(answers))}")
    ratios = [a / b for a, b in timed]
    print(f"gridprune ask, cached image: median {statistics.median(a for a, _ in timed):.2f} s")
    print(f"plain transformers:          median {statistics.median(b for _, b in timed):.2f} s")
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}, {pairs} pairs")


if __name__ == "__main__":
    main()

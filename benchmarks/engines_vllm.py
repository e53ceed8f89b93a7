"""The side of `benchmarks.engines` that runs in vLLM's own environment: `python engines_vllm.py MODEL FOLDER`.

FOLDER has requests as `gridprune export --to vllm` writes them in a folder for each way of asking, and for the way
`picture` a `questions.json` of the prompt and image file of each question. Each line of stdin is the name of a way; for
each one a line of JSON comes back: token ids of every answer, and the seconds that all took, by the clock and of CPU.
Between two of them all that vLLM remembers of prompts and pictures is dropped.

Needs nothing of this project, since that is not installed there.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
MAX_TOKENS = 16


def load(path: Path) -> dict[str, Any]:
    """The request of an exported file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["vllm"])
        return {
            "prompt_token_ids": file.get_tensor("prompt_token_ids").tolist(),
            "multi_modal_data": {"image": file.get_tensor("image_embeds")},
            "multi_modal_uuids": {"image": about["uuids"]},
        }


def load_questions(path: Path) -> list[dict[str, Any]]:
    """Requests about picture files, for vLLM's own vision tower."""
    from PIL import Image

    requests = []
    for prompt, image in json.loads(path.read_text("utf-8")):
        with Image.open(path.parent / image) as file:
            picture = file.convert("RGB")
        requests.append({"prompt_token_ids": prompt, "multi_modal_data": {"image": picture}})
    return requests


def main() -> None:
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # vLLM logs to stdout
    from vllm import LLM, SamplingParams

    model, folder = sys.argv[1], Path(sys.argv[2])
    engine = LLM(model=model, dtype="float32", enforce_eager=True, enable_mm_embeds=True, max_model_len=512, seed=0)
    settings = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    requests = {
        way.name: [load(path) for path in sorted(way.glob("*.safetensors"))] for way in folder.iterdir() if way.is_dir()
    }
    requests["picture"] = load_questions(folder / "picture" / "questions.json")
    print("ready", file=results, flush=True)
    for line in sys.stdin:
        engine.reset_prefix_cache()
        engine.reset_mm_cache()
        began, used = time.perf_counter(), time.process_time()
        outputs = engine.generate(requests[line.strip()], settings, use_tqdm=False)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        ids = [list(output.outputs[0].token_ids) for output in outputs]
        prompts = [list(output.prompt_token_ids) for output in outputs]
        print(json.dumps({"ids": ids, "prompts": prompts, "seconds": seconds, "cpu": cpu}), file=results, flush=True)


if __name__ == "__main__":
    main()

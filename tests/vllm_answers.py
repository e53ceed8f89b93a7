"""Has vLLM answer from exported files: `PYTHON_OF_VLLM vllm_answers.py JOB`, for tests/test_vllm_engine.py.

JOB is a file of JSON: `model`, a folder; `encodings`, the folder of the encoder cache; `requests`, files as `export`
writes them for vLLM; `whole`, of each request for a whole image its `prompt` with one image token, the image file and
the `uuid`. Prints a line of JSON for each: `prompt`, the token ids that vLLM made of it, and `answer`.

It imports nothing of gridprune, which vLLM's environment does not have.
"""

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}

from PIL import Image
from safetensors import safe_open
from vllm import LLM, SamplingParams

TOKENS = 12


def read_request(path):
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["vllm"])
        image = file.get_tensor("image_embeds")
        if "image_grid_thw" in file.keys():  # noqa: SIM118
            image = {"image_embeds": image, "image_grid_thw": file.get_tensor("image_grid_thw")}
        return {
            "prompt_token_ids": file.get_tensor("prompt_token_ids").tolist(),
            "multi_modal_data": {"image": image},
            "multi_modal_uuids": {"image": about["uuids"]},
        }


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    requests = [read_request(path) for path in job["requests"]]
    requests += [
        {
            "prompt_token_ids": whole["prompt"],
            "multi_modal_data": {"image": Image.open(whole["image"])},
            "multi_modal_uuids": {"image": [whole["uuid"]]},
        }
        for whole in job["whole"]
    ]
    engine = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        skip_mm_profiling=True,
        enable_mm_embeds=True,
        limit_mm_per_prompt={"image": 64},
        ec_transfer_config={
            "ec_connector": "ECExampleConnector",
            "ec_role": "ec_consumer",
            "ec_connector_extra_config": {"shared_storage_path": job["encodings"]},
        },
    )
    settings = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    for output in engine.generate(requests, settings, use_tqdm=False):
        answer = list(output.outputs[0].token_ids)
        print(json.dumps({"prompt": list(output.prompt_token_ids), "answer": answer}))


if __name__ == "__main__":
    main()

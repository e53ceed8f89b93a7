"""Has SGLang's own processor take exported requests: `PYTHON_OF_SGLANG sglang_inputs.py MODEL FILE...`.

For tests/test_sglang_processor.py. Checks that the prompt, the positions and the embeddings come through as they are in
the file, to what the scheduler would give to the language model. Ends with an AssertionError where they don't.

It imports nothing of gridprune, which SGLang's environment does not have. No model is loaded.
"""

import asyncio
import sys
from types import SimpleNamespace

import torch
from safetensors import safe_open
from sglang.srt.managers.mm_schedule import _get_precomputed_embedding
from sglang.srt.multimodal.processors.qwen_vl import QwenVLImageProcessor
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_tokenizer
from transformers import AutoConfig, AutoProcessor


def main():
    model, *paths = sys.argv[1:]
    settings = ServerArgs(model_path=model, device="cpu")
    set_global_server_args_for_tokenizer(settings)
    config = AutoConfig.from_pretrained(model)
    processor = QwenVLImageProcessor(config, settings, AutoProcessor.from_pretrained(model), None)
    for path in paths:
        check(processor, config.image_token_id, path)
    print("passed", len(paths))


def check(processor, image_token, path):
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    ids = tensors.pop("input_ids").tolist()
    request = SimpleNamespace(video_data=None, audio_data=None, rid="test")
    image = {"format": "processor_output", **tensors}
    output = asyncio.run(processor.process_mm_data_async(image_data=[image], input_text=ids, request_obj=request))
    assert output.input_ids == ids
    assert torch.equal(output.mrope_positions, tensors["mrope_positions"])
    assert torch.equal(output.mrope_position_delta, tensors["mrope_position_delta"])
    (item,) = output.mm_items
    first, count = ids.index(image_token), len(tensors["precomputed_embeddings"])
    assert item.offsets == [(first, first + count - 1)]
    embeddings = _get_precomputed_embedding([item], [0, 1], [0], [len(ids)], [item.offsets])
    assert torch.equal(embeddings, tensors["precomputed_embeddings"])


if __name__ == "__main__":
    main()

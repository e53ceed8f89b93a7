"""How bfloat16 compares with float32 on a CPU: `python -m benchmarks.precision [WIDTH...]`.

A Llama layer of each width reads a prompt of 300 tokens and makes one more, in both precisions in turn. Medians of 20
runs on two threads. `ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI`, or `=AVX2` with `ATEN_CPU_CAPABILITY=avx2`, holds torch to
what an older CPU has.
"""

import sys
from statistics import median
from time import perf_counter
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

WIDTHS = (1024, 2048, 3072, 3584, 4096)
PROMPT, RUNS, WARM = 300, 20, 2
KINDS = (torch.float32, torch.bfloat16)


def milliseconds(model: Any, tokens: int, cache: DynamicCache) -> float:
    embeds = torch.randn(1, tokens, model.config.hidden_size, dtype=model.dtype)
    start = perf_counter()
    model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    return (perf_counter() - start) * 1000


@torch.inference_mode()
def main() -> None:
    torch.set_num_threads(2)
    print(f"{'width':>5}  {'':>9}  {'float32':>10}  {'bfloat16':>10}  {'faster by':>9}   ms")
    for width in [int(argument) for argument in sys.argv[1:]] or WIDTHS:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=width * 43 // 16,  # as Llama 2's 11008 to 4096
            num_hidden_layers=1,
            num_attention_heads=width // 128,
            num_key_value_heads=width // 128,
            vocab_size=1000,
        )
        models = {kind: LlamaModel(config).eval().to(kind) for kind in KINDS}
        times: dict[Any, list[float]] = {(what, kind): [] for what in ("prompt", "one token") for kind in KINDS}
        for _ in range(WARM + RUNS):
            for kind, model in models.items():
                cache = DynamicCache(config=config)
                times["prompt", kind].append(milliseconds(model, PROMPT, cache))
                times["one token", kind].append(min(milliseconds(model, 1, cache) for _ in range(2)))
        for what in ("prompt", "one token"):
            exact, short = (median(times[what, kind][WARM:]) for kind in KINDS)
            print(f"{width:5}  {what:>9}  {exact:10.1f}  {short:10.1f}  {exact / short:9.2f}", flush=True)


if __name__ == "__main__":
    main()

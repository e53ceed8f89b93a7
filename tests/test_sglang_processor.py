"""SGLang's own processor takes exported sets: prompt, positions and embeddings reach its scheduler as they are.

Runs where SGLANG_PYTHON names the Python of an environment with SGLang. Its engine, which needs a GPU, is not
run.
"""

import os
import subprocess
from pathlib import Path

import pytest
from engine_checkpoints import write_for_engines

from gridprune_cli.integrations.sglang import to_sglang
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

PYTHON = os.environ.get("SGLANG_PYTHON")
SCRIPT = Path(__file__).with_name("sglang_inputs.py")


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="SGLANG_PYTHON does not name a Python with SGLang")
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_processor_takes_the_request(name, checkpoint, noise, tmp_path):
    folder = write_for_engines(name, checkpoint(name), tmp_path / "model")
    pipeline = Pipeline(str(folder), dtype="float32")
    (image,) = pipeline.encoder.encode([noise((210, 70))])
    paths = []
    for pruning in (Pruning(keep=0.4), Pruning(keep=0.4, positions="compact"), Pruning(keep=1.0)):
        pruned = pipeline.prune(image, "what colour is the left object?", pruning)
        paths.append(tmp_path / f"{len(paths)}.sglang.safetensors")
        paths[-1].write_bytes(to_sglang(pipeline.family, pruned).to_bytes())
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [PYTHON, str(SCRIPT), str(folder), *map(str, paths)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0 and process.stdout.endswith("passed 3\n"), process.stderr[-3000:]

"""The benchmark of vLLM: what it counts as another answer, its table, and the whole of it where there is a vLLM."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import engines, environments
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning

ROOT = Path(__file__).parent.parent
PYTHON = os.environ.get("VLLM_PYTHON")


def test_another_answer_is_named_with_the_token_where_it_parts():
    names = {5: "red", 6: "star", 7: "circle", 3: ""}
    tokenizer = SimpleNamespace(decode=lambda ids, **_: " ".join(names[id] for id in ids))
    pipeline = SimpleNamespace(family=SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenizer)))
    image = SimpleNamespace(name="1.png")
    sets = [SimpleNamespace(images=[image], question=f"q{n}", input_ids=torch.tensor([1, 4])) for n in range(3)]
    answered = engines.Generated([[5, 6, 3], [5, 7, 3], [5]], [[1, 4], [1, 4], [4]])
    different = engines.differences(pipeline, sets, [[5, 6, 3]] * 3, answered)
    about = {"image": "1.png", "generate": "red star"}
    assert different == [
        about | {"question": "q1", "vllm": "red circle", "from_token": 1, "same_prompt": True},
        about | {"question": "q2", "vllm": "red", "from_token": 1, "same_prompt": False},
    ]


def test_the_table_has_medians_and_ratios_of_turns():
    ways = ("vLLM picture", "vLLM full", "vLLM pruned", "prune alone", "batch full", "batch pruned")
    turns = {
        way: [{"seconds": n * scale, "cpu": n * scale / 2} for scale in (1, 2, 9)] for n, way in enumerate(ways, 1)
    }
    different = {way: [] for way in engines.WAYS}
    result = {"engine": "vLLM", "questions": 12, "images": 3, "tokens": {"full": 256, "pruned": 28}, "measured": turns}
    result |= {"same": dict.fromkeys(engines.WAYS, 12), "different": different | {"pruned": [{"question": "q"}]}}
    lines = list(engines.report(result))
    assert "| vLLM, from exported sets with 28 tokens | 4 | 4 |" in lines
    assert "| both of these, one after the other | 2 | 2 |" in lines
    assert "batch pruned : batch full = 0.83 of CPU, 0.83 by the clock (medians of 3 turns)" in lines
    assert '  {"question": "q"}' in lines


def test_an_environment_that_works_is_left_as_it_is(tmp_path, capfd):
    """One whose Python imports everything, by way of a script in its place, is not installed into."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    log = tmp_path / "log"
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    python.chmod(0o755)
    assert environments.vllm_environment(tmp_path) == python
    assert "pip" not in log.read_text() and "from vllm import LLM" in log.read_text()
    assert capfd.readouterr().err == ""
    python.write_text("#!/bin/sh\ncase $2 in *'from vllm'*) echo no vLLM >&2; exit 1;; esac\n")
    with pytest.raises(SystemExit, match="no vLLM"):
        environments.vllm_environment(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="VLLM_PYTHON does not name a Python with vLLM")
def test_vllm_answers_as_generate_does(tmp_path):
    """The embedded model as it ships, 40 held-out questions: from pictures, from all tokens, from pruned sets."""
    output = tmp_path / "engines.json"
    options = ("--environment", Path(PYTHON).parents[1], "--questions", 40, "--rounds", 1, "-o", output)
    command = [sys.executable, "-m", "benchmarks.engines", *map(str, options)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    result = json.loads(output.read_text())
    assert result["same"] == dict.fromkeys(engines.WAYS, 40) and not any(result["different"].values())
    assert result["tokens"] == {"full": 256, "pruned": 28} and result["images"] == 10
    assert "answers as of `generate`, token by token, from pruned: 40 of 40" in process.stdout


def test_sets_of_the_benchmark_are_pruned_and_compact(tmp_path):
    """What is written for vLLM is one file for each question, in their order."""
    pipeline = Pipeline("scenes", dtype="float32", device="cpu")
    asked = engines.write_questions(tmp_path, 3)
    assert len({image for image, _ in asked}) == 1 and len({text for _, text in asked}) == 3
    pruning = replace(Pruning(positions="compact"), tokens=5)
    requests = [engines.Request((image,), text, pruning) for image, text in asked]
    sets = engines.export(pipeline, requests, tmp_path / "pruned")
    assert [len(pruned.kept) for pruned in sets] == [5] * 3
    assert [pruned.question for pruned in sets] == [text for _, text in asked]
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == [
        f"{n:05}.vllm.safetensors" for n in range(3)
    ]

"""Scores of lmms-eval against those of `gridprune eval`, on the same questions: `python -m benchmarks.lmms -o run`.

It runs in an environment where lmms-eval is installed beside this package (docs/evaluation.md says how), and needs no
network. Questions about held-out scenes become a local task of lmms-eval, in `run/task`. `gridprune eval` answers them
under every method at every keep; then lmms-eval does, in a run for each, and scores them by its own metric. Each answer
and each score must be equal; what is not is listed, and the exit code is 1.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gridprune_cli.cli.evaluate import read_shares
from gridprune_cli.evaluation.data import open_data

BATCH, MAX_NEW_TOKENS = 16, 16  # the defaults of `gridprune eval`, so that batches are alike

TASK = """\
task: scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.to_images
doc_to_text: !function functions.to_text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: {max_new_tokens}
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
"""

FUNCTIONS = """\
from PIL import Image


def to_images(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


@dataclass(frozen=True)
class Scored:
    """An answer with its score, 0 to 1."""

    answer: str
    score: float


Scores = dict[str, Scored]  # by the question's id


@dataclass(frozen=True)
class Comparison:
    """One method at one keep: what lmms-eval answered, and `gridprune eval`; and the mean that lmms-eval reports."""

    method: str
    keep: float
    reported: float
    by_lmms: Scores
    by_eval: Scores

    @property
    def different(self) -> list[str]:
        """Ids of questions that one of both did not answer, answered in another way, or scored in another way."""
        ids = self.by_eval.keys() | self.by_lmms.keys()
        return sorted(id for id in ids if self.by_eval.get(id) != self.by_lmms.get(id))

    @property
    def mean(self) -> float:
        """The score of `gridprune eval`."""
        return sum(scored.score for scored in self.by_eval.values()) / len(self.by_eval)

    @property
    def equal(self) -> bool:
        return not self.different and abs(self.reported - self.mean) < 1e-9


def write_task(folder: Path, count: int) -> None:
    """Writes a local task of lmms-eval, with its data: questions about held-out scenes, those of `scenes:COUNT`."""
    folder.mkdir(parents=True)
    data = open_data(f"scenes:{count}")
    lines = []
    for item in data.items:
        (name,) = item.images
        path, (answer,) = folder / f"{name.replace(' ', '-')}.png", item.answers
        source = data.find(name)
        assert isinstance(source, bytes)
        path.write_bytes(source)
        line = {"id": item.id, "image": str(path), "question": item.question, "answer": answer}
        lines.append(json.dumps(line) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), "utf-8")
    task = TASK.format(questions=json.dumps(str(folder / "questions.jsonl")), max_new_tokens=MAX_NEW_TOKENS)
    (folder / "scenes.yaml").write_text(task, "utf-8")
    (folder / "functions.py").write_text(FUNCTIONS, "utf-8")


def run_eval(folder: Path, count: int, methods: Sequence[str], keep: str) -> dict[tuple[str, float], Scores]:
    """Answers and scores of `gridprune eval`, by method and keep."""
    command = ["gridprune_cli", "eval", f"scenes:{count}", "--model", "scenes", "--output", str(folder)]
    command += ["--methods", ", ".join(methods), "--keep", keep, "--quiet"]
    _run([*command, "--batch-size", str(BATCH), "--max-new-tokens", str(MAX_NEW_TOKENS)])
    scores: dict[tuple[str, float], Scores] = {}
    for line in _lines(folder / "samples.jsonl"):
        scores.setdefault((line["cell"], line["keep"]), {})[line["id"]] = Scored(line["answer"], line["score"])
    return scores


def run_lmms(task: Path, folder: Path, method: str, keep: float) -> tuple[float, Scores]:
    """The mean that lmms-eval reports for a method at a keep, and its answers and scores.

    Raises SystemExit, with lmms-eval's last lines, where it wrote no results. Its exit code is 0 even then.
    """
    command = ["lmms_eval", "--model", "gridprune", "--model_args", f"pretrained=scenes,method={method},keep={keep:g}"]
    command += ["--tasks", "scenes", "--include_path", str(task), "--batch_size", str(BATCH)]
    log = _run([*command, "--output_path", str(folder), "--log_samples"])
    results = list(folder.rglob("*_results.json"))
    if not results:
        sys.exit(f"lmms-eval wrote no results for {method} at {keep:g}:\n{log[-3000:]}")
    (reported,) = (json.loads(path.read_text("utf-8"))["results"]["scenes"]["exact_match,none"] for path in results)
    (samples,) = folder.rglob("*_samples_scenes.jsonl")
    ids = [line["id"] for line in _lines(task / "questions.jsonl")]
    return reported, {ids[line["doc_id"]]: _scored(line) for line in _lines(samples)}


def _scored(line: Mapping[str, Any]) -> Scored:
    """An answer as lmms-eval logs it: 0.7.3 a text, others a list with one."""
    answers = line["filtered_resps"]
    return Scored(answers if isinstance(answers, str) else answers[0], float(line["exact_match"]))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _run(module: Sequence[str]) -> str:
    """Runs `python -m` of this environment: what it wrote. Raises SystemExit, with its last lines, where it fails."""
    command = [sys.executable, "-m", *module]
    process = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}:\n{process.stdout[-3000:]}")
    return process.stdout


def report(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """The table, in per cent, and under it the answers that differ."""
    yield "| method | keep | lmms-eval | `gridprune eval` | questions | equal |"
    yield "|---|---:|---:|---:|---:|---:|"
    for cell in comparisons:
        equal = len(cell.by_eval) - len(cell.different)
        means = f"{100 * cell.reported:.1f} | {100 * cell.mean:.1f}"
        yield f"| {cell.method} | {cell.keep:g} | {means} | {len(cell.by_eval)} | {equal} |"
    for cell in comparisons:
        for id in cell.different:
            yield f"{cell.method} at {cell.keep:g}, {id}: {cell.by_lmms.get(id)}, eval: {cell.by_eval.get(id)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="a new folder for the task and all answers")
    parser.add_argument("--questions", type=int, default=160)
    parser.add_argument("--methods", default="gridprune,random", help="names, with commas between")
    parser.add_argument("--keep", default="0.11,0.05")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} is there already; name a new folder")
    output, methods = args.output.resolve(), [name.strip() for name in args.methods.split(",")]
    write_task(output / "task", args.questions)
    # of the processes below: no network, and all that they cache goes into the new folder
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(output / "hub"), "GRIDPRUNE_CACHE_DIR": str(output / "cache")}
    by_eval = run_eval(output / "eval", args.questions, methods, args.keep)
    comparisons = []
    for method in methods:
        for keep in read_shares(args.keep):
            print(f"lmms-eval {version('lmms_eval')}: {method} at {keep:g}", file=sys.stderr, flush=True)
            reported, by_lmms = run_lmms(output / "task", output / f"{method}-{keep:g}", method, keep)
            comparisons.append(Comparison(method, keep, reported, by_lmms, by_eval[method, keep]))
    print("\n".join(report(comparisons)))
    sys.exit(0 if all(cell.equal for cell in comparisons) else 1)


if __name__ == "__main__":
    main()

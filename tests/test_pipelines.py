"""The page of pipelines: every command runs as it is printed."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "pipelines.md"


pytestmark = pytest.mark.skipif(not shutil.which("bash") or not shutil.which("jq"), reason="needs bash and jq")


@pytest.fixture
def shell(tmp_path, server):
    """Runs a block of the page in a folder with the sample images, and gives what it prints."""
    shutil.copytree(ROOT / "sample_images", tmp_path / "sample_images")
    path = {"PATH": f"{server.program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def run(block):
        done = subprocess.run(
            ["bash", "-c", f"set -e -o pipefail\n{block}"],
            cwd=tmp_path,
            env=os.environ | path,
            capture_output=True,
            text=True,
        )
        quits = "| head" in block  # its writer ends by SIGPIPE, which pipefail reports
        assert done.returncode in ((0, 141) if quits else (0,)), f"{block}\n{done.stderr}"
        assert "Traceback" not in done.stderr
        return done.stdout

    return run


def blocks():
    """The commands of the page; those with Ray, which need it, apart."""
    text = PAGE.read_text("utf-8")
    commands = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(commands) == len(re.findall("^```", text, re.MULTILINE)) // 2 == 13
    return [block for block in commands if "--engine ray" not in block], [b for b in commands if "--engine ray" in b]


@pytest.mark.slow
def test_the_pipelines_with_ray_run_as_printed(shell, request, monkeypatch):
    """On a Ray that runs already; that commands start their own is tested with the engine."""
    pytest.importorskip("ray.data", reason="needs Ray: pip install 'gridprune[ray]'")
    monkeypatch.setenv("RAY_ADDRESS", request.getfixturevalue("address"))
    plain, (ray,) = blocks()
    shell(next(block for block in plain if "-o answers.jsonl" in block))
    shell(ray)  # it compares


def test_every_pipeline_runs_as_printed(shell, tmp_path):
    printed = [shell(block) for block in blocks()[0]]

    def lines(name):
        return (tmp_path / name).read_text().splitlines()

    answers = lines("answers.jsonl")
    count = len((tmp_path / "sample_images" / "questions.jsonl").read_text().splitlines())
    assert len(answers) == count
    assert sorted(lines("all.jsonl")) == sorted(answers)
    assert [*map(json.loads, lines("good.jsonl"))] == [*map(json.loads, answers)]  # jq writes without spaces
    by_id = {record["id"]: record["answer"] for record in map(json.loads, answers)}
    assert {Path(r["file"]).stem: r["answer"] for r in map(json.loads, lines("generated.jsonl"))} == by_id
    (right,) = re.findall(rf'^"(\d+) of {count}"$', "".join(printed), re.MULTILINE)
    assert int(right) >= 0.9 * count
    assert answers[0] in "".join(printed).splitlines()
    assert sum("\t" in line for line in "".join(printed).splitlines()) == 8

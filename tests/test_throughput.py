"""What the benchmark compares `encode` with."""

import sys

import pytest

from benchmarks import throughput
from tests.test_shapes import shrunk


def test_a_shape_is_encoded_beside_the_layers_that_are_read(monkeypatch, capsys):
    run = []
    monkeypatch.setattr(throughput, "find_shape", shrunk)
    monkeypatch.setattr(throughput, "report", lambda *costs: run.append(costs))
    monkeypatch.setattr(
        sys, "argv", ["throughput", "encode", "--shape", "llava-1.5-7b", "--images", "2", "--shares", "2"]
    )
    throughput.main()
    ((name, count, _, costs, others),) = run
    assert (name, count, len(costs), list(others)) == ("encode", 2, 3, ["its layers that are read"])


def test_ratios_are_of_the_shares_behind_the_first(capsys):
    def costs(*walls):
        return [throughput.Cost(wall, 2 * wall) for wall in walls]

    throughput.report("encode", 10, "images", costs(9, 1, 1), {"tower": costs(1, 0.5, 1)})
    first, second = capsys.readouterr().out.splitlines()
    assert "5.0 images/s, 400.0 ms of CPU each" in first
    assert "6.7 images/s, 300.0 ms" in second and "0.75 times as fast (shares: 0.50 to 1.00)" in second


def test_a_shape_answers_no_questions(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["throughput", "questions", "--shape", "llava-1.5-7b"])
    with pytest.raises(SystemExit):
        throughput.main()
    assert "--shape is of encode alone" in capsys.readouterr().err

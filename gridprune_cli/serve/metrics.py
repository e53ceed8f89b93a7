"""What the server counts, in the text format of Prometheus."""

from collections import Counter
from collections.abc import Sequence
from threading import Lock

from gridprune_cli.serve.replies import Outcome

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # upper bounds of the histogram's buckets

_HELP = {
    "requests_total": ("counter", "Requests by path and status."),
    "request_seconds": ("histogram", "Seconds of a question from its arrival to the end of its answer."),
    "requests_waiting": ("gauge", "Questions that wait for their turn."),
    "held_bytes": ("gauge", "Bytes of request bodies, pictures and results that are held."),
    "batches_total": ("counter", "Batches that were answered."),
    "batch_seconds_total": ("counter", "Seconds of work on batches."),
    "questions_total": ("counter", "Questions that were answered."),
    "prompt_tokens_total": ("counter", "Tokens that the language model got."),
    "completion_tokens_total": ("counter", "Tokens of answers."),
    "visual_tokens_total": ("counter", "Visual tokens of the pictures that were asked about."),
    "kept_tokens_total": ("counter", "Visual tokens that pruning kept of these."),
    "image_hits_total": ("counter", "Pictures that were found in the cache."),
    "image_misses_total": ("counter", "Pictures that went through the vision tower."),
}


class Metrics:
    """Counters that any thread may raise."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._buckets = [0] * len(SECONDS)

    def add_request(self, path: str, status: int) -> None:
        with self._lock:
            self._requests[path, status] += 1

    def add_batch(self, seconds: float) -> None:
        with self._lock:
            self._counts["batches_total"] += 1
            self._counts["batch_seconds_total"] += seconds  # type: ignore[assignment]

    def add_images(self, hits: Sequence[bool]) -> None:
        """Counts pictures of a request, each with whether it was found in the cache."""
        with self._lock:
            self._counts.update(image_hits_total=sum(hits), image_misses_total=len(hits) - sum(hits))

    def add_outcome(self, outcome: Outcome) -> None:
        seconds = outcome.record["ms"]["total"] / 1e3
        with self._lock:
            self._counts.update(
                questions_total=1,
                prompt_tokens_total=outcome.prompt_tokens,
                completion_tokens_total=outcome.completion_tokens,
                visual_tokens_total=outcome.record["tokens"]["full"],
                kept_tokens_total=outcome.record["tokens"]["kept"],
            )
            self._counts["seconds"] += seconds
            self._buckets = [count + (seconds <= most) for count, most in zip(self._buckets, SECONDS, strict=True)]

    def image_hits(self) -> tuple[int, int]:
        """Pictures that were found in the cache since the start, and those that were not."""
        with self._lock:
            return int(self._counts["image_hits_total"]), int(self._counts["image_misses_total"])

    def to_text(self, gauges: dict[str, int]) -> str:
        """All of it, with what the caller measures now."""
        with self._lock:
            lines: list[str] = []
            for name, (kind, text) in _HELP.items():
                full = f"gridprune_{name}"
                lines += [f"# HELP {full} {text}", f"# TYPE {full} {kind}"]
                if name == "requests_total":
                    lines += [
                        f'{full}{{path="{path}",status="{status}"}} {count}'
                        for (path, status), count in sorted(self._requests.items())
                    ]
                elif kind == "histogram":
                    total = self._counts["questions_total"]
                    lines += [
                        f'{full}_bucket{{le="{most:g}"}} {count}'
                        for most, count in zip(SECONDS, self._buckets, strict=True)
                    ]
                    lines += [f'{full}_bucket{{le="+Inf"}} {total}', f"{full}_sum {self._counts['seconds']}"]
                    lines += [f"{full}_count {total}"]
                else:
                    lines += [f"{full} {gauges.get(name, self._counts[name])}"]
        return "\n".join(lines) + "\n"

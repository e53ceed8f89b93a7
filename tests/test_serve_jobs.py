"""The queue of requests: one of each client in turn, those of one group together."""

import asyncio
from collections.abc import Iterator

import pytest

from gridprune_cli.serve.jobs import FairQueue, Job
from gridprune_cli.serve.replies import Outcome
from gridprune_cli.serve.wire import ChatRequest, Sampling

GREEDY = Sampling()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def put(loop):
    """Puts a job into a queue, as `ann 1` asks for it."""

    def put(queue: FairQueue, name: str, sampling: Sampling = GREEDY, cache: bool = True) -> Job:
        request = ChatRequest("scenes", name, (), sampling=sampling, cache=cache)
        job = Job(request, (), (), ("127.0.0.1", name.split()[0]), loop=loop)
        queue.put(job)
        return job

    return put


def names(jobs: list[Job]) -> list[str]:
    return [job.request.question for job in jobs]


def test_clients_take_turns(put):
    queue = FairQueue()
    for name in ("ann 1", "ann 2", "ann 3", "ann 4", "bob 1", "cyd 1", "cyd 2"):
        put(queue, name)
    assert names(queue.take(4)) == ["ann 1", "bob 1", "cyd 1", "ann 2"] and len(queue) == 3
    put(queue, "dan 1")
    assert names(queue.take(9)) == ["cyd 2", "ann 3", "dan 1", "ann 4"]
    assert queue.take(9) == [] and len(queue) == 0


def test_a_batch_is_of_one_group_and_none_is_passed_over_for_ever(put):
    queue, warm = FairQueue(), Sampling(0.7)
    for name, sampling in (("ann 1", Sampling()), ("bob 1", warm), ("ann 2", Sampling()), ("bob 2", warm)):
        put(queue, name, sampling)
    put(queue, "cyd 1", cache=False)
    assert names(queue.take(9)) == ["ann 1", "ann 2"]
    assert names(queue.take(9)) == ["bob 1", "bob 2"]
    assert names(queue.take(9)) == ["cyd 1"]


def test_what_has_a_seed_is_answered_alone(put):
    queue = FairQueue()
    for name in ("ann 1", "bob 1"):
        put(queue, name, Sampling(0.7, seed=1))
    assert [names(queue.take(9)) for _ in range(3)] == [["ann 1"], ["bob 1"], []]


def test_who_left_takes_no_place(put):
    queue = FairQueue()
    jobs = [put(queue, f"ann {n}") for n in range(4)]
    jobs[0].cancelled = jobs[2].cancelled = True
    assert names(queue.take(2)) == ["ann 1", "ann 3"] and len(queue) == 0


def test_all_can_be_taken_out(put):
    queue = FairQueue()
    jobs = [put(queue, name) for name in ("ann 1", "bob 1", "ann 2")]
    assert sorted(names(queue.remove(lambda job: job is not jobs[1]))) == ["ann 1", "ann 2"]
    assert names(queue.take(9)) == ["bob 1"]


def test_a_job_tells_its_loop_from_another_thread(put, loop):
    job = put(FairQueue(), "ann 1")

    async def first() -> object:
        await asyncio.to_thread(job.tell, "red")
        assert not job.resolved
        await asyncio.to_thread(job.tell, Outcome("red", 1, 1, 1, "stop", {}))
        return await job.events.get()

    assert loop.run_until_complete(first()) == "red" and job.resolved
    loop.close()
    job.tell("to nobody")  # the connection is gone with its loop

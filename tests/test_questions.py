"""Lines of questions: what is read from them, what is found again, and that nothing is waited for or held."""

import json
import os
import threading
import time
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridprune_cli.cli.batch import line as line_of
from gridprune_cli.cli.output import lines_to
from gridprune_cli.cli.values import in_shard
from gridprune_cli.errors import BadInput
from gridprune_cli.questions import MAX_IMAGES, MAX_LINE, MAX_QUESTION, Done, Reader, parse, windows


def item(**fields):
    return parse(json.dumps({"image": "a.png", "question": "What?"} | fields).encode(), "x:1")


def test_a_line_is_read():
    line_item = item(id=7, keep=0.5, answers=["red"], note=None)
    assert (line_item.id, line_item.images, line_item.question, line_item.keep) == (7, ("a.png",), "What?", 0.5)
    assert line_item.extra == {"answers": ["red"], "note": None} and line_item.fault is None
    assert item(image=["a.png", "b.png"]).images == ("a.png", "b.png")
    assert item(image=["a.png", "b.png"]).echo()["image"] == ["a.png", "b.png"]


def test_a_line_without_an_id_is_known_by_what_it_says():
    first = parse(b'{"image": "a.png",  "question": "What?"}', "x:1")
    second = parse(b'{"question": "What\\u003f", "image": "a.png"}\n', "y:9")
    assert first.id == second.id and len(first.id) == 16
    assert len({item(keep=keep).id for keep in (0.1, 0.2)} | {first.id}) == 3
    assert isinstance(item(id=None).id, str)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"nothing", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"image": "a.png", "question": "What?", "keep": NaN}', "NaN is no JSON"),
        (b"[" * 100_000, "nested more than 100 deep"),
        (
            b'{"image": "a.png", "question": "What?", "x": ' + b"[" * 100 + b"]" * 100 + b"}",
            "nested more than 100 deep",
        ),
        (b'{"image": "a.png", "question": "What?", "x": "' + b"y" * MAX_LINE + b'"}', "longer than 1048576 bytes"),
        (b'{"image": "a.png", "question": " "}', "the question is empty"),
        (b'{"image": "a.png", "question": "\\ud800"}', "half a character"),
        (json.dumps({"image": "a.png", "question": "x" * (MAX_QUESTION + 1)}).encode(), "has 65537 characters"),
        (json.dumps({"image": ["a.png"] * (MAX_IMAGES + 1), "question": "What?"}).encode(), "about 65 images"),
        (b'{"image": "a.png", "question": "What?", "keep": 1' + b"0" * 4000 + b"}", "keep 1000"),
        (b"[]", "not an object"),
        (b'{"question": "What?"}', "image is no path"),
        (b'{"image": [], "question": "What?"}', "image is no path"),
        (b'{"image": ["a.png", 3], "question": "What?"}', "image is no path"),
        (b'{"image": "", "question": "What?"}', "image is no path"),
        (b'{"image": "-", "question": "What?"}', "image -: "),
        (b'{"image": ["a.png", "-"], "question": "What?"}', "image -: "),
        (b'{"image": "a.png"}', "question is no text"),
        (b'{"image": "a.png", "question": "What?", "keep": 0}', "keep 0: must be above 0"),
        (b'{"image": "a.png", "question": "What?", "keep": true}', "keep True"),
        (b'{"image": "a.png", "question": "What?", "keep": "1"}', "keep '1'"),
        (b'{"image": "a.png", "question": "What?", "id": {}}', "id is no text"),
    ],
)
def test_lines_that_cannot_be_used(line, message):
    line_item = parse(line, "x:3")
    assert line_item.fault is not None and line_item.fault.startswith("x:3: ") and message in line_item.fault
    assert isinstance(line_item.id, str) and "\n" not in line_item.fault and len(line_item.fault) < 200


def test_what_is_as_deep_and_as_long_as_it_may_be_is_read_echoed_and_read_again(tmp_path):
    """Also in a thread, as `windows` reads, whose stack starts elsewhere than the writer's."""
    values = {depth: "[" * depth + "]" * depth for depth in (1, 50, 99, 100, *range(975, 990), 5000)}
    values[2000] = '"' + "\x85" * (MAX_LINE // 2 - 40) + '"'
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    lines = [f'{{"id": {i}, "image": "a.png", "question": "What?", "x": {x}}}\n' for i, x in values.items()]
    path.write_text("".join(lines), "utf-8")
    items = [item for window in windows(Reader(str(path)), 9, lambda item: item.size) for item in window]
    assert [item.id for item in items if not item.fault] == [1, 50, 99, 2000]
    with lines_to(out) as write:
        for item in items:
            write(line_of(item, BadInput("x")))
    done = Done(out)
    assert all(done.take(item.id) for item in items) and done.failed == len(items)


def test_lines_that_are_too_long_are_passed_over_in_little_memory(tmp_path):
    path = tmp_path / "q.jsonl"
    good = json.dumps({"id": 1, "image": "a.png", "question": "What?"}).encode()
    whole = good + b" " * (MAX_LINE - len(good))  # just as long as one may be
    with open(path, "wb") as file:
        file.write(whole + b"\n" + good + b"\n")
        file.truncate(300 << 20)  # the third has 300 MB of nothing in it
        file.seek(0, 2)
        file.write(b"\n" + good)
    tracemalloc.start()
    reader = Reader(str(path))
    assert [item.fault and item.place for item in reader] == [None, None, f"{path}:3", None] and reader.count() == 4
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_a_window_ends_where_its_lines_would_be_too_many_bytes():
    assert all(len(window) <= 3 for window in windows(range(10), 10, lambda _: 6 << 20))


def write(path, *ids, end=""):
    text = "".join(json.dumps({"id": ident, "answer": "yes"}) + "\n" for ident in ids)
    path.write_text(text + end)


@given(st.data())
def test_what_is_done_is_found_in_any_order(tmp_path_factory, data):
    """Against a plain list: each line that was written counts once."""
    path = tmp_path_factory.mktemp("done") / "out.jsonl"
    ids = st.one_of(st.integers(0, 5), st.sampled_from("abc"))
    written = data.draw(st.lists(ids, max_size=12))
    asked = written[: data.draw(st.integers(0, len(written)))] + data.draw(st.lists(ids, max_size=12))
    write(path, *written)
    done, left = Done(path), list(written)
    for ident in asked:
        expected = ident in left
        if expected:
            left.remove(ident)
        assert done.take(ident) == expected


def test_a_torn_last_line_is_dropped(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 1, 2, end='{"id": 3, "ans')
    done = Done(path)
    assert [done.take(i) for i in (1, 2, 3)] == [True, True, False]
    assert path.read_text().endswith('{"id": 2, "answer": "yes"}\n')
    for torn in ('{"id": 3', '{"i', "{"):
        path.write_text(torn)
        assert not Done(path).take(3) and path.read_bytes() == b""
    assert not Done(tmp_path / "none.jsonl").take(1)
    long = tmp_path / "long.jsonl"
    write(long, 1, end='{"id": 2, "answer": "' + "x" * 200_000)
    assert Done(long).take(1) and os.path.getsize(long) == len('{"id": 1, "answer": "yes"}\n')


@pytest.mark.parametrize(
    "text", ["hello", "\x89PNG", "[]\nhello", '{"image": "a.png", "question": "What?"}\n', '{"id": 1}\n']
)
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path, text):
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(BadInput, match="line 1 is no result"):
        Done(path)
    assert path.read_text() == text


def test_results_that_jq_has_written_again_are_results(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"id":1,"answer":"yes"}\n{"answer":"no","id":"b"}\n{"id":3')
    done = Done(path)
    assert [done.take(ident) for ident in (1, "b", 3)] == [True, True, False]
    assert path.read_text().endswith('"b"}\n')


def test_what_is_written_while_it_is_read_is_not_taken_for_done(tmp_path):
    path = tmp_path / "out.jsonl"
    write(path, 1)
    done = Done(path)
    with path.open("a") as file:
        file.write('{"id": 2, "answer": "no"}\n')
    assert [done.take(1), done.take(2)] == [True, False]


def test_failures_of_before_are_counted(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_text('{"id": 1, "error": "x", "error_type": "BadInput"}\n{"id": 2, "answer": ""}\n')
    done = Done(path)
    assert done.take(1) and done.take(2) and done.failed == 1


def test_a_reader_skips_what_is_done_and_what_is_not_its_own(tmp_path):
    path = tmp_path / "q.jsonl"
    lines = [{"id": i, "image": f"{i % 7}.png", "question": "What?"} for i in range(40)]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    assert [i.id for i in Reader(str(path))] == list(range(40)) and Reader(str(path)).count() == 40
    assert Reader(str(path)).place("a.png") == str(tmp_path / "a.png")
    assert Reader(str(path)).place("/b.png") == "/b.png"
    shares = [[i.id for i in Reader(str(path), in_shard=in_shard(f"{n}/3"))] for n in range(3)]
    assert sorted(i for share in shares for i in share) == list(range(40))
    for share in shares:  # questions about one image stay together
        assert {i % 7 for i in share}.isdisjoint(i % 7 for i in range(40) if i not in share)
    out = tmp_path / "out.jsonl"
    write(out, 0, 1, 5)
    reader = Reader(str(path), done=Done(out))
    assert [i.id for i in reader] == [i for i in range(40) if i not in (0, 1, 5)] and reader.skipped == 3
    with pytest.raises(BadInput, match="nothing"):
        Reader(str(tmp_path / "nothing.jsonl"))


@given(st.lists(st.text(), unique=True), st.lists(st.text()), st.integers(1, 9))
def test_shards_part_names_and_never_reshuffle(names, more, count):
    shards = [in_shard(f"{n}/{count}") for n in range(count)]
    owners = {name: [n for n in range(count) if shards[n](name)] for name in names}
    assert all(len(owner) == 1 for owner in owners.values())
    assert {name: [n for n in range(count) if shards[n](name)] for name in [*more, *names]}.items() >= owners.items()


def test_shards_are_the_same_in_every_version():
    """Runs of a later version go on with the shares of an earlier one."""
    second = in_shard("1/3")
    assert [n for n in range(12) if second(f"{n}.png")] == [0, 1, 2, 5, 7, 8]


@pytest.mark.parametrize("text", ["", "1", "1/1", "4/4", "-1/4", "a/b", "0/0", "1/2/3", " 0/2"])
def test_shards_that_are_none(text):
    with pytest.raises(BadInput, match=r"^shard=.*not I/N"):
        in_shard(text)


def test_windows_hold_what_has_come():
    parts = list(windows(range(10), 4))
    assert (
        [i for window in parts for i in window] == list(range(10))
        and max(map(len, parts)) <= 4
        and min(map(len, parts)) > 0
    )
    assert list(windows([], 4)) == []


def test_a_slow_source_is_not_waited_for():
    go = threading.Event()

    def source():
        yield 1
        yield 2
        assert go.wait(60)  # the next line comes only after the first are done with
        yield 3

    got, first = windows(source(), 100), []
    while len(first) < 2:
        first += next(got)
    assert first == [1, 2]
    go.set()
    assert next(got) == [3]


def test_a_fast_source_is_not_read_far_ahead():
    read = []

    def source():
        for number in range(10_000):
            read.append(number)
            yield number

    got = windows(source(), 5)
    assert next(got)[0] == 0
    time.sleep(0.1)
    assert len(read) <= 12


def test_a_source_that_fails_gives_what_came_before():
    def source():
        yield 1
        raise BadInput("torn")

    got = windows(source(), 5)
    assert next(got) == [1]
    with pytest.raises(BadInput, match="torn"):
        next(got)

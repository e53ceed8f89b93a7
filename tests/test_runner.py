"""Many images and questions at once: the same as one by one, whatever memory does and whatever fails."""

import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from PIL import ImageFile

from gridprune_cli import encoder as encoder_module
from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners import images as images_module
from gridprune_cli.runners import local as local_module
from gridprune_cli.runners.batches import Batches, in_order
from gridprune_cli.runners.local import Pruned, Reply
from gridprune_cli.runners.reading import Room
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import EncodedImage

QUESTIONS = ("What colour is the star?", "Where is it?", "How many red circles are left of the blue square?")


@pytest.fixture
def pipeline(tiny_llava):
    return Pipeline(str(tiny_llava), store=open_store(), dtype="float32")


@pytest.fixture
def pictures(tmp_path, noise):
    paths = []
    for seed in range(7):
        paths.append(tmp_path / f"{seed}.png")
        noise((40 + 20 * seed, 60), seed).image.save(paths[-1])
    return paths


@pytest.fixture(autouse=True)
def _only_expected_warnings(caplog):
    """A test that expects warnings clears them."""
    yield
    assert not [record.getMessage() for record in caplog.records if record.name.startswith("gridprune_cli")]


def fresh(tiny_llava):
    return Pipeline(str(tiny_llava), dtype="float32")


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", range(1, 9))
def test_batches_shrink_to_what_fits_and_lose_nothing(most, caplog):
    sizes = []

    def work(items):
        if len(items) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(items))
        return [item * 10 for item in items]

    batches = Batches(8, "things")
    assert list(batches.run(range(30), work)) == [item * 10 for item in range(30)]
    assert max(sizes) == batches.size == 2 ** (most.bit_length() - 1)
    halvings = (8 // batches.size).bit_length() - 1
    assert len(caplog.messages) == halvings
    if halvings:
        assert caplog.messages[0] == "memory ran out with 8 things at once; going on with 4"
    sizes.clear()
    list(batches.run(range(8), work))  # the smaller size stays
    assert len(caplog.messages) == halvings
    caplog.clear()


@pytest.mark.parametrize(
    "fault", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: no")]
)
def test_what_does_not_fit_alone_is_a_fault_and_the_rest_goes_on(fault, caplog):
    def work(items):
        if 3 in items:
            raise fault
        return items

    results = list(Batches(4, "things").run(range(6), work))
    assert [r for r in results if not isinstance(r, GridpruneError)] == [0, 1, 2, 4, 5]
    assert "memory ran out for this one alone" in str(results[3])
    caplog.clear()


def test_one_at_fault_does_not_take_its_batch_along():
    def work(items):
        if 2 in items:
            raise BadInput("two is bad")
        if 5 in items:
            raise ZeroDivisionError("by five\nand more")
        return items

    results = list(Batches(4, "things").run(range(8), work))
    assert [r for r in results if isinstance(r, int)] == [0, 1, 3, 4, 6, 7]
    assert isinstance(results[2], BadInput) and str(results[2]) == "two is bad"
    assert str(results[5]) == "unexpected ZeroDivisionError: by five"
    assert isinstance(results[5].__cause__, ZeroDivisionError)


def test_values_come_in_order_as_soon_as_they_can():
    taken = []

    def pairs():
        for index in (2, 0, 1, 4, 3):
            taken.append(index)
            yield index, str(index)

    ordered = in_order(pairs())
    assert next(ordered) == "0" and taken == [2, 0]
    assert list(ordered) == ["1", "2", "3", "4"]


# ---- encode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 16])
def test_encoding_in_bulk_gives_what_encoding_alone_gives(pipeline, pictures, tiny_llava, size):
    results = list(pipeline.runner(images=size).encode(pictures))
    assert [name for name, _, _ in results] == [str(path) for path in pictures]
    assert not any(hit for _, _, hit in results)
    alone = fresh(tiny_llava)
    for path, (name, encoded, _) in zip(pictures, results, strict=True):
        single = alone.encode(path)[0]
        assert (encoded.key, encoded.name, encoded.views) == (single.key, name, single.views)
        assert torch.allclose(encoded.vision_features, single.vision_features, atol=1e-5)
        assert torch.allclose(encoded.saliency, single.saliency, atol=1e-5)
        stored = pipeline.encoder.look_up(encoded.image, name)  # what was given was written before
        assert stored is not None and torch.equal(stored.vision_features, encoded.vision_features)
    again = list(pipeline.runner().encode(pictures))
    assert all(hit for _, _, hit in again)
    assert all(hit is False for _, _, hit in pipeline.runner().encode(pictures, refresh=True))


def test_what_else_is_in_a_batch_leaves_an_image_s_saliency_alone(noise):
    """To the last bit: of what else is in a batch of one size, and, where the tower's products round alike, of its
    size. So entries are the same files."""
    pipeline = Pipeline("scenes", dtype="float32")
    pictures, others = ([noise((224, 224), seed) for seed in range(first, first + 6)] for first in (0, 10))
    single = [pipeline.encoder.run_tower([picture])[0] for picture in pictures]
    for size in (2, 5, 6):
        batches = [encoded for i in range(0, 6, size) for encoded in pipeline.encoder.run_tower(pictures[i : i + size])]
        for alone, encoded in zip(single, batches, strict=True):
            assert torch.allclose(encoded.vision_features, alone.vision_features, atol=1e-4)
            assert torch.allclose(encoded.saliency, alone.saliency, atol=1e-6)
            if torch.equal(encoded.vision_features, alone.vision_features):
                assert torch.equal(encoded.saliency, alone.saliency)
        mixed = pipeline.encoder.run_tower([pictures[0], *others[1:size]])[0]
        assert torch.equal(mixed.vision_features, batches[0].vision_features)
        assert torch.equal(mixed.saliency, batches[0].saliency)


def test_the_same_file_many_times_goes_through_the_tower_once(pipeline, pictures, monkeypatch):
    seen = []
    run_tower = pipeline.family.encode
    monkeypatch.setattr(
        pipeline.family, "encode", lambda batch, optional: seen.extend(batch) or run_tower(batch, optional)
    )
    copies = []
    for number in range(40):
        copies.append(pictures[0].with_name(f"copy {number}.png"))
        copies[-1].write_bytes(pictures[number % 2].read_bytes())
    for store in (pipeline.store, None):
        pipeline.encoder.store = store
        seen.clear()
        results = list(pipeline.runner(images=3).encode(copies))
        assert [name for name, _, _ in results] == [str(path) for path in copies]
        assert [encoded.name for _, encoded, _ in results] == [str(path) for path in copies]
        assert len({encoded.key for _, encoded, _ in results}) == 2
        assert [hit for _, _, hit in results] == [False, False] + [True] * 38
        assert len(seen) == 2


def test_bad_pictures_are_told_in_their_place(pipeline, pictures, tmp_path):
    bad, gone = tmp_path / "bad.png", tmp_path / "gone.png"
    bad.write_bytes(b"no image")
    sources = [pictures[0], bad, pictures[1], gone, pictures[2].read_bytes()]
    results = list(pipeline.runner().encode(sources))
    assert [name for name, _, _ in results] == [*map(str, sources[:4]), "-"]
    assert [isinstance(result, EncodedImage) for _, result, _ in results] == [True, False, True, False, True]
    assert str(bad) in str(results[1][1]) and isinstance(results[3][1], BadInput)
    ((_, fault, _),) = pipeline.runner().encode(["a\nb.png"])
    assert str(fault) == "'a\\nb.png': no such file; check the path"


def test_a_picture_that_the_tower_refuses_is_named(pipeline, pictures, monkeypatch):
    from gridprune_cli.images import identify

    run_tower, refused = pipeline.encoder.run_tower, identify(pictures[3])[0]

    def picky(batch, several, optional):
        if any(picture.sha256 == refused for picture in batch):
            raise ValueError("too strange")
        return run_tower(batch, several, optional)

    monkeypatch.setattr(pipeline.encoder, "run_tower", picky)
    results = list(pipeline.runner().encode(pictures))
    assert [isinstance(result, EncodedImage) for _, result, _ in results] == [i != 3 for i in range(7)]
    assert str(results[3][1]) == f"{pictures[3]}: unexpected ValueError: too strange"


def test_memory_that_runs_out_in_the_tower_halves_the_batch(pipeline, pictures, tiny_llava, monkeypatch, caplog):
    encode = pipeline.family.encode

    def small(batch, optional):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(batch)

    monkeypatch.setattr(pipeline.family, "encode", small)
    results = [result for _, result, _ in pipeline.runner(images=7).encode(pictures)]
    assert caplog.messages == [
        "memory ran out with 7 images at once; going on with 3",
        "memory ran out with 3 images at once; going on with 1",
    ]
    caplog.clear()
    alone = fresh(tiny_llava)
    for path, encoded in zip(pictures, results, strict=True):
        assert torch.allclose(encoded.vision_features, alone.encode(path)[0].vision_features, atol=1e-5)


def test_few_pictures_are_held_however_many_there_are(pipeline, noise, tmp_path, monkeypatch):
    """Of a long list, only those that are being worked on are read, and not even two at a time where they are large."""
    path = tmp_path / "a.png"
    noise((50, 50)).image.save(path)
    data = path.read_bytes()
    read = 0

    def sources():
        nonlocal read
        for number in range(200):
            read += 1
            yield data + bytes([number])  # PNG readers stop at its end, so these are pictures, all different

    for most, size in ((images_module.MAX_PIXELS, 2), (2499, 2), (2499, 50)):
        monkeypatch.setattr(images_module, "MAX_PIXELS", most)
        monkeypatch.setattr(images_module, "MAX_MEMORY", 14 * most)
        read = 0
        for taken, _ in enumerate(pipeline.runner(images=size).encode(sources(), refresh=True)):
            assert read - taken <= 4 * 2
        assert read == 200


def test_room_is_granted_in_turn_and_never_more_than_there_is():
    room, held, most, order = Room(100), [0], [0], []
    sizes = [60, 30, 90, 5, 250, 40, 60, 10]
    lock = threading.Lock()

    def take(ticket):
        room.enter(ticket, sizes[ticket])
        with lock:
            order.append(ticket)
            held[0] += sizes[ticket]
            most[0] = max(most[0], held[0] if sizes[ticket] <= 100 else 0)
            assert sizes[ticket] <= 100 or held[0] == sizes[ticket]  # what is more than all gets in alone
        threading.Event().wait(0.01)
        with lock:
            held[0] -= sizes[ticket]
        room.leave(ticket)

    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(take, ticket) for ticket in reversed(range(8))]
        for future in futures:
            future.result(timeout=60)
    assert sorted(order) == list(range(8)) and most[0] <= 100


def test_who_waits_for_room_goes_when_it_is_closed():
    room = Room(1)
    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(room.enter, 1, 1)  # whose turn never comes
        room.close()
        with pytest.raises(GridpruneError, match="interrupted"):
            future.result(timeout=60)


def test_large_pictures_are_read_one_at_a_time_and_all_of_them(pipeline, noise, tmp_path, monkeypatch):
    paths, now, most = [], [0], [0]
    for number in range(6):
        paths.append(tmp_path / f"{number}.png")
        noise((60 + number, 60)).image.save(paths[-1])

    def load(data, name):
        now[0] += 1
        most[0] = max(most[0], now[0])
        threading.Event().wait(0.01)
        picture = load_image(data, name)
        now[0] -= 1
        return picture

    monkeypatch.setattr(images_module, "count_threads", lambda: 4)
    for memory, together in ((images_module.MAX_MEMORY, 4), (1, 1)):
        monkeypatch.setattr(images_module, "MAX_MEMORY", memory)
        most[0] = 0
        bulk = pipeline.runner(load=load)
        results = [result for _, result, _ in bulk.encode(paths, refresh=True)]
        assert len(results) == 6 and all(isinstance(result, EncodedImage) for result in results)
        assert 1 <= most[0] <= together


def test_a_cache_that_cannot_be_written_stops_encode_all_and_not_bulk(tiny_llava, pictures, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    notices = []
    pipeline = Pipeline(str(tiny_llava), store=open_store(tmp_path / "file" / "below", notices.append), dtype="float32")
    assert all(isinstance(result, EncodedImage) for _, result, _ in pipeline.runner().encode(pictures))
    assert len(notices) == 1
    with pytest.raises(GridpruneError, match="can't be written"):
        list(pipeline.encode_all(pictures))


def test_what_could_not_be_read_again_is_not_cached_and_said(pipeline, pictures, monkeypatch, caplog):
    (image,) = pipeline.encoder.run_tower([load_image(pictures[0])])
    assert pipeline.encoder.put(image)
    monkeypatch.setattr(encoder_module, "MAX_NUMBERS", image.vision_features.numel() - 1)
    assert not pipeline.encoder.put(image) and f"{image.name}: not cached" in caplog.text
    caplog.clear()


def test_threads_that_decode_leave_the_settings_of_the_process_alone(pictures, tmp_path):
    data = pictures[6].read_bytes()
    cut = data[: len(data) // 2]
    before, wrong = list(warnings.filters), []
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # as another library may have left it
    try:

        def decode():
            for _ in range(20):
                load_image(data)
                try:
                    load_image(cut)
                    wrong.append("a cut file passed")
                except BadInput:
                    pass

        threads = [threading.Thread(target=decode) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True and warnings.filters == before
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False


# ---- prune and answer ------------------------------------------------------------------------------------------------


def requests(pictures):
    """Questions in a muddle: images mixed, lengths and keeps too, one about two images."""
    results = [
        Request((path,), question, Pruning(keep=keep))
        for question in QUESTIONS
        for path, keep in zip(pictures, (0.2, 1.0, 0.5, 0.3, 0.9, 0.11, 0.6), strict=True)
    ]
    results.insert(4, Request((pictures[2], pictures[5]), QUESTIONS[0], Pruning(keep=0.4)))
    return results


@pytest.mark.parametrize("size", [1, 4, 64])
def test_answers_in_bulk_are_the_answers_of_ask(pipeline, pictures, tiny_llava, size):
    questions = requests(pictures)
    replies = list(pipeline.runner(questions=size).answer(questions, max_new_tokens=8))
    alone = fresh(tiny_llava)
    for ask, reply in zip(questions, replies, strict=True):
        expected = alone.ask(list(ask.images), ask.question, ask.pruning, max_new_tokens=8)
        assert reply.text == expected.text
        assert reply.record == expected.pruned.to_json()
    assert sum(not reply.hit for reply in replies) == len(pictures)  # the first question about each


def test_an_image_is_read_once_for_all_its_questions(pipeline, pictures, tiny_llava, monkeypatch):
    list(pipeline.runner().encode(pictures))
    pipeline, got = Pipeline(str(tiny_llava), store=open_store(), dtype="float32"), []
    get = pipeline.store.get
    monkeypatch.setattr(
        pipeline.store, "get", lambda encoder, key, **more: got.append(encoder.get("kind")) or get(encoder, key, **more)
    )
    replies = list(pipeline.runner().answer(requests(pictures), max_new_tokens=2))
    assert got.count(None) == len(pictures)  # and prefixes, for questions that keep everything
    assert all(reply.hit for reply in replies)
    assert "tower" not in pipeline.family._loaded


def test_an_encoded_image_of_another_model_or_for_another_prompt_is_refused(checkpoint, pictures, tmp_path):
    """Both are as wide as they should be, and an answer from them would read like any other."""
    folder = checkpoint("llava_onevision")
    pipeline = Pipeline(str(folder), dtype="float32")
    alone, several = ([pipeline.encode(path, several=way)[0] for path in pictures[:2]] for way in (False, True))
    with pytest.raises(BadInput, match=r"0\.png: not encoded as one of several images; encode it with `several=True`"):
        pipeline.prune(alone, QUESTIONS[0])
    with pytest.raises(BadInput, match=r"0\.png: encoded as one of several images, and is alone"):
        pipeline.prune(several[0], QUESTIONS[0])
    assert pipeline.prune(several, QUESTIONS[0]).count == sum(image.count for image in several)
    shutil.copytree(folder, tmp_path / "tuned")
    (tmp_path / "tuned" / "notes.txt").write_text("another fine-tune")
    with pytest.raises(BadInput, match=r"0\.png: encoded by another model, .*; encode it with this one"):
        Pipeline(str(tmp_path / "tuned"), dtype="float32").prune(alone[0], QUESTIONS[0])
    other_storage = Pipeline(str(folder), dtype="bfloat16", cache_dtype="int8")  # the same tower
    assert other_storage.prune(alone[0], QUESTIONS[0]).count == alone[0].count


def test_what_fails_fails_alone(pipeline, pictures, tmp_path):
    gone = tmp_path / "gone.png"
    questions = [
        Request((pictures[0],), QUESTIONS[0], Pruning()),
        Request((gone,), QUESTIONS[0], Pruning()),
        Request((pictures[0], gone), QUESTIONS[1], Pruning()),
        Request((pictures[0],), " ", Pruning()),
        Request((pictures[0],), "What \ud83d?", Pruning()),
        Request((pictures[1],), QUESTIONS[1], Pruning(tokens=99)),
        Request((pictures[1],), QUESTIONS[1], Pruning()),
    ]
    replies = list(pipeline.runner().answer(questions, max_new_tokens=2))
    assert [isinstance(reply, Reply) for reply in replies] == [True, False, False, False, False, False, True]
    assert all(isinstance(reply, BadInput) for reply in replies[1:6])
    assert "gone.png" in str(replies[2]) and "tokens=99" in str(replies[5])


def test_several_answers_to_a_question_are_refused_not_given_to_others(pipeline, pictures):
    options = {"do_sample": True, "num_return_sequences": 2}
    replies = list(pipeline.runner().answer(requests(pictures), max_new_tokens=2, **options))
    assert all("num_return_sequences" in str(reply) for reply in replies) and isinstance(replies[0], BadInput)


def test_memory_that_runs_out_in_the_language_model_halves_the_batch(pipeline, pictures, monkeypatch, caplog):
    questions = requests(pictures)
    expected = [reply.text for reply in pipeline.runner().answer(questions, max_new_tokens=4)]
    model = pipeline.family.load("language")
    generate = model.generate

    def small(**taken):
        if len(taken["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**taken)

    monkeypatch.setattr(model, "generate", small)
    replies = pipeline.runner(questions=16).answer(questions, max_new_tokens=4)
    assert [reply.text for reply in replies] == expected
    assert caplog.messages == [
        "memory ran out with 16 questions at once; going on with 8",
        "memory ran out with 8 questions at once; going on with 4",
    ]
    caplog.clear()


def test_memory_that_runs_out_in_pruning_halves_what_is_pruned_for_together(pipeline, pictures, monkeypatch, caplog):
    questions = requests(pictures)
    expected = [reply.text for reply in pipeline.runner().answer(questions, max_new_tokens=4)]
    project, most = pipeline.family.project, []

    def small(vision_features):
        if len(vision_features) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        most.append(len(vision_features))
        return project(vision_features)

    monkeypatch.setattr(pipeline.family, "project", small)
    replies = pipeline.runner(questions=16).answer(questions, max_new_tokens=4)
    assert [reply.text for reply in replies] == expected
    assert caplog.messages[0] == "memory ran out with 16 questions to prune for at once; going on with 8"
    assert len(caplog.messages) <= 3 and max(most) > 16
    caplog.clear()


def test_sets_that_are_too_large_to_wait_together_are_answered_in_parts(pipeline, pictures, monkeypatch):
    questions = requests(pictures)
    whole = [reply.text for reply in pipeline.runner().answer(questions, max_new_tokens=4)]
    monkeypatch.setattr(local_module, "MAX_BYTES", 1)
    assert [r.text for r in pipeline.runner().answer(questions, max_new_tokens=4)] == whole


def test_the_language_model_starts_while_others_are_pruned_for(pipeline, pictures, monkeypatch):
    begun, generate, select, batches = threading.Event(), local_module.generate, local_module._select, []

    def generating(family, batch, *args, **settings):
        begun.set()
        return generate(family, batch, *args, **settings)

    def selecting(encoder, batch, with_prefix):
        batches.append(len(batch))
        if len(batches) > 1 and not begun.wait(60):
            raise GridpruneError("the first batch waits for the second")
        return select(encoder, batch, with_prefix)

    monkeypatch.setattr(local_module, "generate", generating)
    monkeypatch.setattr(local_module, "_select", selecting)
    asked = [Request((pictures[0],), f"Is it {n}?") for n in range(6)]
    replies = list(pipeline.runner(questions=2).answer(asked, max_new_tokens=2))
    assert batches == [2, 2, 2] and all(isinstance(reply, Reply) for reply in replies)


def test_questions_of_many_batches_are_read_in_one_pass_of_the_text_tower(pipeline, pictures, tiny_llava, monkeypatch):
    clip, lengths = pipeline.family.relevance.model, []
    read = clip.get_text_features

    def reading(ids):
        lengths.append(len(ids))
        return read(ids)

    monkeypatch.setattr(clip, "get_text_features", reading)
    asked = [Request((path,), f"Is it {n}?") for n, path in enumerate(pictures)]
    pruned_of = dict(pipeline.runner(questions=2).prune(asked))
    assert lengths == [len(asked)]
    alone = fresh(tiny_llava)
    for index, request in enumerate(asked):
        assert torch.equal(pruned_of[index].pruned.kept, alone.prune(request.images, request.question).kept)
    lengths.clear()
    every = Pruning(keep=0.5, method=make_method("divprune"))  # which needs no relevance
    list(pipeline.runner().prune([Request((pictures[0],), "Is it new?", every)]))
    assert lengths == []


def test_a_question_that_the_text_tower_fails_at_fails_alone(pipeline, pictures, monkeypatch):
    clip = pipeline.family.relevance.model
    read, bad = clip.get_text_features, pipeline.family.relevance._pieces(["red star"])[0][0]

    def reading(ids):
        if bad in ids.tolist():
            raise RuntimeError("no such text")
        return read(ids)

    monkeypatch.setattr(clip, "get_text_features", reading)
    asked = [Request((pictures[0],), question) for question in ("red", "red star", "blue")]
    results = dict(pipeline.runner().prune(asked))
    assert [isinstance(results[n], Pruned) for n in range(3)] == [True, False, True]
    assert "no such text" in str(results[1])


def test_pruning_in_bulk_is_pruning(pipeline, pictures, tiny_llava):
    questions = requests(pictures)
    alone = fresh(tiny_llava)
    questions = [replace(request, system="red") for request in questions]
    pruned_of = dict(pipeline.runner().prune(questions))
    assert sorted(pruned_of) == list(range(len(questions)))
    for index, ask in enumerate(questions):
        assert isinstance(pruned_of[index], Pruned)
        images = [alone.encode(source)[0] for source in ask.images]
        expected = alone.prune(images, ask.question, ask.pruning, system="red")
        assert torch.equal(pruned_of[index].pruned.kept, expected.kept)
        assert torch.equal(pruned_of[index].pruned.input_ids, expected.input_ids)


def test_a_model_that_cannot_be_loaded_ends_it_all(tiny_llava, pictures, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, folder / "model.safetensors")
    with pytest.raises(GridpruneError, match="weights"):
        list(Pipeline(str(folder), dtype="float32").runner().encode(pictures))


def test_ends_of_a_batch_are_cut_where_an_answer_ends(pipeline, pictures):
    """A short answer beside long ones is what it is alone, ids included."""
    from gridprune_cli.generation import generate

    sets = [pipeline.prune(pipeline.encode(path)[0], QUESTIONS[0], Pruning(keep=0.5)) for path in pictures]
    free = [results.ids for results in generate(pipeline.family, sets, 8)]
    stop = free[0][3]  # as if this token ended an answer: not all answers hold it at the same place
    together = generate(pipeline.family, sets, 8, eos_token_id=stop)
    for pruned, results, long in zip(sets, together, free, strict=True):
        expected = long[: long.index(stop) + 1] if stop in long else long
        assert results.ids == expected == generate(pipeline.family, [pruned], 8, eos_token_id=stop)[0].ids


def test_watchers_follow_their_own_answers_and_end_them(pipeline, pictures, monkeypatch, caplog):
    """Also where sets are sorted by length, and batches are run again: then from the start."""
    sets = [
        pipeline.prune(pipeline.encode(path)[0], QUESTIONS[n % 3], Pruning(keep=0.5)) for n, path in enumerate(pictures)
    ]
    free = [pipeline.runner().generate_one(pruned, max_new_tokens=8).ids for pruned in sets]
    watched: list[list[tuple[int, ...]]] = [[] for _ in sets]

    def follow(n: int):
        def watch(ids) -> bool:
            watched[n].append(tuple(ids))
            return len(ids) > n  # the first ends after one token

        return watch

    model = pipeline.family.load("language")
    generate = model.generate

    def small(**options):
        if len(options["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(**options)

    monkeypatch.setattr(model, "generate", small)
    results = dict(pipeline.runner().generate(sets, max_new_tokens=8, watchers=[follow(n) for n in range(len(sets))]))
    caplog.clear()
    for n, ids in enumerate(free):
        assert results[n].ids == ids[: n + 1]
        assert watched[n] == [ids[:length] for length in range(1, len(results[n].ids) + 1)]
        assert results[n].ended == (results[n].ids[-1] == model.generation_config.eos_token_id)


def test_a_reply_holds_no_tensors(pipeline, pictures):
    (reply,) = pipeline.runner().answer([requests(pictures)[0]], max_new_tokens=2)
    assert not any(isinstance(value, torch.Tensor) for value in [*vars(reply).values(), *reply.record.values()])

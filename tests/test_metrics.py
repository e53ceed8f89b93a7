"""Metrics against values worked out by hand, and against rules written out again."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridprune_cli.evaluation.metrics import METRICS, anls, exact, pope, pope_figures, relaxed, vqa, vqa_normal


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("Yes.", ["yes"], 1),
        (" blue square\n", ["red star", "Blue Square"], 1),
        ("a cat", ["cat"], 0),  # articles stay
        ("2", ["two"], 0),
        ("1.5", ["15"], 1),  # the trap: a point is punctuation
        ("T-shirt", ["tshirt"], 1),
        ("", ["yes"], 0),
    ],
)
def test_exact(answer, truths, score):
    assert exact(answer, truths) == score


def test_vqa_leaves_one_annotator_out():
    """Nine are left each time: m matches count m - 1 for those who gave them, m for the others, over 3, at most 1."""
    by_hand = {0: 0, 1: 0.3, 2: 0.6, 3: 0.9, 4: 1, 9: 1, 10: 1}
    for matches, score in by_hand.items():
        assert vqa("red", ["red"] * matches + [f"other {n}" for n in range(10 - matches)]) == pytest.approx(score)


@given(st.lists(st.sampled_from("abc"), min_size=10, max_size=10), st.sampled_from("abcd"))
def test_vqa_is_the_mean_over_subsets_of_nine(truths, answer):
    names = {"a": "red", "b": "blue", "c": "green", "d": "white"}
    total = 0.0
    for out in range(10):
        others = [truth for n, truth in enumerate(truths) if n != out]
        total += min(others.count(answer) / 3, 1)
    assert vqa(names[answer], [names[truth] for truth in truths]) == pytest.approx(total / 10)


def test_vqa_counts_a_unanimous_answer_though_left_out_by_value_none_would_be_left():
    assert vqa("red", ["red"] * 10) == 1


def test_vqa_needs_ten_annotators():
    with pytest.raises(ValueError, match="10 annotators, not 3"):
        vqa("red", ["red"] * 3)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The Red, car", "red car"),
        ("two dogs", "2 dogs"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),  # a comma inside a number takes every mark away without a trace,
        ("1,000 t-shirts", "1000 tshirts"),
        ("t-shirt", "t shirt"),  # which alone become spaces,
        ("t- shirt", "t shirt"),  # unless they touch one
        ("3.5", "3.5"),
        ("St. Louis", "st louis"),
        ("U.S.", "us"),
        ("a\tb\nc", "b c"),
        ("", ""),
    ],
)
def test_what_vqa_evens_out(text, normal):
    assert vqa_normal(text) == normal


def test_vqa_normalises_though_the_annotators_agree():
    assert vqa("the two", ["2"] * 10) == 1


@pytest.mark.parametrize(
    ("answer", "truth", "score"),
    [
        ("yes", "yes", 1),
        ("Yes.", "yes", 1),  # wrong by lmms-eval's rule
        ("No, there is no dog", "no", 1),
        ("no", "yes", 0),
        ("yesterday", "yes", 0),
        ("maybe", "no", 0),
        ("", "no", 0),
    ],
)
def test_pope_of_one(answer, truth, score):
    assert pope(answer, [truth]) == score


def test_pope_needs_yes_or_no():
    for truths in (["perhaps"], ["yes", "no"]):
        with pytest.raises(ValueError, match="yes or no"):
            pope("yes", truths)


def test_pope_of_all():
    """By hand: one yes is right, three were said, three are true; two answers are right in all."""
    answers, truths = ["yes", "Yes.", "no", "a dog", "no", "yes"], ["yes", "no", "yes", "yes", "no", "no"]
    figures = pope_figures(answers, truths)
    assert figures == pytest.approx(
        {"accuracy": 2 / 6, "precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "yes_ratio": 0.5}
    )
    # of the answers: the truths have the same ratio here, so turn them
    assert pope_figures(["yes"] * 4, ["yes", "no", "no", "no"])["yes_ratio"] == 1
    assert set(pope_figures(["no"], ["no"]).values()) == {0.0, 1.0}  # 0 / 0 is 0, and the answer is right


@given(st.lists(st.tuples(st.sampled_from(["yes", "no", "so"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_pope_against_counts(pairs):
    count = {pair: pairs.count(pair) for pair in product(("yes", "no", "so"), ("yes", "no"))}
    tp, fp = count["yes", "yes"], count["yes", "no"]
    fn = count["no", "yes"] + count["so", "yes"]
    figures = pope_figures(*zip(*pairs, strict=True))
    assert figures["accuracy"] == pytest.approx((tp + count["no", "no"]) / len(pairs))
    precision, recall = tp / (tp + fp or 1), tp / (tp + fn or 1)
    assert (figures["precision"], figures["recall"]) == pytest.approx((precision, recall))
    assert figures["f1"] == pytest.approx(2 * precision * recall / (precision + recall) if tp else 0)


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("10.5", ["10"], 1),
        ("10.51", ["10"], 0),
        ("9.5", ["10"], 1),
        ("-10.5", ["-10"], 1),
        ("10", ["-10"], 0),
        ("0", ["0"], 1),  # as text, since nothing is within 5 % of 0
        ("0.0", ["0"], 0),
        ("5%", ["5"], 0),  # 0.05
        ("5%", ["0.05"], 1),
        ("5.2 %", ["5%"], 1),
        ("1,000", ["1000"], 0),
        ("Blue", ["blue"], 1),
        ("blue.", ["blue"], 0),
        ("12", ["blue", "12.1"], 1),
        ("nan", ["3"], 0),
    ],
)
def test_relaxed(answer, truths, score):
    assert relaxed(answer, truths) == score


@pytest.mark.parametrize(
    ("answer", "truths", "score"),
    [
        ("hello", ["Hello"], 1),
        ("helo", ["hello"], 0.8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("abcd", ["abxy"], 0.5),  # just enough
        ("abc", ["axy"], 0),
        ("abc", ["xyz", "abd"], 1 - 1 / 3),
        ("a  b", ["a b"], 1),
        ("ab", ["abc       "], 0.9),  # the trap: distance 1, over the raw length of 10
        ("", ["x"], 0),
        ("", [""], 1),
    ],
)
def test_anls(answer, truths, score):
    assert anls(answer, truths) == pytest.approx(score)


@given(st.text("ab ", max_size=5), st.text("ab ", max_size=5))
def test_the_distance_of_anls_against_recursion(answer, truth):
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        if a[0] == b[0]:
            return distance(a[1:], b[1:])
        return 1 + min(distance(a[1:], b), distance(a, b[1:]), distance(a[1:], b[1:]))

    answer = answer.strip()
    share = distance(" ".join(answer.split()), " ".join(truth.split())) / max(len(answer), len(truth), 1)
    assert anls(answer, [truth]) == pytest.approx(1 - share if 1 - share >= 0.5 else 0)


@given(st.sampled_from(["exact", "relaxed", "anls"]), st.text(), st.lists(st.text(), min_size=1, max_size=3))
def test_scores_are_from_0_to_1_and_an_answer_that_is_a_true_one_to_the_letter_has_1(name, answer, truths):
    assert 0 <= METRICS[name](answer, truths) <= 1
    same = answer.strip()
    if not (name == "relaxed" and same.lower() in ("nan", "inf", "-inf", "infinity", "-infinity", "+inf", "-nan")):
        assert METRICS[name](same, [*truths, same]) == 1

"""How an answer is scored: each metric by the rule of the harness that made it known, with that rule's traps.

A metric is a function of the model's answer and the true answers, 0 to 1. White space around the model's answer never
counts.
"""

import re
import string
from collections.abc import Callable, Sequence
from itertools import pairwise

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer is one of the true ones, but for case and ASCII punctuation.

    GQA's rule in lmms-eval. Traps: neither articles nor number words are evened out ("a cat" is not "cat", "2" not
    "two"), and since a point is punctuation, "1.5" is "15".
    """

    def plain(text: str) -> str:
        return text.strip().lower().translate(_PUNCTUATION)

    return float(plain(answer) in map(plain, truths))


# ---- VQA -------------------------------------------------------------------------------------------------------------

ANNOTATORS = 10
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(n) for n, word in enumerate(_NUMBERS)} | {"none": "0"}
_SHORT = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a table of words is read better than a list of 90 strings)
# "dont" is meant as "don't"; "couldnt've" and "couldn'tve" as "couldn't've"
_CONTRACTIONS = {w[: m.start()] + w[m.end() :]: w for w in _SHORT for m in re.finditer("'", w)}


def vqa(answer: str, truths: Sequence[str]) -> float:
    """VQA's soft accuracy: the mean, over the ten annotators left out in turn, of min(1, matches among the others / 3).

    Both sides are normalised first, always, as lmms-eval does; VQA's own script does so only where annotators disagree.
    Traps: an annotator is left out by place, as TextVQA's script does. Leaving out by value, as lmms-eval does where
    answers carry no id, drops all that say the same, and so scores a unanimous answer 0. One match of ten scores 0.3,
    two 0.6, three 0.9, four 1. Raises ValueError where there are not ten answers.
    """
    if len(truths) != ANNOTATORS:
        raise ValueError(f"vqa needs the answers of {ANNOTATORS} annotators, not {len(truths)}")
    normal = vqa_normal(answer)
    matches = [vqa_normal(truth) == normal for truth in truths]
    return sum(min(1.0, (sum(matches) - left_out) / 3) for left_out in matches) / ANNOTATORS


def vqa_normal(text: str) -> str:
    """An answer as VQA compares it: punctuation, number words up to ten, articles and contractions evened out.

    The published script's oddities are kept, since published scores come from it: a mark goes without a trace where one
    of its kind touches a space or the text has a comma inside a number, and turns into a space elsewhere; a point
    stays before a digit only; "none" is 0. Contractions of "I" are left out, since the script spells them with a
    capital after lowering the text, and so never finds them.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    number, plain = _COMMA_IN_NUMBER.search(text), text
    for mark in _MARKS:
        loose = number or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if loose else " ")
    tokens = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in tokens if word not in ("a", "an", "the"))


# ---- POPE ------------------------------------------------------------------------------------------------------------


def yes_or_no(answer: str) -> str:
    """The first word of an answer, without case and punctuation, where it is "yes" or "no"; else ""."""
    first = (answer.split() or [""])[0].strip(string.punctuation).lower()
    return first if first in ("yes", "no") else ""


def pope(answer: str, truths: Sequence[str]) -> float:
    """1 where the answer says yes or no, and the true one.

    Trap: lmms-eval wants the bare word, so that "Yes." is wrong; here the first word counts. An answer that is neither
    is wrong. Raises ValueError where the truth is not yes or no.
    """
    if len(truths) != 1 or not yes_or_no(truths[0]):
        raise ValueError("pope needs one answer, yes or no")
    return float(yes_or_no(answer) == yes_or_no(truths[0]))


def pope_figures(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 (positive is yes) and yes-ratio of all answers, each 0 to 1; 0 for 0 / 0.

    Traps: the yes-ratio is of the *answers* (lmms-eval's is of the truths, and so the same for every model), and an
    answer that is neither counts as a yes that was missed (lmms-eval's recall drops it). VLMEvalKit's "Overall" is F1.
    """
    answered, true = ([yes_or_no(text) == "yes" for text in texts] for texts in (answers, truths))
    hits = sum(a and t for a, t in zip(answered, true, strict=True))
    right = sum(pope(answer, [truth]) for answer, truth in zip(answers, truths, strict=True))

    def ratio(count: float, total: float) -> float:
        return count / total if total else 0.0

    return {
        "accuracy": ratio(right, len(answered)),
        "precision": ratio(hits, sum(answered)),
        "recall": ratio(hits, sum(true)),
        "f1": ratio(2 * hits, sum(answered) + sum(true)),
        "yes_ratio": ratio(sum(answered), len(answered)),
    }


# ---- ChartQA and DocVQA ----------------------------------------------------------------------------------------------


def relaxed(answer: str, truths: Sequence[str]) -> float:
    """1 where a number is within 5 % of a true one, or a text is a true one but for case (ChartQA, arXiv 2203.10244).

    Traps, all lmms-eval's: a true 0 is compared as text, so "0.0" is not "0"; "5%" is 0.05 and so not "5"; "1,000" is
    no number.
    """
    return float(any(_near(answer.strip(), truth) for truth in truths))


def _near(answer: str, truth: str) -> bool:
    """Whether two numbers are within 5 % of the true one, or two texts equal but for case."""
    number, true = _number(answer), _number(truth)
    if number is not None and true:
        return abs(number - true) / abs(true) <= 0.05
    return answer.lower() == truth.lower()


def _number(text: str) -> float | None:
    """A number, a percentage as its fraction; None for any other text."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, truths: Sequence[str]) -> float:
    """1 less the least edit distance to a true answer over the longer one's length; 0 below 0.5 (DocVQA, InfoVQA).

    Traps: the distance is taken without case and with runs of white space as one space, the lengths as they stand, so
    that needless spaces in a true answer raise the score.
    """
    answer = answer.strip()
    best = 1 - min(_distance(_even(answer), _even(truth)) / max(len(answer), len(truth), 1) for truth in truths)
    return best if best >= 0.5 else 0.0


def _even(text: str) -> str:
    """A text without case, runs of white space as one space."""
    return " ".join(text.lower().split())


def _distance(a: str, b: str) -> int:
    """Levenshtein's: the fewest insertions, deletions and replacements of a character."""
    row = list(range(len(b) + 1))
    for i, character in enumerate(a, 1):
        new = [i]
        for (corner, above), other in zip(pairwise(row), b, strict=True):
            new.append(min(new[-1] + 1, above + 1, corner + (character != other)))
        row = new
    return row[-1]


METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "vqa": vqa,
    "pope": pope,
    "relaxed": relaxed,
    "anls": anls,
}

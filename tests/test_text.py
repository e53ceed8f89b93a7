"""What models, files and users say, as a terminal may read it."""

import io
import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridprune_cli.generation import _Stream
from gridprune_cli.text import markdown_cell, printable, to_json, visible


def obeyed(character):
    """What a terminal obeys, or shows as a break of the line or a change of direction: by Unicode's own properties."""
    direction = unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    marks = character in "\u061c\u200e\u200f"
    return direction or marks or unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs")


def test_every_character():
    for code in range(0x110000):
        character = chr(code)
        if obeyed(character) and character not in "\n\t":
            assert visible(character).isascii() and visible(character).isprintable(), hex(code)
        else:
            assert visible(character) == character, hex(code)


@pytest.mark.parametrize("text", ["red\n\tgreen", "日本　語", "می‌خواهم", "👩‍👧", "naïve café"])
def test_text_of_all_scripts_stays(text):
    assert visible(text) == text


def test_an_answer_is_made_visible_and_a_cell_keeps_its_table():
    assert visible("\x1b]0;owned\x07 \x9b31m\r\u202eabc") == r"\x1b]0;owned\x07 \x9b31m\r\u202eabc"
    assert printable("a\tb\n") == r"a\tb\n"
    assert markdown_cell("a|b`c\n<i>\\") == r"a\|b\`c\n\<i>" + 2 * "\\"


@given(st.text(st.characters(exclude_categories=())))
def test_json_says_the_same_and_holds_nothing_that_is_obeyed(text):
    written = to_json({"x": text})
    assert json.loads(written) == {"x": text}
    assert not any(obeyed(character) for character in written if not "\ud800" <= character <= "\udfff")


def test_streams_are_made_visible_as_they_come():
    out = io.StringIO()
    printer = _Stream(None, out)
    for text, end in (("a\x1b", False), ("[31m\n", False), ("b", True)):
        printer.on_finalized_text(text, end)
    assert out.getvalue() == "a\\x1b[31m\nb\n"

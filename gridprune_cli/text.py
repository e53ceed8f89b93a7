"""Text from models, files and users, written so that a terminal that reads it shows it, and does nothing else.

Made visible, as Python escapes: control characters with ESC among them, those of C1, controls of the writing direction,
line and paragraph separators, and halves of characters, which no encoding can hold.
"""

import json
import re

_HIDDEN = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_UNSAFE = re.compile(f"[\x00-\x08\x0b-\x1f{_HIDDEN}\ud800-\udfff]")
_RAW_IN_JSON = re.compile(f"[{_HIDDEN}]")  # what JSON may hold unescaped


def visible(text: str) -> str:
    """A text of several lines, such as an answer: newlines and tabs stay."""
    return _UNSAFE.sub(lambda match: ascii(match[0])[1:-1], text)


def printable(text: str) -> str:
    """The text on one line, for notices and cells of tables: newlines and tabs are written out too."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def markdown_cell(text: str) -> str:
    """The text on one line, inside a cell of a Markdown table."""
    return printable(re.sub(r"([\\`<|])", r"\\\1", text))


def to_json(value: object) -> str:
    """A value as one line of JSON in Unicode, with the same characters escaped. ValueError on NaN or infinity."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return _RAW_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

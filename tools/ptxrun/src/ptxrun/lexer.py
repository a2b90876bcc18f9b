"""The text of PTX: comments, statements, literals and variable declarations."""

import bisect
import functools
import re
import struct

from .errors import UnsupportedError
from .program import TYPE_BYTES, Float, Integer, Variable

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_LITERAL_STARTS = frozenset("+-0123456789")
_NOT_SPACE = re.compile(r"\S")
_DEBUG_LINE = re.compile(r"^[ \t]*(?:\.(?:loc|file)\s|@@)[^\n]*", re.M)
_VARIABLE = re.compile(
    r"^(?P<link>(?:\.(?:visible|extern|weak|common)\s+)*)"
    r"\.(?P<space>global|const|shared|local|param)\s*"
    r"(?P<attributes>(?:\.attribute\s*\([^)]*\)\s*|\.align\s+\d+\s*|\.ptr\s*"
    r"|\.(?:global|const|shared|local)\s+|\.v[248]\s*)*)"
    r"\.(?P<type>\w+)\s*"
    r"(?:(?:\.ptr\s*|\.(?:global|const|shared|local)\s*|\.align\s+\d+\s*)*)\s*"
    r"(?P<name>[\w$%]+)\s*(?P<dims>(?:\[\s*\d*\s*\]\s*)*)(?:=\s*(?P<init>.*))?$",
    re.S,
)


def strip_comments(text: str) -> str:
    """PTX without comments and debug lines; every line keeps its number."""
    text = _COMMENT.sub(lambda match: "\n" * match.group().count("\n") + " ", text)
    return _DEBUG_LINE.sub("", text)


class Scanner:
    """A position in a text."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self._newlines = [match.start() for match in re.finditer("\n", text)]

    def line(self) -> int:
        """Number of the current line, from 1."""
        return bisect.bisect_left(self._newlines, self.position) + 1

    def skip_space(self) -> bool:
        """Move to the next character that is not white space; False at the end."""
        match = _NOT_SPACE.search(self.text, self.position)
        self.position = match.start() if match else len(self.text)
        return match is not None

    def until(self, stops: str) -> str:
        """Text up to a stop character outside brackets and strings; the stop is not consumed."""
        text, depth, start = self.text, 0, self.position
        pattern, position = _stops_and_brackets(stops), self.position
        while match := pattern.search(text, position):
            position, character = match.start(), match.group()
            if depth == 0 and character in stops:
                self.position = position
                return text[start:position]
            if character in "{([":
                depth += 1
            elif character in "})]":
                depth -= 1
            elif character == '"':
                position = text.index('"', position + 1)
            position += 1
        self.position = len(text)
        return text[start:]


@functools.cache
def _stops_and_brackets(stops: str) -> re.Pattern[str]:
    return re.compile(f"[{re.escape(stops)}" + r'{}()\[\]"]')


def parse_literal(text: str) -> Integer | Float | None:
    """The literal that `text` is, or None when it is something else."""
    text = text.strip()
    if text[:1] not in _LITERAL_STARTS:
        return None
    negative = text[:1] == "-" and len(text) > 1
    if text[:1] in "+-" and len(text) > 1:
        text = text[1:].strip()
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Float("f32", int(match.group(1), 16) ^ (negative << 31))
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Float("f64", int(match.group(1), 16) ^ (negative << 63))
    if re.fullmatch(r"\d+\.\d*(?:[eE][+-]?\d+)?", text):
        value = -float(text) if negative else float(text)
        return Float("f64", struct.unpack("<Q", struct.pack("<d", value))[0])
    for pattern, base in (
        (r"0[xX][0-9a-fA-F]+U?", 16),
        (r"0[bB][01]+U?", 2),
        (r"0[0-7]+U?", 8),
        (r"\d+U?", 10),
    ):
        if re.fullmatch(pattern, text):
            magnitude = int(text.rstrip("U"), base)
            return Integer(-magnitude if negative else magnitude)
    return None


def split_commas(text: str) -> list[str]:
    """Parts between the commas that are outside brackets, stripped."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "{[(":
            depth += 1
        elif character in "}])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    if text[start:].strip():
        parts.append(text[start:].strip())
    return parts


def split_initialiser(text: str) -> list[str]:
    """Elements of `{a, {b, c}}` in order, or the one value that is not in braces."""
    text = text.strip()
    if not text.startswith("{"):
        return [text]
    return split_commas(text.replace("{", " ").replace("}", " "))


def parse_variable(declaration: str) -> Variable:
    """A variable from its declaration without the semicolon."""
    declaration = declaration.strip()
    match = _VARIABLE.match(declaration)
    if not match:
        raise UnsupportedError(f"cannot parse declaration: {declaration[:200]}")
    element_bytes = TYPE_BYTES.get(match["type"])
    if element_bytes is None:
        raise UnsupportedError(f"unsupported variable type .{match['type']}: {declaration[:120]}")
    explicit_align = re.search(r"\.align\s+(\d+)", match["attributes"])
    vector = re.search(r"\.v([248])", match["attributes"])
    lanes = int(vector.group(1)) if vector else 1
    count, open_ended = lanes, False
    for extent in re.findall(r"\[\s*(\d*)\s*\]", match["dims"]):
        open_ended = open_ended or not extent
        count *= int(extent or 0)
    if match["init"] and count == 0:
        count = len(split_initialiser(match["init"]))
    return Variable(
        match["name"],
        match["space"],
        match["type"],
        element_bytes,
        int(explicit_align.group(1)) if explicit_align else element_bytes * lanes,
        count * element_bytes,
        match["init"],
        ".extern" in match["link"] or open_ended,
    )

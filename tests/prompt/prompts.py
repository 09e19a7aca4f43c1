"""Prompts as artists type them, for the laws of prompt/: languages, widths, weights, names, marks."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from language_bridge.prompt import Segment

law = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],  # machines of a CI are slow, prompts are not
)
"""Every law is tried on 200 prompts, the same ones each time."""

CAT, DOG, RED = "\u732b", "\u72d7", "\u7ea2\u8272"
NATIVE = [
    CAT,
    DOG,
    RED,
    "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
    "\u3042\u306d\u3053",
    "\u30cd\u30b3",
    "\uace0\uc591\uc774",
    "\u043a\u043e\u0442",
    "\u0e41\u0e21\u0e27",
    "\u0642\u0637\u0629",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
]
LATIN = ["cat", "red dress", "1girl", "blue_eyes", "t-shirt", "caf\u00e9", "don't", "v1.5", "BREAKFAST", "8k"]
SIGNS = [",", " ", ".", "3", "1.3", "!", ";", "[", "]", "\\", "'", '"', "\U0001f431", "\u2026", "\u300c", "&"]
NAMES = [
    "easyneg",
    "bad_hands-v2",
    "a.b",
    "sub/hands.pt",
    "\u574f\u624b",
    "\u574f\u624b.pt",
    "hands\\(v2\\)",
    "Pok\u00e9mon",
]
MARKS = ["lang:en ", "lang:zh ", "lang:de", "lang:zh-CN "]
BROKEN = ["(", ")", "((", ":1.3)", ":x)", "(:1.2)", "\\(", "\\)", "()", "embedding:", "embedding: ", "lang:"]
TRIGGERS = [
    "zorb style",
    "Blue_Eyes",
    "1girl",
    "\u58a8\u97f5",
    "miku \\(vocaloid\\)",
    "a, b",
    "\u043a\u043e\u0442",
]

# What a native keyboard gives for an ASCII character, and the other full-width forms of it.
WIDE: dict[str, str] = {chr(code): chr(code + 0xFEE0) for code in range(0x21, 0x7F)}
WIDE[","] += "\u3001\ufe50\uff64"
WIDE["."] += "\u3002\uff61"
WIDE["["] += "\u3010"
WIDE["]"] += "\u3011"
WIDE["("] += "\ufe59"
WIDE[")"] += "\ufe5a"
WIDE[":"] += "\ufe55"
WIDE[" "] = "\u3000"
QUOTES = {"'": "\u2018\u2019", '"': "\u201c\u201d"}


def typed(text: str, seed: int, *, quotes: bool = False) -> str:
    """`text` with any of its ASCII characters typed on a native keyboard; curly quotes too where asked."""
    choose = random.Random(seed)
    forms = {**WIDE, **({sign: WIDE[sign] + curly for sign, curly in QUOTES.items()} if quotes else {})}
    return "".join(choose.choice(forms[c]) if c in forms and choose.random() < 0.5 else c for c in text)


NUMBERS = ["", ":1.3", ":0.5", ": 1.2 ", ":-1", ":1e1"]


def assembled(pieces: list[str], brackets: list[tuple[int, int, str]]) -> str:
    """Pieces in a row, some runs of them in brackets with a number; brackets inside brackets too."""
    pieces = list(pieces)
    for start, count, number in brackets:
        start = start % (len(pieces) + 1)
        pieces[start : start + count] = [f"({''.join(pieces[start : start + count])}{number})"]
    return "".join(pieces)


def joined(*choices: list[str], size: int = 9) -> st.SearchStrategy[str]:
    """Pieces of these lists in any order and nesting."""
    brackets = st.tuples(st.integers(0, size), st.integers(0, 3), st.sampled_from(NUMBERS))
    pieces = st.sampled_from([piece for choice in choices for piece in choice])
    return st.builds(assembled, st.lists(pieces, max_size=size), st.lists(brackets, max_size=3))


EMBEDDINGS = [f"embedding:{name}" for name in NAMES]
BREAKS = ["BREAK", " BREAK ", ",BREAK,"]
ENGLISH = joined(LATIN, SIGNS, BROKEN, BREAKS, ["embedding:x ", "\u201cso\u201d", "it\u2019s", "\u2014"])
"""Without native letters and without marks, in any state of disorder."""
UNMARKED = joined(NATIVE, LATIN, SIGNS, EMBEDDINGS, BREAKS, BROKEN, TRIGGERS)
"""Anything without lang: marks."""
PROMPTS = joined(NATIVE, LATIN, SIGNS, EMBEDDINGS, MARKS, BREAKS, BROKEN, TRIGGERS)
"""Anything."""
SEEDS = st.integers(0, 1 << 30)


def literal(segment: Segment) -> str:
    """What a segment says, its escapes read."""
    if segment.stream != "english":
        return segment.text
    return segment.text.replace("\\(", "(").replace("\\)", ")")


def has_native(text: str) -> bool:
    """Whether any of the native pieces is in a text."""
    pieces = "".join([*NATIVE, *NAMES, *TRIGGERS]).replace("\u00e9", "")
    return any(letter in text for letter in pieces if not letter.isascii())

"""What a prompt says, as pure text: width of punctuation, weights, words, and which stream hears what."""

from .grammar import Change, Normalised, normalise
from .phrases import Phrase, phrases_in
from .streams import (
    MODES,
    NATIVE_ONLY,
    TWO_STREAMS,
    Mode,
    Reason,
    Segment,
    Stream,
    changes,
    english_prompt,
    escape,
    parts,
    route,
)
from .weights import Span, split
from .words import word_spans

__all__ = [
    "MODES",
    "NATIVE_ONLY",
    "TWO_STREAMS",
    "Change",
    "Mode",
    "Normalised",
    "Phrase",
    "Reason",
    "Segment",
    "Span",
    "Stream",
    "changes",
    "english_prompt",
    "escape",
    "normalise",
    "parts",
    "phrases_in",
    "route",
    "split",
    "word_spans",
]

"""What a prompt says, as pure text: width of punctuation, weights, and which stream hears what."""

from .grammar import Normalised, normalise
from .streams import MODES, NATIVE_ONLY, TWO_STREAMS, Segment, english_prompt, escape, route
from .weights import Span, split

__all__ = [
    "MODES",
    "NATIVE_ONLY",
    "TWO_STREAMS",
    "Normalised",
    "Segment",
    "Span",
    "english_prompt",
    "escape",
    "normalise",
    "route",
    "split",
]

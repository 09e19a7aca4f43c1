"""Says in words what a prompt becomes: which stream hears what, in which tokens and windows, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import comfy.sd

from ..prompt import NATIVE_ONLY, Phrase, Segment, changes, english_prompt, normalise, parts, route
from .base import NAMES
from .clip import KEY, SILENCE, BridgedClip
from .language import Words
from .pseudo import Place

_EMBEDDING = "embedding:"
_END_OF_WORD = "</w>"


def inspect(clip: Any, text: str, say: Words) -> str:
    """The report on a prompt under a CLIP, bridged or not; nothing is loaded and nothing is encoded."""
    if not isinstance(clip, BridgedClip):
        head = [say("inspector_head_stock"), ""]
        return "\n".join([*head, *_english(clip, clip.tokenize(text, return_word_ids=True), say)])
    speech = clip.speech
    phrases = clip.phrases()
    segments = route(text, speech.route, phrases)
    tokens = clip.tokenize(text, return_word_ids=True)
    name = "inspector_route_native_only" if speech.route == NATIVE_ONLY else "inspector_route_two_streams"
    blocks = [
        [
            say(
                "inspector_head",
                bridge=speech.name,
                base=say("inspector_base_pocket")
                if speech.base.name == "pocket"
                else NAMES[speech.base.name],
                route=say(name),
                strength=f"{speech.strength:g}",
            )
        ],
        list(_changes(text, say)),
        [
            say("inspector_segments"),
            *(_segment(s, phrases, say) for s in segments if s.text.strip() or s.reason == "empty"),
        ],
        list(_native(clip, segments, tokens[KEY], say)),
        _english(clip, tokens, say, segments),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _changes(text: str, say: Words) -> Iterator[str]:
    # One character stands for one, so runs can be taken apart and counted.
    counted = Counter(
        pair for change in changes(text) for pair in zip(change.typed, change.read, strict=True)
    )
    if not counted:
        return
    yield say("inspector_changes")
    for (typed, read), times in counted.items():
        yield say("inspector_change", typed=_shown(typed), read=_shown(read), times=times)


def _segment(segment: Segment, phrases: Sequence[Phrase], say: Words) -> str:
    stream = say(f"inspector_stream_{segment.stream}")
    weight = "" if segment.weight == 1.0 else f" \u00d7{segment.weight:g}"
    why = say(f"inspector_reason_{segment.reason.replace(' ', '_')}")
    if segment.reason in ("trigger", "kept"):
        written = _plain(segment.text)
        sources = [p.source for p in phrases if p.source and _plain(p.text) == written]
        if sources:
            why = say("inspector_reason_from", why=why, source=", ".join(dict.fromkeys(sources)))
    return say("inspector_segment", stream=stream, text=_shown(segment.text), weight=weight, why=why)


def _native(
    clip: BridgedClip, segments: Sequence[Segment], chunks: Sequence[Sequence[Any]], say: Words
) -> Iterator[str]:
    native = [segment for segment in segments if segment.stream == "native"]
    if all(token == SILENCE for chunk in chunks for token, *_ in chunk):
        yield say("inspector_native_silent")
        return
    tower = clip.speech.tower
    used, windows = _use(chunks)
    yield say(
        "inspector_native",
        tower=tower.encoder.identity,
        used=used,
        room=tower.words.capacity * windows,
        windows=windows,
    )
    if windows > 1:
        yield say("inspector_windows")
    if clip.speech.inside:
        yield say("inspector_inside")
    unknown: list[str] = []
    for segment in native:
        pieces = tower.encoder.tokenize(segment.text)
        written = [segment.text[piece.start : piece.end] for piece in pieces]
        if any(written):  # the host's tokenizers do not say where a piece stands
            yield say("inspector_pieces", pieces=" | ".join(_shown(piece) for piece in written if piece))
        is_unknown = getattr(tower.encoder, "is_unknown", None)
        if is_unknown is not None:
            unknown += [w for piece, w in zip(pieces, written, strict=True) if is_unknown(piece.id)]
    if unknown:
        yield say("inspector_unknown", pieces=" | ".join(_shown(piece) for piece in dict.fromkeys(unknown)))
    weights = [segment.weight for segment in native if segment.text.strip()]
    if any(weight != 1.0 for weight in weights) and not tower.bridge.tokenwise:
        yield say("inspector_mean_weight")


def _english(
    clip: Any, tokens: Mapping[str, Any], say: Words, segments: Sequence[Segment] | None = None
) -> list[str]:
    stock = {key: chunks for key, chunks in tokens.items() if key != KEY}
    lines: list[str] = []
    for key, chunks in stock.items():
        used, windows = _use(chunks)
        if not used:
            continue
        cutter = getattr(clip.tokenizer, f"clip_{key}", None)
        room = sum(len(chunk) for chunk in chunks) - 2 * windows
        lines.append(
            say("inspector_english", tower=f"CLIP-{key.upper()}", used=used, room=room, windows=windows)
        )
        words = getattr(cutter, "inv_vocab", None)
        if words is not None:
            native = iter(_native_pieces(clip, segments or []))
            spoken = " | ".join(
                _weighted(_shown(next(native, "\u25c7")), weight)
                if isinstance(token, Place)
                else _word(token, weight, words)
                for token, weight in _spoken(chunks)
            )
            lines.append(say("inspector_pieces", pieces=spoken))
    if not lines:
        return [say("inspector_english_silent")]
    if segments is not None:
        lines += _embeddings(clip, segments, say)
    if segments is not None and not clip.speech.inside:
        heard = " BREAK ".join(filter(str.strip, map(english_prompt, parts(segments))))
        lines.append(say("inspector_heard", prompt=heard))
    return lines


def _embeddings(clip: BridgedClip, segments: Sequence[Segment], say: Words) -> Iterator[str]:
    for segment in segments:
        if segment.reason != "embedding":
            continue
        name = segment.text.removeprefix(_EMBEDDING)
        tokens = comfy.sd.CLIP.tokenize(clip, segment.text)
        rows = max(
            sum(not isinstance(token, int) for chunk in chunks for token, *_ in chunk)
            for chunks in tokens.values()
        )
        yield say("inspector_embedding" if rows else "inspector_embedding_missing", name=name, rows=rows)


def _native_pieces(clip: Any, segments: Sequence[Segment]) -> Iterator[str]:
    """The text of each native piece, in the order of their places in the CLIP's own windows."""
    for segment in segments:
        if segment.stream == "native":
            for piece in clip.speech.tower.encoder.tokenize(segment.text):
                yield segment.text[piece.start : piece.end]


def _use(chunks: Sequence[Sequence[Any]]) -> tuple[int, int]:
    """Tokens that belong to a word, and windows."""
    return sum(bool(token[2]) for chunk in chunks for token in chunk), len(chunks)


def _spoken(chunks: Sequence[Sequence[Any]]) -> Iterator[tuple[Any, float]]:
    return ((token, weight) for chunk in chunks for token, weight, word in chunk if word)


def _word(token: Any, weight: float, words: Mapping[int, str]) -> str:
    text = words.get(token, str(token)).replace(_END_OF_WORD, "") if isinstance(token, int) else "\u25c6"
    return _weighted(text, weight)


def _weighted(text: str, weight: float) -> str:
    return text if weight == 1.0 else f"{text}\u00d7{weight:g}"


def _plain(text: str) -> str:
    """A phrase without what may differ between its writing in a prompt and in a list."""
    bare = normalise(text).text.replace("\\(", "(").replace("\\)", ")")
    return re.sub(r"[\s_]+", " ", bare).strip().casefold()


def _shown(text: str) -> str:
    """A text on one line."""
    return text.replace("\n", "\u23ce").replace("\t", " ")

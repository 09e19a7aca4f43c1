"""BridgedClip: a real `comfy.sd.CLIP` that hears a second language through a native tower."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from ..prompt import Phrase, Segment, english_prompt, parts, route
from . import carried, pseudo, triggers
from .base import Base
from .cache import Said
from .joining import NEUTRAL, SHARED, Joining, Rows, append, fade, limit, share_window
from .pseudo import Reminder
from .rows import MARK, Mark
from .tower import NativeTower
from .words import Asked, Chunk, ask, stock_windows, windows

KEY = "native"
"""Our entry in the tokens dict, beside the checkpoint's own `l`, `g` or `h`."""

UNPROJECTED = "unprojected"
"""The pooled vector before its projection, which the host asks for where it needs nothing else (GLIGEN)."""

NEGPIP = "ppm_negpip"
"""Under this name the pack NegPip says in a CLIP's options that every row stands twice."""

SILENCE = -1
"""Token of a native chunk that says nothing: the prompt has no native text, so no native rows are made."""


@dataclass(frozen=True, eq=False)
class Speech:
    """How a BridgedClip speaks: tower, route (one of `prompt.MODES`), strength (of native text), base.

    marks: whether the MODEL has to know which rows of a conditioning are native.
    phrases: words that go to the checkpoint's own CLIP whatever they are, beside the triggers of LoRAs.
    joining: how the two streams of a prompt become one.
    inside: the bridge says input embeddings of the CLIP (`host/pseudo.py`), which reads both streams itself.
    """

    tower: NativeTower
    route: str
    strength: float
    base: Base
    name: str
    marks: bool = False
    phrases: tuple[Phrase, ...] = ()
    joining: Joining = Joining()
    inside: bool = False


@dataclass(frozen=True, eq=False)
class Heard:
    """What the streams of a prompt are given: native chunks (None: nothing) and the stock tokens.

    spoken: number of English tokens that are not start, end or padding, counted beside native text alone.
    """

    native: list[Chunk] | None
    english: dict[str, list[Chunk]]
    spoken: int = 0

    @property
    def silent(self) -> bool:
        """Whether the English stream says nothing, beside native text."""
        return self.spoken == 0

    def faded(self, joining: Joining) -> dict[str, list[Chunk]]:
        """The stock tokens as loud as the blend lets them be."""
        level = joining.levels[1]
        return self.english if level == 1.0 or self.silent else fade(self.english, level)


class BridgedClip(comfy.sd.CLIP):
    """The checkpoint's own CLIP with a native tower beside it.

    `cond_stage_model`, `tokenizer` and `patcher` stay the checkpoint's own objects, so LoRA key maps, clip
    skip, textual inversion, hooks and saving mean what they always mean. The tokens dict has the checkpoint's
    own keys (English stream) and `KEY` (native stream). Encoding joins both streams along the token axis,
    native rows first; a stream that says nothing adds no rows, because the U-Net's cross-attention has no
    mask and no row is neutral. A prompt that is all English therefore gives exactly what the stock CLIP
    gives. `Joining` has a say only where both streams speak.
    """

    speech: Speech
    loras: tuple[carried.Load, ...] = ()
    """What LoRAs brought with them, whichever node loaded them."""

    @staticmethod
    def over(clip: Any, speech: Speech, loras: tuple[carried.Load, ...] = ()) -> BridgedClip:
        """A bridged clone of `clip`, which itself stays as it is; loras: those that it carries already."""
        if isinstance(clip, BridgedClip):
            raise BridgeError(
                "This CLIP already has a language bridge.",
                f"a CLIP bridged by {clip.speech.name}",
                "the checkpoint's own CLIP",
                "Use one Language Bridge node for each checkpoint: remove one of the two.",
            )
        bridged: Any = clip.clone()
        bridged.__class__ = BridgedClip
        bridged.speech = speech
        bridged.loras = loras
        speech.tower.attach(bridged.patcher)
        return bridged

    def clone(self, *arguments: Any, **options: Any) -> BridgedClip:
        """A bridged clone; the native tower is shared, patches are not (stock meaning)."""
        cloned: Any = super().clone(*arguments, **options)
        cloned.__class__ = BridgedClip
        cloned.speech = self.speech
        cloned.loras = self.loras
        return cloned

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        """Stock meaning; what a LoRA brings is remembered, because its trigger words are looked for later."""
        self.loras = carried.together(self.loras, carried.loads(patches, strength_patch))
        return super().add_patches(patches, strength_patch, strength_model)

    def with_speech(self, **changes: Any) -> BridgedClip:
        """A clone that speaks in another way; changes: fields of `Speech`."""
        changed = self.clone()
        changed.speech = replace(self.speech, **changes)
        return changed

    def phrases(self) -> tuple[Phrase, ...]:
        """What goes to the checkpoint's own CLIP whatever it is: the artist's words and triggers of LoRAs."""
        return (*self.speech.phrases, *triggers.phrases_of(self))

    def tokenize(self, text: Any, return_word_ids: bool = False, **options: Any) -> dict[str, list[Chunk]]:
        """Stock tokens of the English stream and, under `KEY`, native chunks of (id, weight[, word id]).

        Every part of a prompt (between BREAKs) begins a window in each stream that has something to say in
        it. text: a str; a list of str, which some nodes cut themselves, as long as all of it is English.
        """
        if not isinstance(text, str):
            return self._tokenize_many(text, return_word_ids, options)
        groups = parts(route(text, self.speech.route, self.phrases()))
        native = [
            [(segment.text, segment.weight) for segment in group if segment.stream == "native"]
            for group in groups
        ]
        chunks = windows(self.speech.tower.words, native) or [[(SILENCE, 1.0, 0)]]
        spoken = any(text.strip() for group in native for text, _ in group)
        if spoken and self.speech.inside:
            tokens = self._weave(groups, chunks, return_word_ids, options)
        else:
            stock = partial(super().tokenize, return_word_ids=return_word_ids, **options)
            tokens = stock_windows(stock, [english_prompt(group) for group in groups])
        if not return_word_ids:
            chunks = [[token[:2] for token in chunk] for chunk in chunks]
        if spoken and not self.speech.inside:
            tokens = {key: _reminding(value, chunks) for key, value in tokens.items()}
        tokens[KEY] = chunks
        return tokens

    def _weave(
        self,
        groups: Sequence[Sequence[Segment]],
        chunks: list[Chunk],
        word_ids: bool,
        options: Mapping[str, Any],
    ) -> dict[str, list[Chunk]]:
        """Windows of the CLIP in which each piece of native text has its place."""
        words = self.speech.tower.words
        tokens: dict[str, list[Chunk]] = {}
        for key, empty in self._empty().items():
            parts_of: list[list[list[Chunk] | int]] = []
            for group in groups:
                first = getattr(words, "opening", words.tokenize)
                segments: list[list[Chunk] | int] = []
                for segment in group:
                    if segment.stream == "native":
                        segments.append(len(first(segment.text)))
                        first = words.tokenize
                    elif segment.text.strip():
                        segments.append(super().tokenize(english_prompt([segment]), True, **options)[key])
                parts_of.append(segments)
            woven = pseudo.weave(parts_of, chunks, empty[0])
            tokens[key] = woven if word_ids else [[token[:2] for token in chunk] for chunk in woven]
        return tokens

    def _tokenize_many(
        self, texts: Any, word_ids: bool, options: Mapping[str, Any]
    ) -> dict[str, list[Chunk]]:
        for text in texts if isinstance(texts, (list, tuple)) else ():
            segments = route(text, self.speech.route, self.phrases()) if isinstance(text, str) else []
            if any(segment.stream == "native" and segment.text.strip() for segment in segments):
                raise BridgeError(
                    "This node takes the prompt apart in its own way.",
                    "several texts at once, with native text in them",
                    "one text",
                    "Use CLIP Text Encode for this prompt (in CLIP Text Encode++, the parser comfy or "
                    "comfy++), or write it in English.",
                )
        tokens: dict[str, list[Chunk]] = super().tokenize(texts, word_ids, **options)
        tokens[KEY] = [[(SILENCE, 1.0, 0) if word_ids else (SILENCE, 1.0)]]
        return tokens

    def encode_from_tokens(
        self, tokens: Mapping[str, Any], return_pooled: Any = False, return_dict: bool = False
    ) -> Any:
        """Stock meaning of every argument; both streams are in the context.

        Where the blend is for a part of the steps, what holds at the first step holds for all.
        """
        joining = self.speech.joining.at_first()
        if self.speech.inside:
            return self._read(tokens, joining, return_pooled, return_dict)
        heard = self._heard(tokens, joining, return_pooled == UNPROJECTED)
        tower = self.speech.tower
        if heard.native is None:
            with tower.at_rest():
                return super().encode_from_tokens(heard.english, return_pooled, return_dict)
        asked = self._ask(heard.native, heard, joining)
        if heard.silent and not self._needs_english_pooled():
            joined: dict[str, Any] = {"cond": None, "pooled_output": None}
            self.add_hooks_to_dict(joined)
        else:
            with tower.at_rest(tower.knows(asked.ids, asked.masks)):
                joined = super().encode_from_tokens(heard.faded(joining), return_pooled, return_dict=True)
        self._join(joined, asked, heard, joining)
        if return_dict:
            return joined
        return (joined["cond"], joined["pooled_output"]) if return_pooled else joined["cond"]

    def encode_from_tokens_scheduled(
        self,
        tokens: Mapping[str, Any],
        unprojected: bool = False,
        add_dict: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[list[Any]]:
        """Stock meaning; native rows do not depend on CLIP hooks, so each keyframe gets the same ones.

        A blend for a part of the steps makes an entry for each part, as the host's own schedules do.
        """
        joining = self.speech.joining
        if joining.neutral or not self._both(tokens):
            joining = joining.at_first()  # which holds for all steps
        entries: list[list[Any]] = []
        for start, end, here in joining.stretches():
            other = copy.copy(self)
            other.speech = replace(self.speech, joining=here)
            said = other._scheduled(tokens, unprojected, dict(add_dict or {}), options)
            entries += [entry for entry in said if limit(entry[1], start, end)]
        return entries

    def _scheduled(
        self, tokens: Mapping[str, Any], unprojected: bool, extra: dict[str, Any], options: Mapping[str, Any]
    ) -> list[list[Any]]:
        joining, tower = self.speech.joining, self.speech.tower
        if self.patcher.forced_hooks is None or not self.use_clip_schedule:
            # Without a schedule the stock method calls encode_from_tokens, which joins.
            return super().encode_from_tokens_scheduled(tokens, unprojected, extra, **options)
        if self.speech.inside:
            return self._read_scheduled(tokens, unprojected, extra, options)
        heard = self._heard(tokens, joining, unprojected)
        if heard.native is None:
            with tower.at_rest():
                return super().encode_from_tokens_scheduled(heard.english, unprojected, extra, **options)
        asked = self._ask(heard.native, heard, joining)
        with tower.at_rest(tower.knows(asked.ids, asked.masks)):
            scheduled = super().encode_from_tokens_scheduled(
                heard.faded(joining), unprojected, extra, **options
            )
        for entry in scheduled:
            joined: dict[str, Any] = {"cond": entry[0], "pooled_output": entry[1].get("pooled_output")}
            self._join(joined, asked, heard, joining)
            entry[0] = joined.pop("cond")
            entry[1].update(joined)
        return scheduled

    def _both(self, tokens: Mapping[str, Any]) -> bool:
        """Whether both streams have something to say."""
        if self.speech.inside:
            empty = self._empty()
            return bool(pseudo.places(tokens)) and any(
                pseudo.both(chunks, empty[key][0]) for key, chunks in tokens.items() if key in empty
            )
        native, english = _split(tokens)
        return native is not None and self._spoken(english) > 0

    def _read(
        self, tokens: Mapping[str, Any], joining: Joining, return_pooled: Any, return_dict: bool
    ) -> Any:
        """Lets the checkpoint's own CLIP read native text in its own window.

        A blend moves what is said of both towards what is said of one stream, in the same windows.
        """
        ways = self._ways(tokens, joining)
        with self.speech.tower.at_rest():
            said = [super(BridgedClip, self).encode_from_tokens(way, return_pooled, True) for way in ways]
        joined = said[0] if len(said) == 1 else pseudo.mix(said[0], said[1], 1.0 - min(joining.levels))
        if return_dict:
            return joined
        return (joined["cond"], joined["pooled_output"]) if return_pooled else joined["cond"]

    def _read_scheduled(
        self,
        tokens: Mapping[str, Any],
        unprojected: bool,
        extra: dict[str, Any],
        options: Mapping[str, Any],
    ) -> list[list[Any]]:
        stock, joining = super().encode_from_tokens_scheduled, self.speech.joining
        ways = self._ways(tokens, joining)
        with self.speech.tower.at_rest():
            said = [stock(way, unprojected, dict(extra), **options) for way in ways]
        if len(said) == 1:
            return said[0]
        for one, other in zip(said[0], said[1], strict=True):
            both = [{"cond": entry[0], "pooled_output": entry[1]["pooled_output"]} for entry in (one, other)]
            joined = pseudo.mix(both[0], both[1], 1.0 - min(joining.levels))
            one[0], one[1]["pooled_output"] = joined["cond"], joined["pooled_output"]
        return said[0]

    def _ways(self, tokens: Mapping[str, Any], joining: Joining) -> list[dict[str, list[Chunk]]]:
        """Stock tokens to be read: all words, or those of one stream, or both ways where they are mixed."""
        empty = self._empty()
        english: dict[str, list[Chunk]] = {key: value for key, value in tokens.items() if key != KEY}
        if not pseudo.places(english):
            return [english]
        ways = [english]
        if joining.blend != NEUTRAL and self._both(tokens):
            native = joining.blend > NEUTRAL
            alone = {key: pseudo.keep(value, empty[key][0], native=native) for key, value in english.items()}
            ways = [alone] if joining.blend in (0.0, 1.0) else [english, alone]
        said: dict[int, Tensor] = {}

        def say(chunks: list[Chunk]) -> Tensor:
            if id(chunks) not in said:
                asked = ask(self.speech.tower.words, [[(token, 1.0) for token, *_ in c] for c in chunks])
                said[id(chunks)] = self._finite(self.speech.tower.hear(asked.ids, asked.masks).cond.context)
            return said[id(chunks)]

        strength = self.speech.strength
        return [{key: pseudo.fill(value, say, strength) for key, value in way.items()} for way in ways]

    def _heard(self, tokens: Mapping[str, Any], joining: Joining, unprojected: bool) -> Heard:
        """What both streams are given: of two that speak, a blend of 0 or 1 leaves one.

        unprojected: nothing native may be said, so that BridgeError is raised when there are native words.
        """
        native, english = _split(tokens)
        if native is not None and unprojected:
            self._refuse_words(native)
            native = None
        if native is None:
            return Heard(None, english)
        spoken = self._spoken(english)
        if not spoken or joining.blend not in (0.0, 1.0):
            return Heard(native, english, spoken)
        if joining.blend == 0.0:
            return Heard(native, english, spoken) if self._wordless(native) else Heard(None, english)
        return Heard(native, {key: value for key, value in self._empty().items() if key in english})

    def _wordless(self, native: list[Chunk]) -> bool:
        return not bool(ask(self.speech.tower.words, native).weights.word.any())

    def _join(self, joined: dict[str, Any], asked: Asked, heard: Heard, joining: Joining) -> None:
        """Puts native rows in front of the English rows of `joined`; mixes pooled by share of tokens.

        A bridge that the MODEL goes on with leaves its `MARK`.
        """
        said, context, pooled = self._speak(asked)
        speech, native = self.speech, context.shape[1]
        if not heard.silent:
            own_rows: Tensor = joined["cond"]
            shared = self._share(context, own_rows, asked, heard) if joining.join == SHARED else None
            context, native = shared or append(context, own_rows)
        if speech.marks:
            mark = Mark(speech.tower.digest, native)
            if said.hidden is not None:
                mark = replace(mark, hidden=said.hidden, weights=asked.weights, words=asked.digest)
            joined[MARK] = mark.pack()
        joined["cond"] = context
        own = joined["pooled_output"]
        if pooled is not None and own is not None and own.shape == pooled.shape:
            spoken = int(asked.weights.word.sum())
            share = 1.0 if heard.silent else joining.share(spoken, heard.spoken)
            pooled = share * pooled + (1 - share) * own.to(pooled)
        if own is None and pooled is None and not self.speech.base.pooled:
            # The stock CLIP gives one, which nodes that stack prompts count on and no such U-Net reads.
            pooled = torch.zeros(len(context), self.speech.base.context).to(context)
        joined["pooled_output"] = own if pooled is None else pooled

    def _share(self, native: Tensor, own: Tensor, asked: Asked, heard: Heard) -> tuple[Tensor, int] | None:
        """One window for both streams; None where rows do not stand for tokens, which no padding tells of."""
        if not self.speech.tower.bridge.tokenwise:
            return None
        word = asked.weights.word
        fill = self.speech.tower.words.frame([])[0].mode().values
        quiet = ((asked.ids[: len(word)] == fill) & ~word).flatten()
        empty, english = self._empty(), heard.english
        keys = [key for key in self.speech.base.keys if key in english]
        rests: list[list[bool]] = []
        for key in keys:
            fillers = [token for token, *_ in empty[key][0]]
            filler = max(fillers, key=fillers.count)
            rests.append(
                [isinstance(token, int) and token == filler for chunk in english[key] for token, *_ in chunk]
            )
        length = min(map(len, rests), default=0)
        rest = torch.tensor([rests[0][:length], *(each[:length] for each in rests[1:])]).all(0)
        window = len(empty[keys[0]][0]) if keys else 0
        if asked.weights.pairs:
            quiet, rest, window = quiet.repeat_interleave(2), rest.repeat_interleave(2), 2 * window
        if (len(quiet), len(rest)) != (native.shape[1], own.shape[1]):
            return None
        return share_window(
            Rows(native, quiet, int(word.sum())),
            Rows(own, rest, heard.spoken),
            window,
            2 if asked.weights.pairs else 1,
        )

    def _refuse_words(self, native: list[Chunk]) -> None:
        """BridgeError when there are words where the host wants an unprojected pooled vector alone."""
        if not self._wordless(native):
            raise BridgeError(
                "The text of a GLIGEN box cannot go over a language bridge.",
                "native words in the text of a box, whose pooled vector alone is asked for",
                "English words, which the checkpoint's own CLIP reads for it",
                "Write the text of the box in English; the prompt itself may stay as it is.",
            )

    def _ask(self, native: list[Chunk], heard: Heard, joining: Joining) -> Asked:
        level = 1.0 if heard.silent else joining.levels[0]
        pairs = bool(self.patcher.model_options.get(NEGPIP))
        return ask(self.speech.tower.words, native, self.speech.strength, level, pairs=pairs)

    def _speak(self, asked: Asked) -> tuple[Said, Tensor, Tensor | None]:
        """What the bridge said, native context [1, N, C], and pooled [1, P] of the first chunk."""
        speech = self.speech
        said = speech.tower.hear(asked.ids, asked.masks)
        rows, pooled = asked.weights.apply(said.cond, tokenwise=speech.tower.bridge.tokenwise)
        return said, self._finite(rows), pooled

    def _finite(self, rows: Tensor) -> Tensor:
        """The same rows; BridgeError when any number is none."""
        speech = self.speech
        if not bool(torch.isfinite(rows).all()):
            raise BridgeError(
                f"The bridge {speech.name} gave numbers that are not finite.",
                f"NaN or infinity in the native rows, computed in {speech.tower.patcher.model_dtype()}",
                "finite numbers",
                "Start ComfyUI with --fp32-text-enc, or fetch the bridge and its tower again.",
            )
        return rows

    def _needs_english_pooled(self) -> bool:
        return self.speech.base.pooled > 0 and not self.speech.tower.bridge.spec.pooled

    def _empty(self) -> dict[str, list[Chunk]]:
        """The stock tokens of the empty prompt."""
        return super().tokenize("")

    def _spoken(self, english: Mapping[str, list[Chunk]]) -> int:
        """Number of tokens in the English stream that are not start, end or padding."""
        # Each tower has padding of its own: CLIP-L repeats the end token, CLIP-G and CLIP-H take token 0.
        nothing = {key: {token for token, *_ in chunks[0]} for key, chunks in self._empty().items()}
        counts = (
            sum(
                not isinstance(token, int) or token not in nothing[key]
                for chunk in english[key]
                for token, *_ in chunk
            )
            for key in self.speech.base.keys
            if key in english
        )
        return max(counts, default=0)


def _reminding(chunks: Sequence[Chunk], native: list[Chunk]) -> list[Chunk]:
    """The same chunks, each of them reminding of `native`."""
    return [
        [(Reminder.of(chunk[0][0], native), *chunk[0][1:]), *chunk[1:]]
        if isinstance(chunk[0][0], int)
        else chunk
        for chunk in chunks
    ]


def _split(tokens: Mapping[str, Any]) -> tuple[list[Chunk] | None, dict[str, list[Chunk]]]:
    """Native chunks (None where the prompt has no native text) and the stock tokens without our key.

    Where a node has put tokens of several prompts together (CLIP Text Encode SDXL), the native text of the
    first that has some is heard.
    """
    english: dict[str, list[Chunk]] = {}
    reminders: list[Reminder] = []
    for key, chunks in tokens.items():
        if key != KEY:
            found = [
                token[0]
                for chunk in chunks
                if isinstance(chunk, list)
                for token in chunk
                if isinstance(token, tuple) and isinstance(token[0], Reminder)
            ]
            reminders += found
            # Nodes with tokenizers of their own have chunks of another make, which are handed on as they are.
            english[key] = [list(_plain(chunk)) for chunk in chunks] if found else chunks
    if KEY not in tokens:
        for reminder in reminders:
            int(reminder)
    said = [_spoken_chunks(tokens.get(KEY) or []), *(_spoken_chunks(each.native) for each in reminders)]
    native = next((chunks for chunks in said if chunks), None)
    for reminder in reminders:
        # One that says the same and more: the other was the frame of an empty prompt, or a part of it.
        if native is not None and _ids(reminder.native) > _ids(native):
            native = reminder.native
    if native is not None and any(_ids(reminder.native) - _ids(native) for reminder in reminders):
        logging.warning(
            "Language Bridge: this conditioning is made of several prompts with different native text; "
            "only one of them is heard."
        )
    return native, english


def _plain(chunk: Chunk) -> Iterator[tuple[Any, ...]]:
    """A chunk whose tokens remind of nothing."""
    for token in chunk:
        # The sum of an int and a number is a plain int, and int() would raise.
        yield (token[0] + 0, *token[1:]) if isinstance(token[0], Reminder) else token


def _spoken_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    return [chunk for chunk in chunks if any(token != SILENCE for token, *_ in chunk)]


def _ids(chunks: Sequence[Chunk]) -> set[Any]:
    return {token for chunk in chunks for token, *_ in chunk}

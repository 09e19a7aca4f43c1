"""BranchedClip: a real `comfy.sd.CLIP` whose native text goes to a branch, and only that."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import comfy.sd
import torch

from ..bridges.errors import BridgeError
from ..prompt import Phrase, english_prompt, parts, route
from ..prompt.emphasis import emphasised
from ..prompt.streams import NATIVE_ONLY, TWO_STREAMS, Segment
from . import carried, triggers
from .branch_text import MARK, MOST_CHUNKS, BranchText, chunks_of, weighed
from .clip import SILENCE
from .tower import NativeTower
from .words import Chunk

KEY = "native"
"""Our entries in the tokens dict are this with the digest of the branch behind it."""


@dataclass(frozen=True, eq=False)
class Voice:
    """How one branch hears: its tower, the route (one of `prompt.MODES`), the name of its file.

    weighted: whether the weights of the prompt act on its native rows; own_length: whether its texts keep
    their own length. Both are ours; the published system drops the weights and makes all texts equally long.
    """

    tower: NativeTower
    route: str
    name: str
    weighted: bool = False
    own_length: bool = False

    @property
    def key(self) -> str:
        """Its entry in the tokens dict."""
        return f"{KEY}:{self.tower.digest[:16]}"

    def cut(self, text: str, segments: list[Segment]) -> list[Chunk]:
        """The native text of a prompt in chunks; a chunk of silence where none of it is native.

        What stands behind a BREAK begins a chunk. On the route native only, a prompt without marks is read as
        it was typed, in the grammar of the published script.
        """
        native = [[(s.text, s.weight) for s in part if s.stream == "native"] for part in parts(segments)]
        if self.route == NATIVE_ONLY and all(segment.stream == "native" for segment in segments):
            native = [emphasised(text)]
        chunks = [chunk for part in native if part for chunk in chunks_of(self.tower.encoder, part)]
        return chunks[:MOST_CHUNKS] or [[(SILENCE, 1.0, 0)]]

    def hear(self, chunks: list[Chunk]) -> BranchText:
        """What the branch reads of these chunks; BridgeError when the tower gives numbers that are odd."""
        tower, encoder = self.tower, self.tower.encoder
        ids = torch.tensor([[token for token, *_ in chunk] for chunk in chunks])
        (nothing,) = chunks_of(encoder, ())
        ids = torch.cat([ids, torch.tensor([[token for token, *_ in nothing]])])
        cond = tower.read(ids, encoder.mask_of(ids))
        if not bool(torch.isfinite(cond.context).all()):
            raise BridgeError(
                f"The text tower of the branch {self.name} gave numbers that are not finite.",
                f"NaN or infinity in the native rows, computed in {tower.patcher.model_dtype()}",
                "finite numbers",
                "Start ComfyUI with --fp32-text-enc, or fetch the branch and its tower again.",
            )
        rows, empty = cond.context[:-1], cond.context[-1:]
        said = weighed(rows, empty, chunks) if self.weighted else rows
        spoken = self.route == NATIVE_ONLY or not torch.equal(ids[0], ids[-1])
        marks = encoder.marks
        return BranchText(
            rows=said.clone(),
            empty=empty.clone(),
            edges=(len(marks.start), len(marks.end)),
            pooled=None if cond.pooled is None else cond.pooled[:1].clone(),
            empty_pooled=None if cond.pooled is None else cond.pooled[-1:].clone(),
            speaks=spoken,
            own_length=self.own_length,
        )


class BranchedClip(comfy.sd.CLIP):
    """The checkpoint's own CLIP, which also says to each branch what its prompt means to it.

    The context stays the own CLIP's over the English part of a prompt, or over nothing, as the branch was
    trained. The native part goes over the branch's tower into an entry of our own in the conditioning.
    """

    voices: tuple[Voice, ...]
    loras: tuple[carried.Load, ...] = ()
    """What LoRAs brought with them, whichever node loaded them."""

    @staticmethod
    def over(clip: Any, voice: Voice, loras: tuple[carried.Load, ...] = ()) -> BranchedClip:
        """A clone of `clip` with a further voice; `clip` stays as it is. loras: those that it carries now."""
        branched: Any = clip.clone()
        branched.voices = (*getattr(clip, "voices", ()), voice)
        branched.loras = carried.together(getattr(clip, "loras", ()), loras)
        branched.__class__ = BranchedClip
        voice.tower.attach(branched.patcher)
        return branched

    def clone(self, *arguments: Any, **options: Any) -> BranchedClip:
        """A branched clone; towers are shared, patches are not (stock meaning)."""
        cloned: Any = super().clone(*arguments, **options)
        cloned.__class__ = BranchedClip
        cloned.voices = self.voices
        cloned.loras = self.loras
        return cloned

    def add_patches(self, patches: Any, strength_patch: float = 1.0, strength_model: float = 1.0) -> Any:
        """Stock meaning; what a LoRA brings is remembered, because its trigger words are looked for later."""
        self.loras = carried.together(self.loras, carried.loads(patches, strength_patch))
        return super().add_patches(patches, strength_patch, strength_model)

    def phrases(self) -> tuple[Phrase, ...]:
        """What goes to the checkpoint's own CLIP whatever it is: trigger words of LoRAs."""
        return triggers.phrases_of(self)

    def with_voices(self, **changes: Any) -> BranchedClip:
        """A clone whose voices are changed."""
        cloned = self.clone()
        cloned.voices = tuple(replace(voice, **changes) for voice in self.voices)
        return cloned

    def tokenize(self, text: Any, return_word_ids: bool = False, **options: Any) -> dict[str, list[Chunk]]:
        """Stock tokens of the English stream and, for each voice, chunks of (id, weight[, word id])."""
        if not isinstance(text, str):  # some packs hand over a list of texts, for the stock towers alone
            tokens = super().tokenize(text, return_word_ids, **options)
            silence = (SILENCE, 1.0, 0) if return_word_ids else (SILENCE, 1.0)
            return tokens | {voice.key: [[silence]] for voice in self.voices}
        # English words reach the checkpoint's CLIP unless every voice claims the whole prompt.
        english = TWO_STREAMS if any(v.route == TWO_STREAMS for v in self.voices) else NATIVE_ONLY
        phrases = self.phrases()
        groups = parts(route(text, english, phrases))
        tokens = self._tokenize_english(groups, return_word_ids, options)
        for voice in self.voices:
            chunks = voice.cut(text, route(text, voice.route, phrases))
            tokens[voice.key] = chunks if return_word_ids else [[t[:2] for t in chunk] for chunk in chunks]
        return tokens

    def _tokenize_english(
        self, groups: list[list[Segment]], word_ids: bool, options: Mapping[str, Any]
    ) -> dict[str, list[Chunk]]:
        """Stock tokens; the English of each part that has some begins a window."""
        prompts = [english_prompt(group) for group in groups]
        spoken = [prompt for prompt in prompts if prompt.strip()] if len(prompts) > 1 else prompts
        tokens: dict[str, list[Chunk]] = super().tokenize(spoken[0] if spoken else "", word_ids, **options)
        for prompt in spoken[1:]:
            for key, chunks in super().tokenize(prompt, word_ids, **options).items():
                last = max((t[2] for chunk in tokens[key] for t in chunk), default=0) if word_ids else 0
                tokens[key] = tokens[key] + [
                    [(*t[:2], t[2] and t[2] + last) if word_ids else t for t in chunk] for chunk in chunks
                ]
        return tokens

    def encode_from_tokens(
        self, tokens: Mapping[str, Any], return_pooled: Any = False, return_dict: bool = False
    ) -> Any:
        """Stock meaning of every argument; native text is in the dict alone."""
        english, native = self._split(tokens)
        with self._at_rest():
            said = super().encode_from_tokens(english, return_pooled, return_dict)
        if return_dict and native:
            said[MARK] = self._hear(native)
        elif native:
            logging.warning("a node asked for English text alone; the native text of its prompt is left out")
        return said

    def encode_from_tokens_scheduled(
        self,
        tokens: Mapping[str, Any],
        unprojected: bool = False,
        add_dict: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[list[Any]]:
        """Stock meaning; native text does not depend on CLIP hooks, so each keyframe gets the same."""
        english, native = self._split(tokens)
        with self._at_rest():
            scheduled = super().encode_from_tokens_scheduled(
                english, unprojected, dict(add_dict or {}), **options
            )
        if native:
            mark = self._hear(native)
            for entry in scheduled:
                entry[1][MARK] = mark
        return scheduled

    def _split(self, tokens: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Chunk]]]:
        """The stock tokens, and for each voice that has native text its chunks."""
        keys = {voice.key for voice in self.voices}
        native = {
            key: value for key, value in tokens.items() if key in keys and value and value[0][0][0] != SILENCE
        }
        return {key: value for key, value in tokens.items() if key not in keys}, native

    def _hear(self, native: Mapping[str, list[Chunk]]) -> dict[str, Any]:
        return {
            voice.tower.digest: voice.hear(native[voice.key]).pack()
            for voice in self.voices
            if voice.key in native
        }

    def _at_rest(self) -> ExitStack:
        """While inside, loading the CLIP does not load the towers; they load when they are asked."""
        stack = ExitStack()
        for voice in self.voices:
            stack.enter_context(voice.tower.at_rest())
        return stack


def require_branched(clip: Any) -> BranchedClip:
    """`clip`, when it speaks to a branch; BridgeError else."""
    if isinstance(clip, BranchedClip):
        return clip
    raise BridgeError(
        "This CLIP speaks to no branch.",
        "a CLIP that comes from no Language Bridge node with a branch in it",
        "the CLIP of such a node",
        "Choose a branch in the Language Bridge node, or take this node away.",
    )

"""BridgedClip: a real `comfy.sd.CLIP` that hears a second language through a native tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import comfy.sd
import torch
from torch import Tensor

from ..bridges.errors import BridgeError
from ..prompt import english_prompt, route
from .base import Base
from .cache import Said
from .rows import MARK, Mark
from .tower import NativeTower
from .words import Asked, Chunk, ask, cut

KEY = "native"
"""Our entry in the tokens dict, beside the checkpoint's own `l`, `g` or `h`."""

SILENCE = -1
"""Token of a native chunk that says nothing: the prompt has no native text, so no native rows are made."""


@dataclass(frozen=True, eq=False)
class Speech:
    """How a BridgedClip speaks: tower, route (one of `prompt.MODES`), strength (of native text), base.

    marks: whether the MODEL has to know which rows of a conditioning are native.
    """

    tower: NativeTower
    route: str
    strength: float
    base: Base
    name: str
    marks: bool = False


class BridgedClip(comfy.sd.CLIP):
    """The checkpoint's own CLIP with a native tower beside it.

    `cond_stage_model`, `tokenizer` and `patcher` stay the checkpoint's own objects, so LoRA key maps, clip
    skip, textual inversion, hooks and saving mean what they always mean. The tokens dict has the checkpoint's
    own keys (English stream) and `KEY` (native stream). Encoding joins both streams along the token axis,
    native rows first; a stream that says nothing adds no rows, because the U-Net's cross-attention has no
    mask and no row is neutral. A prompt that is all English therefore gives exactly what the stock CLIP
    gives.
    """

    speech: Speech

    @staticmethod
    def over(clip: Any, speech: Speech) -> BridgedClip:
        """A bridged clone of `clip`, which itself stays as it is."""
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
        speech.tower.attach(bridged.patcher)
        return bridged

    def clone(self, *arguments: Any, **options: Any) -> BridgedClip:
        """A bridged clone; the native tower is shared, patches are not (stock meaning)."""
        cloned: Any = super().clone(*arguments, **options)
        cloned.__class__ = BridgedClip
        cloned.speech = self.speech
        return cloned

    def tokenize(self, text: str, return_word_ids: bool = False, **options: Any) -> dict[str, list[Chunk]]:
        """Stock tokens of the English stream and, under `KEY`, native chunks of (id, weight[, word id])."""
        segments = route(text, self.speech.route)
        native = [(segment.text, segment.weight) for segment in segments if segment.stream == "native"]
        tokens: dict[str, list[Chunk]] = super().tokenize(
            english_prompt(segments), return_word_ids, **options
        )
        chunks = cut(self.speech.tower.words, native) if native else [[(SILENCE, 1.0, 0)]]
        tokens[KEY] = chunks if return_word_ids else [[token[:2] for token in chunk] for chunk in chunks]
        return tokens

    def encode_from_tokens(
        self, tokens: Mapping[str, Any], return_pooled: Any = False, return_dict: bool = False
    ) -> Any:
        """Stock meaning of every argument; both streams are in the context."""
        native, english = _split(tokens)
        tower = self.speech.tower
        if native is None:
            with tower.at_rest():
                return super().encode_from_tokens(english, return_pooled, return_dict)
        asked = self._ask(native)
        if self._silent(english) and not self._needs_english_pooled():
            joined: dict[str, Any] = {"cond": None, "pooled_output": None}
            self.add_hooks_to_dict(joined)
        else:
            with tower.at_rest(tower.knows(asked.ids, asked.masks)):
                joined = super().encode_from_tokens(english, return_pooled, return_dict=True)
        self._join(joined, asked, english)
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
        """Stock meaning; native rows do not depend on CLIP hooks, so each keyframe gets the same ones."""
        extra = dict(add_dict or {})
        native, english = _split(tokens)
        hooked = self.patcher.forced_hooks is not None and self.use_clip_schedule
        if native is None or not hooked:
            # Without a schedule the stock method calls encode_from_tokens, which joins.
            with self.speech.tower.at_rest(native is None):
                return super().encode_from_tokens_scheduled(tokens, unprojected, extra, **options)
        asked, tower = self._ask(native), self.speech.tower
        with tower.at_rest(tower.knows(asked.ids, asked.masks)):
            scheduled = super().encode_from_tokens_scheduled(english, unprojected, extra, **options)
        for entry in scheduled:
            parts: dict[str, Any] = {"cond": entry[0], "pooled_output": entry[1].get("pooled_output")}
            self._join(parts, asked, english)
            entry[0] = parts.pop("cond")
            entry[1].update(parts)
        return scheduled

    def _join(self, parts: dict[str, Any], asked: Asked, english: Mapping[str, list[Chunk]]) -> None:
        """Puts native rows in front of the English rows of `parts`; mixes pooled by share of tokens.

        A bridge that the MODEL goes on with leaves its `MARK`.
        """
        said, context, pooled = self._speak(asked)
        speech = self.speech
        if speech.marks:
            mark = Mark(speech.tower.digest, context.shape[1])
            if said.hidden is not None:
                mark = replace(mark, hidden=said.hidden, weights=asked.weights, words=asked.digest)
            parts[MARK] = mark.pack()
        silent = self._silent(english)
        if not silent:
            context = torch.cat([context, parts["cond"].to(context)], dim=1)
        parts["cond"] = context
        own = parts["pooled_output"]
        if pooled is not None and own is not None and own.shape == pooled.shape:
            spoken = int(asked.weights.word.sum())
            share = 1.0 if silent else spoken / max(spoken + self._spoken(english), 1)
            pooled = share * pooled + (1 - share) * own.to(pooled)
        parts["pooled_output"] = own if pooled is None else pooled

    def _ask(self, native: list[Chunk]) -> Asked:
        return ask(self.speech.tower.words, native, self.speech.strength)

    def _speak(self, asked: Asked) -> tuple[Said, Tensor, Tensor | None]:
        """What the bridge said, native context [1, N, C], and pooled [1, P] of the first chunk."""
        speech = self.speech
        said = speech.tower.hear(asked.ids, asked.masks)
        rows, pooled = asked.weights.apply(said.cond, tokenwise=speech.tower.bridge.tokenwise)
        if not bool(torch.isfinite(rows).all()):
            raise BridgeError(
                f"The bridge {speech.name} gave numbers that are not finite.",
                f"NaN or infinity in the native rows, computed in {speech.tower.patcher.model_dtype()}",
                "finite numbers",
                "Start ComfyUI with --fp32-text-enc, or fetch the bridge and its tower again.",
            )
        return said, rows, pooled

    def _needs_english_pooled(self) -> bool:
        return self.speech.base.pooled > 0 and not self.speech.tower.bridge.spec.pooled

    def _silent(self, english: Mapping[str, list[Chunk]]) -> bool:
        """Whether the English stream says nothing, beside native text."""
        return self._spoken(english) == 0

    def _spoken(self, english: Mapping[str, list[Chunk]]) -> int:
        """Number of tokens in the English stream that are not start, end or padding."""
        # Each tower has padding of its own: CLIP-L repeats the end token, CLIP-G and CLIP-H take token 0.
        nothing = {key: {token for token, *_ in chunks[0]} for key, chunks in super().tokenize("").items()}
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


def _split(tokens: Mapping[str, Any]) -> tuple[list[Chunk] | None, dict[str, list[Chunk]]]:
    """Native chunks (None where the prompt has no native text) and the stock tokens without our key."""
    english = {key: value for key, value in tokens.items() if key != KEY}
    spoken = [chunk for chunk in tokens.get(KEY) or [] if any(token != SILENCE for token, *_ in chunk)]
    return spoken or None, english

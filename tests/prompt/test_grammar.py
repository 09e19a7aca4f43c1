"""Law (d): a prompt typed with full-width or half-width punctuation is the same prompt."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from language_bridge.prompt import normalise

ASCII = st.text(st.characters(min_codepoint=0, max_codepoint=127))
CHINESE = "\u4e00\u53ea\u7ea2\u8272\u7684\u732b\u5728\u5730\u6bef\u4e0a"
MIXED = st.text(st.sampled_from(CHINESE + "catdog (:1.3),.!?[]{}<>embedding_'\\-\u3001\u300c\u2026\u00e9"))


@st.composite
def widened(draw: st.DrawFn, text: st.SearchStrategy[str] = MIXED) -> tuple[str, str]:
    """A prompt, and the same prompt with any of its ASCII characters typed in full width."""
    narrow = draw(text)
    wide = "".join(
        chr(ord(c) + 0xFEE0) if "!" <= c <= "~" and draw(st.booleans()) else "\u3000" if c == " " else c
        for c in narrow
    )
    return narrow, wide


@given(widened())
def test_width_does_not_matter(pair: tuple[str, str]) -> None:
    narrow, wide = pair
    assert normalise(wide).text == normalise(narrow).text == narrow


@given(ASCII)
def test_ascii_is_left_alone(text: str) -> None:
    assert normalise(text).text == text


@given(st.text())
def test_normalising_twice_is_normalising_once_and_offsets_hold(text: str) -> None:
    once = normalise(text)
    assert normalise(once.text).text == once.text
    assert len(once.text) == len(text) == len(once.offsets)
    for character, offset in zip(once.text, once.offsets, strict=True):
        assert text[offset] == character or ord(text[offset]) > 127


def test_the_full_stop_of_a_chinese_keyboard_and_what_has_no_twin() -> None:
    assert normalise("\u732b\u3002\uff61").text == "\u732b.."
    kept = "\u3001\u300c\u300d\u2014\u2026\u201c\u201d\u3010\u3011"
    assert normalise(kept).text == kept

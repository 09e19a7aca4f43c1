"""What other packs do with a CLIP, a MODEL or a conditioning, done in our own words behind the bridge."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from math import lcm
from pathlib import Path
from typing import Any

import comfy.lora
import pytest
import torch
from comfy.sd1_clip import SDTokenizer
from comfy.sdxl_clip import SDXLClipModel, SDXLTokenizer
from comfy_extras.nodes_clip_sdxl import CLIPTextEncodeSDXL, CLIPTextEncodeSDXLRefiner
from comfy_extras.nodes_model_merging import ModelMergeSimple
from torch import Tensor

import nodes
from language_bridge.bridges.base import create
from language_bridge.bridges.errors import BridgeError
from language_bridge.bridges.file import BridgeHeader, save_bridge
from language_bridge.host.clip import BridgedClip
from language_bridge.host.joining import SHARED, Joining
from language_bridge.host.rows import MARK
from language_bridge.host.unet import part_shapes
from language_bridge.tests.fixtures.graph import Checkpoint, bridged
from language_bridge.tests.fixtures.stock import call, encode, latent, same, sample, unet_calls
from language_bridge.tests.fixtures.towers import reference, tiny_bridge, tiny_tower

RED_CAT = "\u7ea2\u8272\u7684\u732b"
BLUE_DOG = "\u84dd\u8272\u7684\u72d7"
MIXED, NATIVE_PART, ENGLISH_PART = f"{RED_CAT}, a big dog", f"{RED_CAT}, ", "a big dog"
WEIGHED = "a (big:1.3) dog, a (small:0.6) cat"
Tokens = dict[str, list[list[tuple[Any, ...]]]]
Loader = Callable[..., Checkpoint]


def rows(conditioning: Any) -> Tensor:
    assert len(conditioning) == 1
    return conditioning[0][0]


def behind(native: Any, english: Any) -> Tensor:
    """What a mixed prompt must give: the native rows, then what the node makes of the English ones."""
    return torch.cat([rows(native), rows(english)], dim=1)


def encode_tokens(clip: Any, tokens: Tokens) -> Any:
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(tokens)


def near(one: Tensor, other: Tensor) -> bool:
    """Equal but for the order of additions: 1e-5 of the largest number."""
    return bool((one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max())))


def says_three_things(error: pytest.ExceptionInfo[BridgeError]) -> bool:
    told = error.value
    return all(len(part) > 3 for part in (told.what, told.found, told.expected, told.action))


# -- looking at the CLIP -------------------------------------------------------------------------------------
def test_what_packs_ask_a_clip_for_is_the_checkpoints_own(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    tower, tokenizer = clip.cond_stage_model, clip.tokenizer
    assert isinstance(tower, SDXLClipModel) == isinstance(tokenizer, SDXLTokenizer)
    assert isinstance(tower, SDXLClipModel) == (checkpoint.name == "sdxl")
    assert type(tower).__name__ == type(checkpoint.clip.cond_stage_model).__name__
    assert vars(tokenizer).keys() == vars(checkpoint.clip.tokenizer).keys()
    for key in checkpoint.clip.tokenize(""):
        part = getattr(tokenizer, f"clip_{key}")
        assert isinstance(part, SDTokenizer) and part.pad_to_max_length and part.max_length == 77
        assert part.embedding_key == f"clip_{key}" and part.inv_vocab[part.start_token] == "<|startoftext|>"
        assert getattr(clip.patcher.model, f"clip_{key}") is getattr(tower, f"clip_{key}")
        assert getattr(tower, f"clip_{key}").special_tokens["start"] == part.start_token
    keys = comfy.lora.model_lora_keys_clip(tower, {})
    assert keys == comfy.lora.model_lora_keys_clip(checkpoint.clip.cond_stage_model, {})


def test_a_sub_tokenizer_is_found_for_every_english_key_and_for_no_other(checkpoint: Checkpoint) -> None:
    # Whoever finds none leaves the key alone.
    _, clip = bridged(checkpoint)
    for key in clip.tokenize(MIXED):
        found = getattr(clip.tokenizer, f"clip_{key}", getattr(clip.tokenizer, key, None))
        assert (found is not None) == (key in checkpoint.clip.tokenize(""))


def test_options_on_the_patcher_live_through_clones_and_encodes(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    noted = clip.clone()
    noted.patcher.model_options["x-pack.defaults"] = {"width": 512}
    encode(noted, MIXED)
    assert noted.clone().patcher.model_options["x-pack.defaults"] == {"width": 512}
    assert "x-pack.defaults" not in clip.patcher.model_options


# -- walking the tokens --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("text", ["a dog", "", WEIGHED])
def test_all_weights_of_an_english_prompt_changed_in_place(load: Loader, name: str, text: str) -> None:
    checkpoint = load(name)
    _, clip = bridged(checkpoint, route="two streams")
    results: list[Any] = []
    for each in (clip, checkpoint.clip):
        tokens = each.tokenize(text)
        louder(tokens, 1.4)
        results.append(encode_tokens(each, tokens))
    if text:
        assert same(*results)
    else:  # the empty prompt is native, and is its own zero point
        assert torch.allclose(rows(results[0]), rows(encode(clip, "")), atol=1e-6)


def louder(tokens: Tokens, factor: float) -> None:
    for chunks in tokens.values():
        for chunk in chunks:
            for place, (token, weight, *word) in enumerate(chunk):
                chunk[place] = (token, weight * factor, *word)


def test_all_weights_of_a_native_prompt_changed_in_place(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    tokens = clip.tokenize(RED_CAT, return_word_ids=True)
    louder(tokens, 1.4)
    plain, empty = rows(encode(clip, RED_CAT)), rows(encode(clip, ""))
    assert torch.allclose(rows(encode_tokens(clip, tokens)), empty + 1.4 * (plain - empty), atol=1e-5)


def test_windows_of_several_prompts_under_one_key(checkpoint: Checkpoint) -> None:
    """A BREAK that a pack makes of tokens: chunks of one prompt behind those of another, word ids raised."""
    _, clip = bridged(checkpoint)
    ours, stock = clip.tokenize(f"{RED_CAT}, a dog", True), checkpoint.clip.tokenize("a dog", True)
    more, stock_more = clip.tokenize("a big cat", True), checkpoint.clip.tokenize("a big cat", True)
    for key, chunks in stock.items():
        last = max(word for _, _, word in chunks[-1])
        for tokens, others in ((ours, more), (stock, stock_more)):
            for chunk in others[key]:
                tokens[key].append([(token, weight, word and word + last) for token, weight, word in chunk])
    both = rows(encode_tokens(clip, ours))
    assert torch.equal(both, behind(encode(clip, NATIVE_PART), encode_tokens(checkpoint.clip, stock)))


def test_an_empty_list_under_our_key_is_silence(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    tokens = clip.tokenize(ENGLISH_PART)
    assert same(encode_tokens(clip, {**tokens, "native": []}), encode(sd1.clip, ENGLISH_PART))


def test_tokens_can_be_copied_compared_and_looked_up(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    tokens = clip.tokenize(MIXED)
    again = copy.deepcopy(tokens)
    assert again == tokens and same(encode_tokens(clip, again), encode(clip, MIXED))
    words = sd1.clip.tokenizer.clip_l.inv_vocab
    first, *_ = tokens["l"]
    assert [words[token] for token, _ in first[:5]] == [
        "<|startoftext|>",
        "a</w>",
        "big</w>",
        "dog</w>",
        "<|endoftext|>",
    ]
    assert torch.tensor([token for token, _ in first]).tolist() == [
        token for token, _ in sd1.clip.tokenize(ENGLISH_PART)["l"][0]
    ]


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_native_text_for_one_of_the_towers_is_heard(load: Loader, name: str) -> None:
    """A prompt of its own for one key, `TE(l=..)` or the second box of CLIP Text Encode (SDXL)."""
    checkpoint = load(name)
    _, clip = bridged(checkpoint)
    tokens, stock = clip.tokenize(ENGLISH_PART), checkpoint.clip.tokenize(ENGLISH_PART)
    tokens["l"] = clip.tokenize(f"{RED_CAT}, a cat")["l"]
    stock["l"] = checkpoint.clip.tokenize("a cat")["l"]
    got = rows(encode_tokens(clip, tokens))
    assert torch.equal(got, behind(encode(clip, NATIVE_PART), encode_tokens(checkpoint.clip, stock)))


# -- encoding past us ----------------------------------------------------------------------------------------
def rebuilt(tokens: Tokens, key: str, factor: float = 1.0) -> list[list[tuple[Any, float]]]:
    return [[(token, weight * factor) for token, weight, *_ in chunk] for chunk in tokens[key]]


def alone(clip: Any, text: str) -> Tensor:
    """Rows of the key l, encoded without the other keys."""
    with torch.inference_mode():
        return clip.encode_from_tokens({"l": rebuilt(clip.tokenize(text, return_word_ids=True), "l", 1.2)})


def straight(clip: Any, text: str) -> Tensor:
    """Rows of CLIP-G, asked for past the CLIP."""
    with torch.inference_mode():
        clip.load_model()
        tokens = clip.tokenize(text, return_word_ids=True)
        return clip.cond_stage_model.clip_g.encode_token_weights(rebuilt(tokens, "g", 1.2))[0]


PAST_US = [("sd1", alone), ("sdxl", straight)]


@pytest.mark.parametrize(("name", "way"), PAST_US, ids=["one key", "one tower"])
@pytest.mark.parametrize("text", ["a big dog", WEIGHED])
def test_english_encoded_past_us_is_stock(load: Loader, name: str, way: Any, text: str) -> None:
    checkpoint = load(name)
    assert torch.equal(way(bridged(checkpoint)[1], text), way(checkpoint.clip, text))


@pytest.mark.parametrize(("name", "way"), PAST_US, ids=["one key", "one tower"])
@pytest.mark.parametrize(
    "text", [RED_CAT, MIXED, f"a dog and {RED_CAT} " * 20], ids=["native", "mixed", "long"]
)
def test_native_text_encoded_past_us_is_refused_and_not_lost(
    load: Loader, name: str, way: Any, text: str
) -> None:
    _, clip = bridged(load(name))
    with pytest.raises(BridgeError) as error:
        way(clip, text)
    assert says_three_things(error)


@pytest.mark.parametrize(("name", "way"), PAST_US, ids=["one key", "one tower"])
def test_the_empty_prompt_may_be_encoded_past_us(load: Loader, name: str, way: Any) -> None:
    checkpoint = load(name)
    assert torch.equal(way(bridged(checkpoint)[1], ""), way(checkpoint.clip, ""))


class Prompts(list[str]):
    """Several prompts at once, as a pack hands them to tokenizers of its own."""


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch, sd1: Checkpoint) -> None:
    """Tokenizer and tower of the checkpoint speak to each other in a way of their own, of several prompts."""
    tokenizer, tower = sd1.clip.tokenizer.clip_l, sd1.clip.cond_stage_model.clip_l
    cut, read = tokenizer.tokenize_with_weights, tower.encode_token_weights

    def apart(text: Any, *arguments: Any, **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        chunks = [chunk for each in texts for chunk in cut(each, *arguments, **options)]
        return [tuple([list(values)] for values in zip(*chunk, strict=True)) for chunk in chunks]

    def together(chunks: Any) -> Any:
        return read([list(zip(tokens[0], weights[0], strict=True)) for tokens, weights in chunks])

    monkeypatch.setattr(tokenizer, "tokenize_with_weights", apart)
    monkeypatch.setattr(tower, "encode_token_weights", together)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("texts", [[ENGLISH_PART], [ENGLISH_PART, WEIGHED]], ids=["one", "two"])
def test_several_english_prompts_go_to_the_tokenizer_as_they_are(sd1: Checkpoint, texts: list[str]) -> None:
    _, clip = bridged(sd1)
    got = encode_tokens(clip, clip.tokenize(Prompts(texts)))
    assert rows(got).shape[1] == 77 * len(texts)
    assert same(got, encode_tokens(sd1.clip, sd1.clip.tokenize(Prompts(texts))))


@pytest.mark.usefixtures("several")
def test_several_prompts_with_native_text_are_refused(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)
    with pytest.raises(BridgeError) as error:
        clip.tokenize(Prompts([ENGLISH_PART, MIXED]))
    assert says_three_things(error)


# -- patching the encoders -----------------------------------------------------------------------------------
def halved(clip: Any) -> Any:
    """The rows of every English tower halved and its pooled vector doubled, by object patches on a clone."""

    def half(own: Any, tokens: Any) -> Any:
        out, pooled, *rest = own(tokens)
        return (out * 0.5, None if pooled is None else pooled * 2, *rest)

    return patched(clip, half)


def patched(clip: Any, change: Callable[[Any, Any], Any]) -> Any:
    """A clone whose English towers answer tokens with `change(their own answer, tokens)`."""
    clone = clip.clone()
    for key in clip.tokenize(""):
        if hasattr(clip.patcher.model, f"clip_{key}"):
            name = f"clip_{key}.encode_token_weights"
            clone.patcher.add_object_patch(name, partial(change, clip.patcher.get_model_object(name)))
    return clone


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_an_encoder_that_is_patched_changes_english_rows_alone(load: Loader, name: str) -> None:
    checkpoint = load(name)
    _, clip = bridged(checkpoint)
    stock = halved(checkpoint.clip)
    native = encode(clip, NATIVE_PART)
    for other in (halved(clip), bridged(checkpoint, clip=stock)[1], halved(clip).clone()):
        assert type(other) is BridgedClip
        assert same(encode(other, WEIGHED), encode(stock, WEIGHED))
        assert torch.equal(rows(encode(other, MIXED)), behind(native, encode(stock, ENGLISH_PART)))
        assert torch.equal(rows(encode(other, RED_CAT)), rows(encode(clip, RED_CAT)))
    twice = halved(halved(clip))
    assert same(encode(twice, ENGLISH_PART), encode(halved(stock), ENGLISH_PART))
    assert same(encode(clip, ENGLISH_PART), encode(checkpoint.clip, ENGLISH_PART))
    assert not same(encode(stock, ENGLISH_PART), encode(checkpoint.clip, ENGLISH_PART))


# -- rows in pairs, for keys and for values (NegPip) ---------------------------------------------------------
def paired(model: Any, clip: Any) -> Any:
    """MODEL and CLIP under NegPip: for each token a key row and a value row, negated where its weight is."""

    def pair(own: Any, tokens: Any) -> Any:
        out, *rest = own([[(token, abs(weight)) for token, weight, *_ in chunk] for chunk in tokens])
        signs = [[-1.0 if weight < 0 else 1.0 for chunk in tokens for _, weight, *_ in chunk]]
        pairs = torch.stack([out, out * torch.tensor(signs)[..., None].to(out)], dim=2)
        return (pairs.flatten(1, 2), *rest)

    model, clip = model.clone(), patched(clip, pair)
    model.set_model_attn2_patch(lambda q, k, v, _: (q, k[:, 0::2], v[:, 1::2]))
    model.model_options["ppm_negpip"] = clip.patcher.model_options["ppm_negpip"] = True
    return model, clip


NEGATED = "a (dog:-0.8), cat"


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_negpip_on_english_is_stock(load: Loader, name: str) -> None:
    checkpoint = load(name)
    stock_model, stock = paired(checkpoint.model, checkpoint.clip)
    before = bridged(checkpoint, model=stock_model, clip=stock)
    after = paired(*bridged(checkpoint))
    for _, clip in (after, before):
        assert same(encode(clip, NEGATED), encode(stock, NEGATED))
    if checkpoint.name == "sd1":
        pictures = [
            sample(model, encode(clip, NEGATED), encode(clip, "bad"), steps=1)
            for model, clip in ((stock_model, stock), before, after)
        ]
        assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
@pytest.mark.parametrize("text", [RED_CAT, MIXED, f"({RED_CAT}:1.3), dog", ""])
def test_negpip_without_a_negative_weight_changes_nothing(load: Loader, name: str, text: str) -> None:
    checkpoint = load(name)
    model, clip = bridged(checkpoint)
    piped_model, piped = paired(model, clip)
    own, pairs = rows(encode(clip, text)), rows(encode(piped, text))
    assert torch.equal(pairs[:, 0::2], own) and torch.equal(pairs[:, 1::2], own)
    if checkpoint.name == "sd1" and text == MIXED:
        picture = sample(model, encode(clip, text), encode(clip, ""), steps=1)
        assert near(sample(piped_model, encode(piped, text), encode(piped, ""), steps=1), picture)


def test_negpip_negates_the_value_rows_of_native_tokens_below_zero(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    _, piped = paired(model, clip)
    loud, quiet = rows(encode(piped, f"({RED_CAT}:0.8)")), rows(encode(piped, f"({RED_CAT}:-0.8)"))
    assert torch.equal(quiet[:, 0::2], loud[:, 0::2])
    values, negated = loud[0, 1::2], quiet[0, 1::2]
    inside = (negated != values).any(-1)
    assert int(inside.sum()) == 4 and torch.equal(negated[inside], -values[inside])  # four characters
    mixed = rows(encode(piped, f"({RED_CAT}:-0.8), (dog:-0.8)"))
    assert torch.equal(mixed[:, -154:], rows(encode(paired(sd1.model, sd1.clip)[1], "(dog:-0.8)")))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_negpip_in_a_shared_window(load: Loader, name: str) -> None:
    """However the words are many or few on either side, key row and value row stay together."""
    model, clip = bridged(load(name))
    clip = clip.with_speech(joining=Joining(SHARED))
    _, piped = paired(model, clip)
    for text in (MIXED, f"{RED_CAT}, dog", f"{RED_CAT}{BLUE_DOG}, one two three", f"{RED_CAT}, {WEIGHED}"):
        own, pairs = rows(encode(clip, text)), rows(encode(piped, text))
        assert own.shape[1] == 77
        assert torch.equal(pairs[:, 0::2], own) and torch.equal(pairs[:, 1::2], own)


def test_negpip_with_a_timed_bridge(sd1: Checkpoint, models: Path) -> None:
    tower = tiny_tower()
    spec = {"hidden": 32, "context": 768, "queries": 64, "layers": 1, "heads": 8, "channels": 16}
    bridge = create("ella", spec)
    bridge.reset_parameters(torch.Generator().manual_seed(3))
    facts = {"kind": "ella", "spec": dataclasses.asdict(bridge.spec), "base": "sd1"}
    path = models / "language_bridges" / "ecosystem-timed.safetensors"
    save_bridge(path, BridgeHeader(**facts, encoder=reference(tower)), bridge)
    model, clip = bridged(sd1, bridge=path.name)
    piped_model, piped = paired(model, clip)
    picture = sample(model, encode(clip, MIXED), encode(clip, "bad"))
    assert near(sample(piped_model, encode(piped, MIXED), encode(piped, "bad")), picture)
    # and the rows are really said anew at the second step
    first = encode(clip, MIXED)
    first[0][1].pop(MARK)
    assert not near(sample(model, first, encode(clip, "bad")), picture)


# -- wildcards, LoRA and BREAK -------------------------------------------------------------------------------
def test_a_wildcard_encoder(sd1: Checkpoint) -> None:
    """LoRAs of the text loaded onto MODEL and CLIP; its parts encoded and put one behind the other."""

    def wildcard(model: Any, clip: Any, *parts: str) -> Any:
        for lora, strength in (("sd1.safetensors", 0.7), ("sd1-other.safetensors", 0.4)):
            options = {"lora_name": lora, "strength_model": strength, "strength_clip": strength / 2}
            model, clip = call(nodes.LoraLoader, model=model, clip=clip, **options)
        done = encode(clip, parts[0])
        for part in parts[1:]:
            joined = {"conditioning_to": done, "conditioning_from": encode(clip, part)}
            done = call(nodes.ConditioningConcat, **joined)
        return model, clip, done

    model, clip = bridged(sd1)
    _, _, stock = wildcard(sd1.model, sd1.clip, ENGLISH_PART, "sky")
    assert same(wildcard(model, clip, ENGLISH_PART, "sky")[2], stock)
    loaded, heard, done = wildcard(model, clip, RED_CAT, "a big dog", MIXED)
    assert type(heard) is BridgedClip and done[0][0].shape[1] == 77 * 4
    expected = [rows(encode(clip, RED_CAT)), rows(stock)[:, :77]]
    assert torch.equal(done[0][0][:, :154], torch.cat(expected, dim=1))
    assert torch.isfinite(sample(loaded, done, encode(heard, ""), steps=1)).all()


# -- stacking prompts ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_prompt_has_a_pooled_vector_of_the_stock_shape(load: Loader, name: str) -> None:
    checkpoint = load(name)
    _, clip = bridged(checkpoint)
    shape = checkpoint.clip.encode_from_tokens(checkpoint.clip.tokenize("a"), return_pooled=True)[1].shape
    for text in ("", RED_CAT, MIXED, ENGLISH_PART):
        pooled = encode(clip, text)[0][1]["pooled_output"]
        assert pooled.shape == shape and torch.isfinite(pooled).all()


def test_a_batch_of_prompts(sd1: Checkpoint) -> None:
    """One conditioning with a prompt for each picture; texts are repeated until they are equally long."""
    model, clip = bridged(sd1)
    prompts = [encode(clip, text)[0] for text in (RED_CAT, MIXED)]
    text = torch.cat([prompts[0][0].repeat(1, 2, 1), prompts[1][0]])
    pooled = torch.cat([facts["pooled_output"] for _, facts in prompts])
    empty = call(nodes.EmptyLatentImage, width=64, height=64, batch_size=2)

    def paint(positive: Any, into: Any) -> Tensor:
        settings = {"seed": 5, "steps": 1, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
        inputs = {"model": model, "positive": positive, "negative": encode(clip, "bad")}
        return call(nodes.KSampler, **settings, **inputs, latent_image=into, denoise=1.0)["samples"]

    together = paint([[text, {"pooled_output": pooled}]], empty)
    first = paint([prompts[0]], latent())
    assert near(together[:1], first)
    assert not torch.allclose(together[1:], together[:1], rtol=1e-2)


# -- attention that reads several prompts ------------------------------------------------------------------
def coupled(model: Any, *regions: Any) -> Any:
    """Left half of the picture: the conditioning itself; right half: the last region."""
    clone = model.clone()
    texts = [rows(region) for region in regions]

    def patch(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Any:
        sides = options["cond_or_uncond"]
        size = len(q) // len(sides)
        length = lcm(k.shape[1], *(text.shape[1] for text in texts))
        queries, keys = [], []
        options["sides"] = []
        for place, side in enumerate(sides):
            part = slice(place * size, (place + 1) * size)
            own = [k[part]] if side else [k[part], *(text.to(k).expand(size, -1, -1) for text in texts)]
            keys += [text.repeat(1, length // text.shape[1], 1) for text in own]
            queries += [q[part]] * len(own)
            options["sides"].append(len(own))
        return torch.cat(queries), torch.cat(keys), torch.cat(keys)

    def after(out: Tensor, options: Any) -> Tensor:
        done, start = [], 0
        size = len(out) // sum(options["sides"])
        right = torch.arange(out.shape[1]) % int(out.shape[1] ** 0.5) >= int(out.shape[1] ** 0.5) // 2
        for count in options["sides"]:
            mine = out[start : start + count * size].view(count, size, *out.shape[1:])
            done.append(torch.where(right[:, None], mine[-1], mine[0]))
            start += count * size
        return torch.cat(done)

    clone.set_model_attn2_patch(patch)
    clone.set_model_attn2_output_patch(after)
    return clone


def test_attention_couple(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)

    def paint(model: Any, clip: Any, text: str, region: str) -> Tensor:
        both = coupled(model, encode(clip, region))
        return sample(both, encode(clip, text), encode(clip, "bad"), steps=1)

    english = paint(model, clip, "a dog", "a cat")
    assert torch.equal(english, paint(sd1.model, sd1.clip, "a dog", "a cat"))
    alone = sample(model, encode(clip, RED_CAT), encode(clip, "bad"), steps=1)
    assert near(paint(model, clip, RED_CAT, RED_CAT), alone)
    for text, region in ((RED_CAT, MIXED), ("a dog", RED_CAT)):  # 77 rows and 154, English and native
        got = paint(model, clip, text, region)
        assert torch.isfinite(got).all() and not near(got, alone)


@pytest.fixture(scope="module")
def part(models: Path, load: Loader) -> Iterator[str]:
    """The name of a bridge with a U-Net part."""
    model, tower = load("sd1").model, tiny_tower()
    generator = torch.Generator().manual_seed(11)
    shapes = part_shapes(model, "kv")
    weights = {key: torch.randn(shape, generator=generator) * 0.05 for key, shape in shapes.items()}
    bridge = tiny_bridge("linear", "sd1", tower)
    header = BridgeHeader(
        kind="linear",
        spec=dataclasses.asdict(bridge.spec),
        base="sd1",
        encoder=reference(tower),
        unet="kv",
        training={"unet": "delta"},
    )
    path = models / "language_bridges" / "ecosystem-part.safetensors"
    save_bridge(path, header, bridge, unet=weights)
    yield path.name
    path.unlink()


def reading_its_own(model: Any, texts: Tensor) -> Any:
    """Cross-attention that reads `texts` [2, N, C] in the place of what the U-Net is called with."""
    clone = model.clone()
    clone.set_model_attn2_patch(lambda q, k, v, _: (q, texts.to(k), texts.to(k)))
    return clone


def test_a_unet_part_with_attention_couple_is_refused_and_never_wrong(sd1: Checkpoint, part: str) -> None:
    model, clip = bridged(sd1, bridge=part)
    native, english = encode(clip, RED_CAT), encode(clip, "a dog")
    with pytest.raises(BridgeError) as error:  # three texts in a batch of two
        sample(coupled(model, encode(clip, BLUE_DOG)), native, english, steps=1)
    assert says_three_things(error)
    # as many texts as there are in the batch, but other ones
    texts = torch.cat([rows(english), rows(english)])
    with pytest.raises(BridgeError):
        sample(reading_its_own(model, texts), native, english, steps=1)
    stock = sample(reading_its_own(sd1.model, texts), english, encode(clip, "bad"), steps=1)
    assert torch.equal(sample(reading_its_own(model, texts), english, encode(clip, "bad"), steps=1), stock)


def test_a_unet_part_with_negpip_is_refused_on_native_text_alone(sd1: Checkpoint, part: str) -> None:
    model, clip = paired(*bridged(sd1, bridge=part))
    stock_model, stock = paired(sd1.model, sd1.clip)
    english = sample(stock_model, encode(stock, "a (dog:-1)"), encode(stock, "bad"), steps=1)
    assert torch.equal(sample(model, encode(clip, "a (dog:-1)"), encode(clip, "bad"), steps=1), english)
    with pytest.raises(BridgeError) as error:
        sample(model, encode(clip, RED_CAT), encode(clip, "bad"), steps=1)
    assert says_three_things(error)


def test_a_merged_model_goes_on_with_what_the_first_carries(load: Loader, part: str) -> None:
    one, two = load("sd1"), load("sd1", seed=7)

    def merged(model: Any) -> Any:
        return call(ModelMergeSimple, model1=model, model2=two.model, ratio=0.4)

    behind_it = bridged(one, bridge=part, model=merged(one.model))
    model, clip = bridged(one, bridge=part)
    picture = sample(merged(model), encode(clip, MIXED), encode(clip, ""), steps=1)
    assert torch.equal(picture, sample(behind_it[0], encode(clip, MIXED), encode(clip, ""), steps=1))
    assert not near(picture, sample(model, encode(clip, MIXED), encode(clip, ""), steps=1))


def test_a_deep_copy_of_a_conditioning_paints_the_same(sd1: Checkpoint, part: str) -> None:
    model, clip = bridged(sd1, bridge=part)
    positive, negative = encode(clip, MIXED), encode(clip, "")
    once = sample(model, positive, negative, steps=1)
    assert torch.equal(sample(model, copy.deepcopy(positive), copy.deepcopy(negative), steps=1), once)


def test_an_image_prompt_beside_the_text(sd1: Checkpoint, part: str) -> None:
    """Replaced cross-attention that adds to what it has read, as IP-Adapter does."""
    from comfy.ldm.modules.attention import optimized_attention

    def beside(model: Any, strength: float) -> Any:
        clone = model.clone()

        def replace(q: Tensor, k: Tensor, v: Tensor, options: Any) -> Tensor:
            out = optimized_attention(q, k, v, options["n_heads"])
            return out + strength * optimized_attention(q, k[:, :4], v[:, :4], options["n_heads"])

        for place in (("input", 1), ("input", 2), ("middle", 0), ("output", 1)):
            clone.set_model_attn2_replace(replace, *place)
        return clone

    model, clip = bridged(sd1, bridge=part)
    english = [
        sample(beside(each, 0.5), encode(text, ENGLISH_PART), encode(text, "bad"), steps=1)
        for each, text in ((model, clip), (sd1.model, sd1.clip))
    ]
    assert torch.equal(*english)
    native = sample(model, encode(clip, MIXED), encode(clip, ""), steps=1)
    assert near(sample(beside(model, 0.0), encode(clip, MIXED), encode(clip, ""), steps=1), native)


# -- nodes of the host ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["a big dog", RED_CAT, MIXED], ids=["english", "native", "mixed"])
def test_the_refiners_encode(sdxl: Checkpoint, text: str) -> None:
    _, clip = bridged(sdxl)

    def refine(clip: Any, text: str) -> Any:
        return call(CLIPTextEncodeSDXLRefiner, clip=clip, ascore=6.0, width=64, height=128, text=text)

    (got, facts), (plain, usual) = refine(clip, text)[0], encode(clip, text)[0]
    assert torch.equal(got, plain) and torch.equal(facts["pooled_output"], usual["pooled_output"])
    assert facts["aesthetic_score"] == 6.0 and facts["height"] == 128
    assert same(refine(clip, "a big dog"), refine(sdxl.clip, "a big dog"))


def test_pads_between_l_and_g_are_english_and_add_no_native_rows(sdxl: Checkpoint) -> None:
    _, clip = bridged(sdxl)
    sizes = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}
    long = "one two three four five six seven eight nine ten " * 16
    for text_g, text_l in ((f"{NATIVE_PART}{long}", "a dog"), (f"{NATIVE_PART}a dog", long)):
        texts = {"text_g": text_g.removeprefix(NATIVE_PART), "text_l": text_l}
        stock = call(CLIPTextEncodeSDXL, clip=sdxl.clip, **sizes, **texts)
        got = call(CLIPTextEncodeSDXL, clip=clip, **sizes, text_g=text_g, text_l=text_l)
        assert rows(stock).shape[1] == 3 * 77
        assert torch.equal(rows(got), behind(encode(clip, NATIVE_PART), stock))


def test_of_two_native_texts_one_is_heard_and_the_log_says_so(
    sdxl: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    _, clip = bridged(sdxl)
    sizes = {"width": 64, "height": 64, "crop_w": 0, "crop_h": 0, "target_width": 64, "target_height": 64}

    def boxes(text_g: str, text_l: str) -> Tensor:
        caplog.clear()
        return rows(call(CLIPTextEncodeSDXL, clip=clip, **sizes, text_g=text_g, text_l=text_l))

    warned = "one of them"
    assert torch.equal(boxes(RED_CAT, RED_CAT), rows(encode(clip, RED_CAT))) and warned not in caplog.text
    for silent in ("", "a dog"):
        assert torch.equal(boxes(silent, RED_CAT)[:, :77], rows(encode(clip, RED_CAT)))
        assert warned not in caplog.text
    assert torch.equal(boxes(RED_CAT, BLUE_DOG), rows(encode(clip, RED_CAT))) and warned in caplog.text
    # parts of one text, each with a window of its own, are not two texts
    tokens, more = clip.tokenize(f"{RED_CAT}, dog"), clip.tokenize(f"{BLUE_DOG}, cat")
    whole = f"{RED_CAT}, {BLUE_DOG}, "
    tokens["native"] = clip.tokenize(whole)["native"]
    for key in ("l", "g"):
        tokens[key] += more[key]
    caplog.clear()
    both = rows(encode_tokens(clip, tokens))
    assert torch.equal(both[:, :77], rows(encode(clip, whole))) and warned not in caplog.text


def twice(model: Any, positive: Any, negative: Any) -> Tensor:
    """A picture, made larger and painted over."""
    settings = {"seed": 5, "steps": 1, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    first = {"positive": positive, "negative": negative, "latent_image": latent(), "denoise": 1.0}
    done = call(nodes.KSampler, model=model, **settings, **first)
    larger = call(
        nodes.LatentUpscale, samples=done, upscale_method="bislerp", width=128, height=128, crop="disabled"
    )
    again = {"positive": positive, "negative": negative, "latent_image": larger, "denoise": 0.5}
    return call(nodes.KSampler, model=model, **settings, **again)["samples"]


def test_a_second_pass_at_twice_the_size(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    english = twice(model, encode(clip, ENGLISH_PART), encode(clip, "bad"))
    stock = twice(sd1.model, encode(sd1.clip, ENGLISH_PART), encode(sd1.clip, "bad"))
    assert torch.equal(english, stock)
    native = twice(model, encode(clip, MIXED), encode(clip, ""))
    assert native.shape == (1, 4, 16, 16) and torch.isfinite(native).all()
    assert not torch.equal(native, english)


def test_pictures_of_a_batch_hear_the_same_text(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1, model=sd1.model.clone())
    empty = call(nodes.EmptyLatentImage, width=64, height=64, batch_size=3)
    settings = {"seed": 5, "steps": 1, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    with unet_calls(model) as calls:
        done = call(
            nodes.KSampler,
            model=model,
            positive=encode(clip, MIXED),
            negative=encode(clip, ""),
            latent_image=empty,
            denoise=1.0,
            **settings,
        )["samples"]
    assert calls == [(6, 154, 768)]
    assert near(done[:1], sample(model, encode(clip, MIXED), encode(clip, ""), steps=1))


def test_regions_by_mask(sd1: Checkpoint) -> None:
    model, clip = bridged(sd1)
    left = torch.zeros(1, 64, 64)
    left[..., :32] = 1

    def regions(clip: Any, one: str, other: str) -> Any:
        parts = [
            call(
                nodes.ConditioningSetMask,
                conditioning=encode(clip, text),
                mask=mask,
                set_cond_area="default",
                strength=1.0,
            )
            for text, mask in ((one, left), (other, 1 - left))
        ]
        return call(nodes.ConditioningCombine, conditioning_1=parts[0], conditioning_2=parts[1])

    english = sample(model, regions(clip, "a dog", "a cat"), encode(clip, "bad"), steps=1)
    stock = sample(sd1.model, regions(sd1.clip, "a dog", "a cat"), encode(sd1.clip, "bad"), steps=1)
    assert torch.equal(english, stock)
    both = sample(model, regions(clip, RED_CAT, MIXED), encode(clip, ""), steps=1)
    only = sample(model, regions(clip, RED_CAT, RED_CAT), encode(clip, ""), steps=1)
    assert torch.isfinite(both).all()
    assert near(both[..., :3], only[..., :3])  # the left half does not hear the right one
    assert not near(both[..., 5:], only[..., 5:])


def test_a_box_of_gligen_in_english_is_stock(sd1: Checkpoint) -> None:
    _, clip = bridged(sd1)

    def box(clip: Any, conditioning: Any, text: str) -> Any:
        size = {"width": 32, "height": 32, "x": 0, "y": 0}
        inputs = {"conditioning_to": conditioning, "clip": clip, "gligen_textbox_model": "none", "text": text}
        return call(nodes.GLIGENTextBoxApply, **inputs, **size)

    native = encode(clip, RED_CAT)
    (text, facts), (_, expected) = box(clip, native, "a dog")[0], box(sd1.clip, native, "a dog")[0]
    assert torch.equal(text, rows(native)) and same(facts["gligen"], expected["gligen"])
    for words in (RED_CAT, MIXED):
        with pytest.raises(BridgeError) as error:
            box(clip, native, words)
        assert says_three_things(error)


def test_a_picture_prompt_of_unclip_leaves_the_text_alone(checkpoint: Checkpoint) -> None:
    _, clip = bridged(checkpoint)
    native = encode(clip, MIXED)
    seen = {"strength": 0.8, "noise_augmentation": 0.1}
    got = call(nodes.unCLIPConditioning, conditioning=native, clip_vision_output=object(), **seen)
    assert torch.equal(rows(got), rows(native)) and got[0][1]["unclip_conditioning"][0]["strength"] == 0.8


@pytest.mark.parametrize("text", [ENGLISH_PART, RED_CAT, MIXED], ids=["english", "native", "mixed"])
def test_facts_given_with_an_encode_stand_beside_the_text(checkpoint: Checkpoint, text: str) -> None:
    _, clip = bridged(checkpoint)
    facts = {"start_percent": 0.25, "end_percent": 0.5, "strength": 0.7, "prompt": text}
    with torch.inference_mode():
        got = clip.encode_from_tokens_scheduled(clip.tokenize(text, return_word_ids=True), add_dict=facts)
    assert torch.equal(rows(got), rows(encode(clip, text)))
    assert {key: got[0][1][key] for key in facts} == facts

"""Pictures of every common kind become the numbers that they show, and a bad one is one bad picture."""

from __future__ import annotations

import ast
import io
import pickle
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from language_bridge.bridges.errors import BridgeError
from language_bridge.training import bank, dataset, pictures
from language_bridge.training.pictures import (
    MOST_PIXELS,
    MOST_SHAPE,
    PictureError,
    bucket_of,
    buckets_for,
    fault_of,
    picture_key,
    picture_size,
    read_picture,
)

QUARTERS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], np.uint8)
"""Red, green, blue, yellow, in reading order."""


def quarters(side: int = 16) -> Image.Image:
    return Image.fromarray(QUARTERS.repeat(side, 0).repeat(side, 1))


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **given: Any) -> Path:
    path = tmp_path / name
    image.save(path, **given)
    return path


def corners(pixels: torch.Tensor) -> list[list[float]]:
    """The middle of each quarter, in reading order."""
    height, width = pixels.shape[:2]
    return [
        pixels[y, x].tolist() for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)
    ]


SEEN = (QUARTERS.reshape(4, 3) / 255).tolist()


# -- what a picture shows --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.webp", "x.jpg"])
def test_every_format_gives_the_picture(tmp_path: Path, name: str) -> None:
    given: dict[str, Any] = {"x.webp": {"lossless": True}, "x.jpg": {"quality": 100, "subsampling": 0}}.get(
        name, {}
    )
    path = saved(tmp_path, quarters(), name, **given)
    assert fault_of(path) is None
    read = read_picture(path, (32, 32))
    assert read.shape == (32, 32, 3) and read.dtype == torch.float32
    assert torch.allclose(
        torch.tensor(corners(read)), torch.tensor(SEEN), atol=0.02 if name == "x.jpg" else 0
    )


def test_a_picture_of_the_right_size_comes_bit_equal(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    path = saved(tmp_path, Image.fromarray(numbers))
    assert torch.equal(read_picture(path, (40, 24)), torch.tensor(numbers).float() / 255)
    with open(path, "rb") as file:
        assert torch.equal(read_picture(file, (40, 24)), read_picture(path, (40, 24)))


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path, turn: int) -> None:
    transpose = Image.Transpose
    back: dict[int, list[Any]] = {  # what a camera does that writes this number (Exif 2.3, Orientation)
        1: [],
        2: [transpose.FLIP_LEFT_RIGHT],
        3: [transpose.ROTATE_180],
        4: [transpose.FLIP_TOP_BOTTOM],
        5: [transpose.TRANSPOSE],
        6: [transpose.ROTATE_90],
        7: [transpose.TRANSVERSE],
        8: [transpose.ROTATE_270],
    }
    image = quarters().resize((32, 48), Image.Resampling.NEAREST)
    for step in back[turn]:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = turn
    path = saved(tmp_path, image, exif=exif)
    assert picture_size(path) == (32, 48)
    assert corners(read_picture(path, (32, 48))) == SEEN


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "tRNS"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    given: dict[str, Any] = {}
    if mode == "tRNS":
        image = Image.new("RGB", (8, 8), (1, 2, 3))
        image.paste((0, 0, 0), (0, 0, 4, 8))
        given = {"transparency": (1, 2, 3)}
    path = saved(tmp_path, image if mode == "tRNS" else image.convert(mode), **given)
    read = read_picture(path, (8, 8))
    assert torch.equal(read[:, :4], torch.zeros(8, 4, 3)) and torch.equal(read[:, 4:], torch.ones(8, 4, 3))


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGBA", (4, 4), (255, 0, 0, 51)))
    assert read_picture(path, (4, 4))[0, 0].tolist() == pytest.approx([1, 0.8, 0.8], abs=1e-6)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK"])
def test_grey_and_print_colours_become_three_channels(tmp_path: Path, mode: str) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 4), (255, 255, 255)).convert(mode), "x.tif")
    assert torch.equal(read_picture(path, (4, 4)), torch.ones(4, 4, 3))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_of_sixteen_bits_keeps_them(tmp_path: Path, name: str) -> None:
    numbers = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 16 + 15
    path = saved(tmp_path, Image.fromarray(numbers), name)
    read = read_picture(path, (64, 64))
    assert torch.allclose(read, torch.tensor(numbers.astype(np.float32) / 65535)[..., None].expand(64, 64, 3))
    assert len(read.unique()) == 4096


def test_the_first_of_several_frames_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    path = saved(tmp_path, frames[0], "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_picture(path, (4, 4))[0, 0].tolist() == [1, 0, 0]


# -- scaling and cutting ---------------------------------------------------------------------------


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("wide", "high"), [(96, 32), (32, 96)])
def test_the_middle_is_kept_or_what_is_asked_for(
    tmp_path: Path, wide: int, high: int, as_tensor: bool
) -> None:
    """Three squares in a row, red, green, blue: each is what one place of the cut shows."""
    image = Image.new("RGB", (3, 1))
    for number, colour in enumerate(((255, 0, 0), (0, 255, 0), (0, 0, 255))):
        image.putpixel((number, 0), colour)
    image = image if wide > high else image.transpose(Image.Transpose.ROTATE_270)
    image = image.resize((wide, high), Image.Resampling.NEAREST)
    given: Any = torch.tensor(np.array(image)).float() / 255 if as_tensor else saved(tmp_path, image)
    for place, colour in ((0.0, [1, 0, 0]), (0.5, [0, 1, 0]), (1.0, [0, 0, 1])):
        read = read_picture(given, (16, 16), (place, place))
        assert read.shape == (16, 16, 3)
        assert read[8, 8].tolist() == pytest.approx(colour, abs=0.01)
    assert torch.equal(read_picture(given, (16, 16)), read_picture(given, (16, 16), (0.5, 0.5)))


@settings(max_examples=60, deadline=None)
@given(wide=st.integers(1, 70), high=st.integers(1, 70), width=st.integers(1, 40), height=st.integers(1, 40))
def test_any_size_fills_any_size_and_one_colour_stays_one(
    wide: int, high: int, width: int, height: int
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (wide, high), (51, 102, 204)).save(file, "PNG")
    wanted = torch.tensor([0.2, 0.4, 0.8]).expand(height, width, 3)
    for picture in (file, torch.tensor([0.2, 0.4, 0.8]).expand(high, wide, 3)):
        assert torch.allclose(read_picture(picture, (width, height)), wanted, atol=1e-5)


def test_opacity_of_a_picture_in_memory_is_laid_over_white() -> None:
    pixels = torch.tensor([0.0, 0.0, 0.0, 0.25]).expand(4, 4, 4)
    assert torch.allclose(read_picture(pixels, (4, 4)), torch.full((4, 4, 3), 0.75))
    assert torch.allclose(read_picture(torch.full((4, 4, 1), 0.5), (4, 4)), torch.full((4, 4, 3), 0.5))
    with pytest.raises(PictureError):
        read_picture(torch.zeros(4, 4), (4, 4))


# -- buckets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "step"), [(64, 64), (64, 8), (512, 64), (640, 64), (1000, 64), (1024, 32)]
)
def test_buckets_have_about_the_pixels_of_the_square_and_never_more(resolution: int, step: int) -> None:
    buckets = buckets_for(resolution, step)
    side = resolution // step * step
    assert (side, side) in buckets and buckets == sorted(set(buckets))
    for width, height in buckets:
        assert width % step == 0 == height % step
        assert width * height <= resolution**2
        assert max(width, height) <= MOST_SHAPE * min(width, height)
        assert (height, width) in buckets
        assert (max(width, height) + step) * min(width, height) > side * side  # no longer one would fit


def test_the_buckets_of_sdxl_hold_the_sizes_that_it_is_known_by() -> None:
    assert {(1024, 1024), (832, 1216), (896, 1152), (1216, 832), (768, 1344)} <= set(buckets_for(1024))


@given(width=st.integers(1, 5000), height=st.integers(1, 5000))
def test_no_bucket_is_nearer_in_shape(width: int, height: int) -> None:
    buckets = buckets_for(512)
    found = Fraction(*bucket_of(width, height, buckets))

    def distance(shape: Fraction) -> Fraction:
        ratio = shape / Fraction(width, height)
        return max(ratio, 1 / ratio)

    best = min(distance(Fraction(*bucket)) for bucket in buckets)
    assert float(distance(found)) == pytest.approx(float(best), rel=1e-9)


def test_a_resolution_below_a_step_is_an_error() -> None:
    with pytest.raises(BridgeError, match="too small"):
        buckets_for(63)


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_is_of_the_bytes_and_the_size_and_nothing_else(tmp_path: Path) -> None:
    first, copy = saved(tmp_path, quarters(), "a.png"), saved(tmp_path, quarters(), "b.png")
    other = saved(tmp_path, quarters(8), "c.png")
    pixels = torch.rand(4, 4, 3)
    distinct = [
        picture_key(first, (64, 32)),
        picture_key(first, (32, 64)),
        picture_key(other, (64, 32)),
        picture_key(pixels, (64, 32)),
        picture_key(pixels.view(2, 8, 3), (64, 32)),
        picture_key(pixels.flip(0), (64, 32)),
    ]
    assert len(set(distinct)) == len(distinct) and {len(key) for key in distinct} == {64}
    assert picture_key(copy, (64, 32)) == distinct[0]
    assert picture_key(pixels.clone(), (64, 32)) == distinct[3]
    with pytest.raises(PictureError, match="gone.png"):
        picture_key(tmp_path / "gone.png", (64, 64))


# -- bad pictures ----------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few dozen bytes that announces 60000 x 60000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def test_a_picture_that_announces_too_many_pixels_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(bomb())
    assert fault_of(path) == "60000 x 60000 pixels"
    for call in (lambda: read_picture(path, (8, 8)), lambda: picture_size(path)):
        with pytest.raises(PictureError, match=r"bomb\.png"):
            call()
    # Other packs lift the library's own limit for the whole process; ours stays.
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        with pytest.raises(PictureError, match="60000 x 60000"):
            read_picture(path, (8, 8))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert MOST_PIXELS < 60_000 * 60_000


BAD: dict[str, Callable[[bytes], bytes]] = {
    "empty.png": lambda good: b"",
    "text.png": lambda good: b"this is no picture at all, but a text",
    "cut.png": lambda good: good[: len(good) // 2],
    "cut.jpg": lambda good: good[: len(good) // 2],
    "cut.webp": lambda good: good[: len(good) // 2],
    "head.png": lambda good: good[:20],
    "gif.png": lambda good: b"GIF89a" + bytes(60),
    "hole.png": lambda good: good[:45] + bytes(len(good) - 60) + good[-15:],
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_an_error_with_its_name(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    path.write_bytes(BAD[name](path.read_bytes()))
    with pytest.raises(PictureError) as caught:
        read_picture(path, (8, 8))
    assert name in str(caught.value) and caught.value.action and caught.value.name == name
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)


def test_a_missing_picture_and_a_folder_are_errors_with_their_names(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.png", tmp_path):
        for call in (lambda path=path: read_picture(path, (8, 8)), lambda path=path: picture_size(path)):
            with pytest.raises(PictureError, match=path.name):
                call()
        assert fault_of(path)


def test_whatever_the_bytes_are_it_is_a_picture_or_a_typed_error(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    chance = np.random.default_rng(1)
    refused = 0
    for name in ("x.png", "x.jpg", "x.webp", "x.bmp", "x.tif"):
        path = saved(tmp_path, Image.fromarray(noise), name)
        good = bytearray(path.read_bytes())
        for _ in range(60):
            broken = bytearray(good)
            for _ in range(int(chance.integers(1, 4))):
                broken[int(chance.integers(len(good)))] = int(chance.integers(256))
            path.write_bytes(broken[: int(chance.integers(len(good) // 2, len(good) + 1))])
            try:
                assert read_picture(path, (8, 8)).isfinite().all()
            except PictureError:
                refused += 1
            assert fault_of(path) is None or isinstance(fault_of(path), str)
    assert refused > 100


def test_numbers_without_a_known_range_are_refused(tmp_path: Path) -> None:
    for numbers in (np.full((4, 4), 70_000, np.int32), np.full((4, 4), 7, np.float32)):
        with pytest.raises(PictureError):
            read_picture(saved(tmp_path, Image.fromarray(numbers), "x.tif"), (4, 4))


def test_the_library_of_pictures_is_imported_late() -> None:
    for module in (pictures, dataset, bank):
        tree = ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))
        imported = {ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))}
        assert not [line for line in imported if "PIL" in line or "numpy" in line]

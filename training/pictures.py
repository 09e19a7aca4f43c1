"""Opens pictures for training: upright, over white, cut to the size of a bucket, and known by content."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import torch
from torch import Tensor

from ..bridges.errors import BridgeError

if TYPE_CHECKING:
    from _typeshed import StrPath

Size = tuple[int, int]
"""Width and height in pixels."""

FORMATS: dict[str, tuple[str, ...]] = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
}
"""Formats by the names of Pillow; no other decoder is ever asked."""
SUFFIXES = tuple(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MOST_PIXELS = 1 << 28
"""Decoded, such a picture takes a gigabyte; what announces more is refused before it is decoded."""
MOST_SHAPE = 2.0
"""Longest side of a bucket over its shortest."""
MIDDLE = (0.5, 0.5)

_ORIENTATION = 0x0112
_KEY = "language-bridge picture 1"
"""Counts up when the same file would give other numbers."""


class PictureError(BridgeError):
    """One picture that cannot be used; the others still can. `name` is the file's."""

    def __init__(self, name: str, found: object) -> None:
        super().__init__(
            f"The picture {name} cannot be read.",
            found,
            f"a whole picture of at most {MOST_PIXELS >> 20} megapixels: {', '.join(FORMATS)}",
            "Save the picture again, or take it out of the folder.",
        )
        self.name = name
        self.why = str(found)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let the error travel between processes."""
        return type(self), (self.name, self.why)


def read_picture(
    picture: StrPath | BinaryIO | Tensor, size: Size, place: tuple[float, float] = MIDDLE
) -> Tensor:
    """A picture that fills a size: [height, width, 3], float32 in 0..1.

    picture: a file, an open one, or [H, W, 1 to 4] in 0..1 (the last of 2 and of 4 is opacity). It is turned
    as its camera says, laid over white, scaled until it covers the size, and cut. place: where the cut lies,
    across and down, from 0 (left, top) to 1 (right, bottom). Grey pictures of 16 bits keep them; of several
    frames the first is taken; colour profiles are not looked at. PictureError on any fault of a file.
    """
    width, height = size
    if isinstance(picture, Tensor):
        return _fit(picture, width, height, place)
    try:
        with _opened(picture) as opened:
            pixels = _upright(opened)
            return _resized(pixels, width, height, place)
    except PictureError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # decoders answer damaged files with errors of every type
        raise PictureError(_name(picture), f"{type(error).__name__}: {error!s:.200}") from error


def picture_size(picture: StrPath | BinaryIO | Tensor) -> Size:
    """Width and height, upright; of a file only its header is read. PictureError when it is no picture."""
    if isinstance(picture, Tensor):
        return int(picture.shape[1]), int(picture.shape[0])
    try:
        with _opened(picture) as opened:
            width, height = opened.size
            return (
                (height, width) if opened.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8) else (width, height)
            )
    except PictureError:
        raise
    except Exception as error:  # as above
        raise PictureError(_name(picture), f"{type(error).__name__}: {error!s:.200}") from error


def picture_key(picture: StrPath | Tensor, size: Size) -> str:
    """SHA-256 (hex) over the bytes of a picture and the size that it is to fill; PictureError."""
    total = hashlib.sha256(f"{_KEY} {size[0]}x{size[1]}\n".encode("ascii"))
    if isinstance(picture, Tensor):
        plain = picture.detach().cpu().contiguous()
        total.update(f"{list(plain.shape)} {plain.dtype}\n".encode("ascii"))
        total.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        return total.hexdigest()
    try:
        with open(picture, "rb", buffering=0) as file:
            while block := file.read(1 << 20):
                total.update(block)
    except OSError as error:
        raise PictureError(_name(picture), error.strerror or error) from error
    return total.hexdigest()


def buckets_for(resolution: int, step: int = 64) -> list[Size]:
    """Sizes of about resolution x resolution pixels and never more, in multiples of `step`.

    No side is more than `MOST_SHAPE` times the other; the square is always among them, and with each size
    the same size turned. BridgeError when the resolution is smaller than a step.
    """
    if step < 1 or resolution < step:
        raise BridgeError(
            "The resolution is too small.",
            f"{resolution} pixels",
            f"at least {step}",
            "Choose the resolution that the checkpoint was trained with.",
        )
    side = resolution // step
    found: set[Size] = {(side, side)}
    for shorter in range(1, side + 1):
        longer = resolution * resolution // (shorter * step) // step
        if longer <= MOST_SHAPE * shorter:
            found |= {(shorter, longer), (longer, shorter)}
    return sorted((width * step, height * step) for width, height in found)


def bucket_of(width: int, height: int, buckets: Sequence[Size]) -> Size:
    """The bucket whose shape is nearest to a picture's, by their ratio; the larger of equals."""
    shape = math.log(width / height)
    return min(buckets, key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1], size))


def fault_of(path: StrPath) -> str | None:
    """Why a file cannot be a whole picture, by its first and last bytes; None where they look right.

    Far cheaper than decoding: it finds empty files, other files under a picture's name, and PNG and WebP
    files that were cut off.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            head = file.read(32)
            format_name = _format_of(head)
            if not size_bytes:
                return "an empty file"
            if format_name is None:
                return "not a " + ", ".join(FORMATS)
            if format_name == "PNG":
                width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
                if width * height > MOST_PIXELS:
                    return f"{width} x {height} pixels"
                file.seek(max(0, size_bytes - 4096))
                return None if b"IEND" in file.read(4096) else "the end is missing"
            if format_name == "WEBP" and int.from_bytes(head[4:8], "little") + 8 > size_bytes:
                return "the end is missing"
    except OSError as error:
        return error.strerror or str(error)
    return None


def _format_of(head: bytes) -> str | None:
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[12:16] == b"IHDR":
        return "PNG"
    if head[:3] == b"\xff\xd8\xff":
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[:2] == b"BM":
        return "BMP"
    return "TIFF" if head[:4] in (b"II*\0", b"MM\0*") else None


def _name(file: StrPath | BinaryIO) -> str:
    return Path(file).name if isinstance(file, (str, os.PathLike)) else "in the archive"


def _opened(path: StrPath | BinaryIO) -> Any:
    """The picture, not decoded yet; PictureError when it announces more pixels than are taken."""
    from PIL import Image

    opened = Image.open(path, formats=list(FORMATS))
    width, height = opened.size
    if width * height > MOST_PIXELS:
        opened.close()
        raise PictureError(_name(path), f"{width} x {height} pixels")
    return opened


def _upright(opened: Any) -> Any:
    """Decoded and turned, of the mode RGB (8 bits), or F (grey, float in 0..1)."""
    import numpy as np
    from PIL import Image, ImageOps

    opened.load()
    picture = ImageOps.exif_transpose(opened)
    mode = str(picture.mode)
    if mode.startswith("I"):
        grey = np.asarray(picture).astype(np.float32)
        if grey.size and (grey.min() < 0 or grey.max() > 65535):
            raise ValueError("whole numbers of more than 16 bits")
        return Image.fromarray(grey / np.float32(65535))
    if mode == "F":
        grey = np.asarray(picture)
        if not np.isfinite(grey).all() or grey.min() < 0 or grey.max() > 1:
            raise ValueError("numbers outside 0..1")
        return picture
    if mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        paper = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(paper, layered).convert("RGB")
    return picture.convert("RGB")


def _resized(picture: Any, width: int, height: int, place: tuple[float, float]) -> Tensor:
    import numpy as np
    from PIL import Image

    wide, high = cast("Size", picture.size)
    box = _cut(wide, high, width, height, place)
    fitted = picture.resize((width, height), Image.Resampling.LANCZOS, box=box)
    numbers: Any = np.array(fitted)
    pixels = torch.as_tensor(numbers)
    if pixels.ndim == 2:
        return pixels.clamp(0, 1).unsqueeze(-1).repeat(1, 1, 3)
    return pixels.float() / 255


def _cut(
    wide: int, high: int, width: int, height: int, place: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The largest part that has the shape width : height, as left, top, right, bottom."""
    scale = min(wide / width, high / height)
    across, down = min(width * scale, wide), min(height * scale, high)
    left, top = (wide - across) * place[0], (high - down) * place[1]
    return left, top, min(left + across, wide), min(top + down, high)


def _fit(picture: Tensor, width: int, height: int, place: tuple[float, float]) -> Tensor:
    """The same for a picture in memory; where the shape differs, whole pixels are cut before it is scaled."""
    if picture.ndim != 3 or not 1 <= picture.shape[2] <= 4:
        raise PictureError("image", f"a tensor of shape {list(picture.shape)}, [H, W, 1 to 4] expected")
    pixels = picture.detach().to("cpu", torch.float32)
    channels = int(pixels.shape[2])
    if channels in (2, 4):
        opacity = pixels[..., -1:].clamp(0, 1)
        pixels = pixels[..., :-1] * opacity + (1 - opacity)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(1, 1, 3)
    high, wide = int(pixels.shape[0]), int(pixels.shape[1])
    left, top, right, bottom = (round(side) for side in _cut(wide, high, width, height, place))
    pixels = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    if tuple(pixels.shape[:2]) != (height, width):
        planes = pixels.permute(2, 0, 1)[None]
        planes = torch.nn.functional.interpolate(
            planes, (height, width), mode="bicubic", align_corners=False, antialias=True
        )
        pixels = planes[0].permute(1, 2, 0)
    return pixels.clamp(0, 1).contiguous()

"""A shard gives every whole example that it holds, whatever else is wrong with it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from language_bridge.bridges.errors import BridgeError
from language_bridge.training.headless.shards import Limits, fields_of, find_shards, read, survey

from .toys import member, picture, row, write_shard


def everything(fields: Any, size: tuple[int, int] | None) -> str | None:
    return None


def captions(path: Path, **limits: Any) -> tuple[list[str], dict[str, int]]:
    """The English captions that a survey finds, and what it left out."""
    found = survey(path, everything, Limits(**limits))
    with path.open("rb") as file:
        fields = [fields_of(read(file, place.text)) for place in found.places]
        pictures = [read(file, place.picture) for place in found.places]
    assert all(each[:2] == b"\xff\xd8" for each in pictures)
    return [str(each["caption_en"]) for each in fields if each], dict(found.left_out)


ROWS = [row(seed) for seed in range(5)]
ALL = [fields["caption_en"] for fields, _ in ROWS]


def test_every_example_is_found_with_its_size(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", [row(0, width=48), row(1, height=64)])
    assert [place.size for place in survey(path, everything).places] == [(48, 32), (32, 64)]


def test_a_survey_reads_but_little_of_the_pictures(tmp_path: Path) -> None:
    """Sizes come from the beginning of a picture; the rest of the tar is passed over."""
    noise = io.BytesIO()
    from PIL import Image

    Image.effect_noise((1024, 1024), 90).convert("RGB").save(noise, "JPEG", quality=95)
    path = write_shard(tmp_path / "a.tar", [(row(0)[0], noise.getvalue())] * 4)

    class Counting(io.FileIO):
        count = 0

        def readinto(self, buffer: Any, /) -> int:
            got = super().readinto(buffer)
            Counting.count += got
            return got

    from language_bridge.training.headless import shards

    class Opened:
        name = path.name

        def open(self, mode: str) -> Any:
            return io.BufferedReader(Counting(path), buffer_size=512)

    assert len(shards.survey(Opened(), everything).places) == 4  # type: ignore[arg-type]
    assert Counting.count < path.stat().st_size / 10


def test_what_a_judge_leaves_out_is_counted_by_reason(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", ROWS)
    found = survey(path, lambda fields, size: "odd" if fields["caption_en"] == ALL[1] else None)
    assert (len(found.places), found.left_out) == (4, {"odd": 1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"jpg": b""}, "empty or too large"),
        ({"jpg": b"not a picture"}, "damaged picture"),
        ({"json": b"{"}, "damaged caption file"),
        ({"json": b"[1]"}, "damaged caption file"),
        ({"json": b"\xff\xfe{}"}, "damaged caption file"),
        ({"json": b"[" * 100_000}, "damaged caption file"),
        ({"json": b" " * 2_000_000}, "empty or too large"),
        ({"jpg": None}, "no picture"),
        ({"json": None}, "no caption file"),
    ],
)
def test_a_damaged_member_costs_its_own_example_alone(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as out:
        for number, (fields, content) in enumerate(ROWS):
            parts = {"jpg": content, "json": json.dumps(fields).encode()} | (change if number == 2 else {})
            for ending, each in parts.items():
                if each is not None:
                    member(out, f"x/{number}.{ending}", each)
    found, left_out = captions(path)
    assert found == [*ALL[:2], *ALL[3:]]
    assert left_out[reason] == 1


def test_a_damaged_header_costs_its_own_example_alone(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", ROWS)
    with tarfile.open(path) as tar:
        header = tar.getmembers()[4].offset  # the picture of the third example
    content = bytearray(path.read_bytes())
    content[header : header + 100] = b"\xaa" * 100
    path.write_bytes(content)
    found, left_out = captions(path)
    assert found == [*ALL[:2], *ALL[3:]]
    assert left_out["damaged header"] == 1


def test_a_shard_that_ends_early_gives_what_came_before(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", ROWS)
    with tarfile.open(path) as tar:
        middle = tar.getmembers()[6].offset_data + 10
    path.write_bytes(path.read_bytes()[:middle])
    found, left_out = captions(path)
    assert found == ALL[:3]
    assert sum(left_out.values()) >= 1


def test_links_and_other_files_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as out:
        for number, (fields, content) in enumerate(ROWS[:2]):
            member(out, f"{number}.txt", b"words")
            link = tarfile.TarInfo(f"{number}.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            out.addfile(link)
            member(out, f"{number}.seg.png", b"a second picture under a longer ending")
            member(out, f"{number}.jpg", content)
            member(out, f"{number}.json", json.dumps(fields).encode())
    assert captions(path) == (ALL[:2], {})


def test_tars_that_were_put_together_are_read_to_the_end(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a.tar", ROWS[:2]).read_bytes()
    second = write_shard(tmp_path / "b.tar", ROWS[2:], first=2).read_bytes()
    (tmp_path / "ab.tar").write_bytes(first + second)
    assert captions(tmp_path / "ab.tar") == (ALL, {})


def test_a_limit_of_files_holds(tmp_path: Path) -> None:
    found, left_out = captions(write_shard(tmp_path / "a.tar", ROWS), files=6)
    assert (found, left_out) == (ALL[:3], {"beyond the limit of files": 1})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_no_damage_raises(tmp_path: Path, data: some.DataObject) -> None:
    """Any bytes put anywhere, and any cut: a survey ends, and what it names lies inside of the file."""
    path = write_shard(tmp_path / "a.tar", ROWS[:3])
    content = bytearray(path.read_bytes())
    at = data.draw(some.integers(0, len(content) - 1))
    junk = data.draw(some.binary(min_size=1, max_size=600))
    content[at : at + len(junk)] = junk
    path.write_bytes(content[: data.draw(some.integers(0, len(content)))])
    size_bytes = path.stat().st_size
    for place in survey(path, everything).places:
        assert all(start + length <= size_bytes for start, length in (place.picture, place.text))


def test_names_stand_for_files_folders_and_ranges(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"):
        write_shard(tmp_path / name, [])
    a, b, c, d = (tmp_path / name for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b.tar"))
    assert find_shards([str(tmp_path)]) == [a, b, c, d]
    assert find_shards([str(tmp_path / "a-{08..10}.tar")]) == [a, b, c]
    assert find_shards([str(d), str(tmp_path)]) == [d, a, b, c]


@pytest.mark.parametrize(
    "name", ["nothing.tar", "a-{1..2}.tar", "a-{0..99999999}.tar", "https://x/a.tar", "pipe:cat a.tar"]
)
def test_a_name_that_stands_for_no_file_here_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(BridgeError, match="shards"):
        find_shards([name if ":" in name else str(tmp_path / name)])


def test_a_turned_picture_has_the_size_that_it_is_looked_at_with(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    written = io.BytesIO()
    Image.open(io.BytesIO(picture(48, 32))).save(written, "JPEG", exif=exif)
    path = write_shard(tmp_path / "a.tar", [(row(0)[0], written.getvalue())])
    assert survey(path, everything).places[0].size == (32, 48)

"""The bank gives back what was put, whatever happened in between."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from language_bridge.bridges.errors import BridgeError
from language_bridge.training import bank as bank_module
from language_bridge.training.bank import Bank, Damaged

SHAPE = (4, 3)
BYTES = 4 * 3 * 2


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode("ascii")).hexdigest()


def record(number: int) -> Tensor:
    """Any bits at all, also those that are no number."""
    bits = torch.randint(-(1 << 15), 1 << 15, SHAPE, generator=torch.Generator().manual_seed(number))
    return bits.to(torch.int16).view(torch.float16)


def keys(numbers: Any) -> list[str]:
    return [key(number) for number in numbers]


def records(numbers: Any) -> Tensor:
    return torch.stack([record(number) for number in numbers])


def opened(folder: Path) -> Bank:
    return Bank(folder, "latents", SHAPE, torch.float16)


def same(given: Tensor, wanted: Tensor) -> bool:
    """Bit by bit: NaN equals itself."""
    return given.dtype == wanted.dtype and torch.equal(given.view(torch.int16), wanted.view(torch.int16))


def whole(folder: Path, most: int = 64) -> int:
    """How many records a bank holds; each is the one that was put under its key."""
    with opened(folder) as bank:
        missing = set(bank.missing(keys(range(most))))
        there = [number for number in range(most) if key(number) not in missing]
        assert same(bank.get(keys(there)), records(there)) if there else True
        assert len(bank) == len(there)
    return len(there)


# -- what was put comes back -----------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    puts=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True), min_size=1, max_size=6),
    asked=st.lists(st.integers(0, 20), max_size=30),
)
def test_what_was_put_comes_back_bit_equal_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, puts: list[list[int]], asked: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("bank")
    bank = opened(folder)
    for numbers in puts:
        bank.put(keys(numbers), records(numbers))
    put = {number for numbers in puts for number in numbers}
    asked = [number for number in asked if number in put]
    for _ in range(2):  # the second time from a new process's point of view
        assert len(bank) == len(put)
        assert bank.missing(keys(range(21))) == keys(n for n in range(21) if n not in put)
        if asked:
            assert same(bank.get(keys(asked)), records(asked))
        bank.close()
        bank = opened(folder)
    bank.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
def test_every_dtype_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    given = (torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    with Bank(tmp_path, "x", (2, 3), dtype) as bank:
        bank.put(keys(range(5)), given)
        back = bank.get(keys([4, 0, 4]))
    assert back.dtype == dtype and torch.equal(back, given[[4, 0, 4]])


def test_what_was_given_out_is_memory_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.put(keys([1]), records([1]))
        bank.get(keys([1])).zero_()
        assert same(bank.get(keys([1])), records([1]))


def test_nothing_asked_is_nothing_given(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        assert bank.get([]).shape == (0, *SHAPE)
        bank.put([], torch.empty(0, *SHAPE, dtype=torch.float16))
        assert len(bank) == 0


def test_a_key_that_was_never_put_is_a_fault_of_the_caller(tmp_path: Path) -> None:
    with opened(tmp_path) as bank, pytest.raises(KeyError):
        bank.get(keys([1]))


@pytest.mark.parametrize("odd", ["", "00", "g" * 64, "0" * 63])
def test_a_key_is_a_hash(tmp_path: Path, odd: str) -> None:
    with opened(tmp_path) as bank, pytest.raises(ValueError):
        bank.missing([odd])


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "a.b", "x" * 65])
def test_a_name_of_a_bank_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        Bank(tmp_path, name, SHAPE, torch.float16)


@pytest.mark.parametrize(("shape", "dtype"), [((3, 4), torch.float16), (SHAPE, torch.bfloat16)])
def test_a_bank_of_other_tensors_is_an_error_and_stays(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    with opened(tmp_path) as bank:
        bank.put(keys([1]), records([1]))
    with pytest.raises(BridgeError, match="holds something else"):
        Bank(tmp_path, "latents", shape, dtype)
    assert whole(tmp_path) == 1


# -- several processes -----------------------------------------------------------------------------


def test_one_writes_and_the_others_read_what_it_has_put(tmp_path: Path) -> None:
    with opened(tmp_path) as writer, opened(tmp_path) as reader:
        for number in range(4):
            writer.put(keys([number]), records([number]))
            assert reader.missing(keys(range(number + 1))) == []
            assert same(reader.get(keys([number])), records([number]))
        with pytest.raises(BridgeError, match="written by somebody else"):
            reader.put(keys([9]), records([9]))
        writer.close()
        reader.put(keys([9]), records([9]))
    assert whole(tmp_path) == 5


# -- damage ----------------------------------------------------------------------------------------


def test_every_flipped_byte_is_noticed_and_mended(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.put(keys(range(3)), records(range(3)))
    data = tmp_path / "latents.data"
    good = data.read_bytes()
    for place in range(len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        data.write_bytes(flipped)
        broken = place // BYTES
        with opened(tmp_path) as bank:
            with pytest.raises(Damaged) as caught:
                bank.get(keys([0, 1, 2, broken]))
            assert caught.value.keys == (key(broken),)
            assert bank.missing(keys(range(3))) == keys([broken])
            assert same(bank.get(keys(n for n in range(3) if n != broken)), records(set(range(3)) - {broken}))
        data.write_bytes(good)
    data.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with opened(tmp_path) as bank:
        with pytest.raises(Damaged):
            bank.get(keys([2]))
        bank.put(keys([2]), records([2]))
        assert same(bank.get(keys([2])), records([2]))
    assert whole(tmp_path) == 3


def test_every_flipped_byte_of_the_index_costs_at_most_its_own_record(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.put(keys(range(4)), records(range(4)))
    index = tmp_path / "latents.index"
    good = index.read_bytes()
    for place in range(bank_module._HEAD_BYTES, len(good)):
        flipped = bytearray(good)
        flipped[place] ^= 1 << place % 8
        index.write_bytes(flipped)
        assert whole(tmp_path) == 3
    for place in range(bank_module._HEAD_BYTES):
        flipped = bytearray(good)
        flipped[place] ^= 1
        index.write_bytes(flipped)
        with pytest.raises(BridgeError, match="holds something else"):
            opened(tmp_path)


def test_files_cut_anywhere_give_whole_records_and_take_new_ones(tmp_path: Path) -> None:
    with opened(tmp_path) as bank:
        bank.put(keys(range(3)), records(range(3)))
    data, index = tmp_path / "latents.data", tmp_path / "latents.index"
    good, entries = data.read_bytes(), index.read_bytes()
    entry = (len(entries) - bank_module._HEAD_BYTES) // 3
    cuts = [(d, len(entries)) for d in range(0, len(good) + 1, 5)]
    cuts += [(len(good), i) for i in range(bank_module._HEAD_BYTES, len(entries) + 1, 7)]
    for data_bytes, index_bytes in cuts:
        data.write_bytes(good[:data_bytes])
        index.write_bytes(entries[:index_bytes])
        kept = min(data_bytes // BYTES, (index_bytes - bank_module._HEAD_BYTES) // entry)
        assert whole(tmp_path) == kept
        with opened(tmp_path) as bank:
            bank.put(keys(range(2, 6)), records(range(2, 6)))
        assert whole(tmp_path) == len({*range(kept), *range(2, 6)})


# -- death -----------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 is a signal of POSIX systems")
def test_killed_at_any_point_of_putting_nothing_half_written_is_seen(tmp_path: Path) -> None:
    chance = random.Random(5)
    counts: list[int] = []
    for point in range(12):
        folder = tmp_path / str(point)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # until it is killed
            try:
                bank = opened(folder)
                for first in range(0, 64, 4):
                    bank.put(keys(range(first, first + 4)), records(range(first, first + 4)))
                    os.write(write, b".")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(write)
        wanted = chance.randrange(14)
        said = b""
        while len(said) < wanted:
            said += os.read(read, wanted - len(said))
        time.sleep(chance.random() * 0.004)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        kept = whole(folder)
        assert kept >= 4 * wanted  # what put has returned from is there
        counts.append(kept)
        with opened(folder) as bank:
            rest = [number for number in range(64) if key(number) in bank.missing(keys(range(64)))]
            if rest:
                bank.put(keys(rest), records(rest))
        assert whole(folder) == 64
    assert len(set(counts)) > 3, counts


# -- a disk that refuses ---------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process are a matter of POSIX systems")
@pytest.mark.parametrize("side", [8, 64])  # the index outgrows the limit first, or the records do
def test_a_disk_that_is_full_at_any_byte_leaves_the_bank_whole(tmp_path: Path, side: int) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    given = torch.randn(6, side, generator=torch.Generator().manual_seed(0)).half()
    with Bank(tmp_path, "latents", (side,), torch.float16) as bank:
        bank.put(keys([0]), given[:1])
        refused = 0
        for most in range(bank_module._HEAD_BYTES, 2000, 9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            try:
                bank.put(keys(range(1, 6)), given[1:])
                break
            except BridgeError as error:
                refused += 1
                assert "could not be written" in error.what and error.action
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            for reader in (bank, Bank(tmp_path, "latents", (side,), torch.float16)):
                assert reader.missing(keys(range(6))) == keys(range(1, 6))
                assert torch.equal(reader.get(keys([0])), given[:1])
        assert refused > 10 and len(bank) == 6
        assert torch.equal(bank.get(keys(range(6))), given)
    with Bank(tmp_path, "latents", (side,), torch.float16) as bank:
        assert torch.equal(bank.get(keys(range(6))), given)


@pytest.mark.parametrize("name", ["fsync", "open", "link"])
def test_every_failing_call_is_a_typed_error_and_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    real: Callable[..., Any] = getattr(os, name)
    for failing in range(1, 12):
        folder = tmp_path / f"{failing}"
        calls = 0

        def call(*given: Any, failing: int = failing, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.EIO, "broken")
            return real(*given, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            done = 0
            try:
                with opened(folder) as bank:
                    for number in range(3):
                        bank.put(keys([number]), records([number]))
                        done += 1
            except BridgeError as error:
                assert error.found == "broken"
        if calls < failing:
            break
        assert whole(folder) >= done
    else:
        pytest.fail("the loop never came to an end")


# -- cost ------------------------------------------------------------------------------------------


def test_a_batch_costs_far_less_than_a_step(tmp_path: Path) -> None:
    """64 latents of 4x8x8 in half precision; the limit is generous because other programs run, too."""
    with Bank(tmp_path, "latents", (4, 8, 8), torch.float16) as bank:
        count = 2000
        bank.put(keys(range(count)), torch.randn(count, 4, 8, 8).half())
        batches = [keys(random.Random(n).sample(range(count), 64)) for n in range(40)]
        bank.get(batches[0])
        took: list[float] = []
        for batch in batches:
            start = time.process_time()
            bank.get(batch)
            took.append(time.process_time() - start)
    assert sorted(took)[len(took) // 2] < 0.001


def test_flushes_count_by_the_put_and_not_by_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path) as bank:
        bank.put(keys([0]), records([0]))
        calls: list[int] = []
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: (calls.append(file), real(file))[1])
        bank.put(keys(range(1, 40)), records(range(1, 40)))
        assert len(calls) == 2
        bank.put(keys(range(1, 40)), records(range(1, 40)))
        assert len(calls) == 2

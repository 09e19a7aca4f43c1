"""Keeps what native towers said, so that a prompt that comes again loads and computes nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from ..bridges.base import Cond, Hidden

LIMIT_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class Said:
    """What tower and bridge said: `cond`, and the states before it where the bridge asks for them again."""

    cond: Cond
    hidden: Hidden | None = None

    def copy(self) -> Said:
        """The same values in tensors of their own."""
        return Said(
            Cond(self.cond.context.clone(), _clone(self.cond.pooled)),
            self.hidden
            and Hidden(self.hidden.states.clone(), self.hidden.mask.clone(), _clone(self.hidden.pooled)),
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        values = [self.cond.context, self.cond.pooled]
        if self.hidden is not None:
            values += [self.hidden.states, self.hidden.mask, self.hidden.pooled]
        return sum(value.numel() * value.element_size() for value in values if value is not None)


class EmbeddingCache:
    """`Said` by content: the digest of bridge and tower, and whatever else decides the numbers.

    Holds at most `limit_bytes`, drops what was used longest ago, and gives out copies only, so that nobody
    who edits a tensor in place edits the cache. `claim` says which digest a bridge has now; what an older
    content of the same bridge said is dropped.
    """

    def __init__(self, limit_bytes: int = LIMIT_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self._entries: OrderedDict[tuple[str, Hashable], Said] = OrderedDict()
        self._digests: dict[str, str] = {}
        self._size_bytes = 0
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return self._size_bytes

    def get(self, digest: str, key: Hashable) -> Said | None:
        """A copy of what was said, or None."""
        with self._lock:
            found = self._entries.get((digest, key))
            if found is None:
                return None
            self._entries.move_to_end((digest, key))
        return found.copy()

    def holds(self, digest: str, key: Hashable) -> bool:
        """Whether `get` would find something; the entry counts as used."""
        with self._lock:
            if (digest, key) not in self._entries:
                return False
            self._entries.move_to_end((digest, key))
            return True

    def put(self, digest: str, key: Hashable, said: Said) -> None:
        """Keeps a copy; what is larger than the whole cache is not kept."""
        size = said.size_bytes
        if size > self.limit_bytes:
            return
        kept = said.copy()
        with self._lock:
            self._remove((digest, key))
            self._entries[digest, key] = kept
            self._size_bytes += size
            while self._size_bytes > self.limit_bytes:
                self._remove(next(iter(self._entries)))

    def claim(self, name: str, digest: str) -> None:
        """The bridge `name` has the content `digest` now."""
        with self._lock:
            old = self._digests.get(name)
            self._digests[name] = digest
            if old is not None and old not in self._digests.values():
                for entry in [entry for entry in self._entries if entry[0] == old]:
                    self._remove(entry)

    def clear(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._entries.clear()
            self._digests.clear()
            self._size_bytes = 0

    def _remove(self, entry: tuple[str, Hashable]) -> None:
        said = self._entries.pop(entry, None)
        if said is not None:
            self._size_bytes -= said.size_bytes


EMBEDDINGS = EmbeddingCache()
"""The cache of this process."""


def _clone(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.clone()

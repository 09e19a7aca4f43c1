"""Reads the program inside a pickle without running it, and refuses all that plain tensors do not need.

A pickle is a program for a small stack machine. Here it is followed with stand-ins: nothing is called, made
or looked up. So it is known before torch opens the file what it would mention and call, with which arguments,
and which stored numbers it asks for. The instructions are listed by pickletools of the standard library.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

MOST_INSTRUCTIONS = 1_000_000
"""A whole checkpoint with its optimizer has a tenth of that."""

STORAGES: Mapping[str, int] = {
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Double": 8,
    "Long": 8,
    "Int": 4,
    "Short": 2,
    "Char": 1,
    "Byte": 1,
    "Bool": 1,
}
"""Kinds of stored numbers that torch names, and their bytes."""
NUMBERS = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
CHECKPOINT_CALLBACK = "pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"
UNTYPED = "torch.storage UntypedStorage"

_STORED = {f"torch {name}Storage": size for name, size in STORAGES.items()} | {UNTYPED: 1}
_CALLED = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        "torch Size",
        "torch device",
    }
)
ALLOWED_GLOBALS = frozenset(
    {*_CALLED, *_STORED, " ".join(CHECKPOINT_CALLBACK), *(f"torch {name}" for name in NUMBERS)}
)
"""What a program may mention, as "module name"; torch knows more, weights need no more."""

_LARGEST_KEY = 1 << 31


class OddProgram(ValueError):
    """A program that does, or asks for, more than plain tensors need; the text says what."""


@dataclass(frozen=True)
class _Stand:
    """What stands for a value: its sort, and the value itself where it is a text, a number or a tuple."""

    sort: str
    value: object = None


_OTHER = _Stand("other")
_DICT, _LIST, _ORDERED = _Stand("dict"), _Stand("list"), _Stand("ordered")
_STORAGE, _TENSOR = _Stand("storage"), _Stand("tensor")


class _Machine:
    """The stack, the marks on it and the memo; `sizes`: bytes of each stored record by its name."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._stack: list[_Stand] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Stand] = {}

    def step(self, name: str, argument: object) -> None:
        """Follow one instruction."""
        action = _ACTIONS.get(name)
        if action is None:
            raise OddProgram(f"the pickle instruction {name}")
        action(self, argument)

    @property
    def done(self) -> bool:
        """Whether one value is left, as at the end of a whole program."""
        return len(self._stack) == 1 and not self._marks

    # What instructions do; each takes the argument that stands behind it.

    def nothing(self, _: object) -> None:
        """No value."""

    def protocol(self, argument: object) -> None:
        """The protocol: torch.save has 2, or 3 on demand; later ones have other instructions."""
        if argument not in (2, 3):
            raise OddProgram(f"pickle protocol {argument}")

    def other(self, _: object) -> None:
        """A value that is of no interest."""
        self._stack.append(_OTHER)

    def text(self, argument: object) -> None:
        """A text."""
        self._stack.append(_Stand("text", argument))

    def number(self, argument: object) -> None:
        """A whole number."""
        self._stack.append(_Stand("number", argument))

    def empty_dict(self, _: object) -> None:
        """{}"""
        self._stack.append(_DICT)

    def empty_list(self, _: object) -> None:
        """[]"""
        self._stack.append(_LIST)

    def mark(self, _: object) -> None:
        """A mark on the stack."""
        self._marks.append(len(self._stack))

    def mention(self, argument: object) -> None:
        """A name out of a module."""
        if argument not in ALLOWED_GLOBALS:
            raise OddProgram(f"a mention of {str(argument).replace(' ', '.')[:120]}")
        self._stack.append(_Stand("global", argument))

    def tuple_of(self, count: int) -> None:
        """The last `count` values as a tuple."""
        items = self._take(count)
        self._stack.append(_Stand("tuple", tuple(items) if count <= 8 else None))

    def tuple_to_mark(self, _: object) -> None:
        """All values above the mark as a tuple."""
        self.tuple_of(self._above())

    def append(self, _: object) -> None:
        """One value into a list."""
        self._take(1)
        self._require(_LIST)

    def append_to_mark(self, _: object) -> None:
        """All values above the mark into a list."""
        self._take(self._above())
        self._require(_LIST)

    def put(self, _: object) -> None:
        """One key with its value into a dict."""
        self._pairs(self._take(2))

    def put_to_mark(self, _: object) -> None:
        """Keys with values above the mark into a dict."""
        self._pairs(self._take(self._above()))

    def call(self, _: object) -> None:
        """A name with its arguments."""
        callee, arguments = self._take(2)
        given = cast("tuple[_Stand, ...] | None", arguments.value if arguments.sort == "tuple" else None)
        name = str(callee.value)
        if callee.sort != "global" or name not in _CALLED:
            raise OddProgram(f"a call of {name.replace(' ', '.')[:120]}")
        sorts = None if given is None else [item.sort for item in given]
        if sorts is None or not _fits(name, sorts):
            raise OddProgram(f"a call of {name.replace(' ', '.')} with {str(sorts)[:120]}")
        self._stack.append(_MADE[name])

    def build(self, _: object) -> None:
        """Attributes of a value: an OrderedDict may have some (`_metadata` of a state dict)."""
        (state,) = self._take(1)
        self._require(_ORDERED)
        if state.sort not in ("dict", "ordered"):
            raise OddProgram(f"attributes out of a {state.sort}")

    def stored(self, _: object) -> None:
        """Stored numbers, by what torch writes of them: kind, name of the record, device, how many."""
        (asked,) = self._take(1)
        given = cast("tuple[_Stand, ...]", asked.value if asked.sort == "tuple" else None) or ()
        if [item.sort for item in given] != ["text", "global", "text", "text", "number"]:
            raise OddProgram("stored numbers that are named in another way than torch's")
        word, kind, key, _device, count = (item.value for item in given)
        item_bytes = _STORED.get(str(kind))
        there = self._sizes.get(str(key))
        if word != "storage" or item_bytes is None or there is None:
            raise OddProgram(f"stored numbers {str(key)!r:.40} of {str(kind)!r:.60}, which are not there")
        if cast(int, count) * item_bytes != there:
            raise OddProgram(f"{count} numbers of {item_bytes} bytes where {there} bytes are stored")
        self._stack.append(_STORAGE)

    def remember(self, argument: object) -> None:
        """The last value into the memo."""
        self._memo[cast(int, argument)] = self._last()

    def recall(self, argument: object) -> None:
        """A value of the memo."""
        found = self._memo.get(cast(int, argument))
        if found is None:
            raise OddProgram("a value that was never kept")
        self._stack.append(found)

    # -- the stack

    def _take(self, count: int) -> list[_Stand]:
        floor = self._marks[-1] if self._marks else 0
        if count < 0 or len(self._stack) - count < floor:
            raise OddProgram("an instruction without its values")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _above(self) -> int:
        """How many values stand above the last mark, which is taken away."""
        if not self._marks:
            raise OddProgram("an instruction without its mark")
        return len(self._stack) - self._marks.pop()

    def _last(self) -> _Stand:
        if not self._stack or (self._marks and len(self._stack) <= self._marks[-1]):
            raise OddProgram("an instruction without its value")
        return self._stack[-1]

    def _require(self, *sorts: _Stand) -> None:
        if self._last() not in sorts:
            raise OddProgram(f"values put into a {self._last().sort}")

    def _pairs(self, items: list[_Stand]) -> None:
        self._require(_DICT, _ORDERED)
        if len(items) % 2:
            raise OddProgram("a key without its value")
        for key in items[::2]:
            # Numbers and tuples can be made to collide by the thousand, or to take for ever to look up.
            small = key.sort == "number" and 0 <= cast(int, key.value) < _LARGEST_KEY
            if not small and key.sort not in ("text", "global"):
                raise OddProgram(f"a {key.sort} as a name in a dict")


def _fits(name: str, sorts: list[str]) -> bool:
    """Whether a call has the arguments that torch.save writes."""
    match name.rpartition(" ")[2]:
        case "OrderedDict":
            return not sorts
        case "_rebuild_tensor":
            return sorts == ["storage", "number", "tuple", "tuple"]
        case "_rebuild_tensor_v2":
            hooks = len(sorts) == 6 and sorts[5] in ("ordered", "other")
            return hooks and sorts[:5] == ["storage", "number", "tuple", "tuple", "other"]
        case "_rebuild_parameter":
            hooks = len(sorts) == 3 and sorts[2] in ("ordered", "other")
            return hooks and sorts[:2] == ["tensor", "other"]
        case "Size":
            return sorts == ["tuple"]
        case _:
            return sorts in (["text"], ["text", "number"])


_MADE: Mapping[str, _Stand] = {
    "collections OrderedDict": _ORDERED,
    "torch._utils _rebuild_tensor": _TENSOR,
    "torch._utils _rebuild_tensor_v2": _TENSOR,
    "torch._utils _rebuild_parameter": _TENSOR,
    "torch Size": _OTHER,
    "torch device": _OTHER,
}

_ACTIONS: Mapping[str, Callable[[_Machine, object], None]] = {
    "PROTO": _Machine.protocol,
    "STOP": _Machine.nothing,
    "NONE": _Machine.other,
    "NEWTRUE": _Machine.other,
    "NEWFALSE": _Machine.other,
    "BINFLOAT": _Machine.other,
    "BININT": _Machine.number,
    "BININT1": _Machine.number,
    "BININT2": _Machine.number,
    "LONG1": _Machine.number,
    "BINUNICODE": _Machine.text,
    "SHORT_BINSTRING": _Machine.text,
    "EMPTY_DICT": _Machine.empty_dict,
    "EMPTY_LIST": _Machine.empty_list,
    "EMPTY_TUPLE": lambda machine, _: machine.tuple_of(0),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "TUPLE": _Machine.tuple_to_mark,
    "MARK": _Machine.mark,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.append_to_mark,
    "SETITEM": _Machine.put,
    "SETITEMS": _Machine.put_to_mark,
    "GLOBAL": _Machine.mention,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.stored,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
}


def check_program(program: bytes, sizes: Mapping[str, int]) -> None:
    """Follow a program to its end; `sizes`: bytes of each stored record by its name ("0", "1", ...).

    Raises:
        OddProgram: it does more than plain tensors need, asks for numbers that are not stored, or is damaged.
    """
    machine, last = _Machine(sizes), -1
    try:
        for count, (opcode, argument, place) in enumerate(pickletools.genops(program)):
            if count >= MOST_INSTRUCTIONS:
                raise OddProgram(f"more than {MOST_INSTRUCTIONS} pickle instructions")
            machine.step(opcode.name, argument)
            last = -1 if place is None else place
    except OddProgram:
        raise
    except Exception as error:  # whatever a damaged program makes of it
        raise OddProgram(f"{type(error).__name__}: {error!s:.120}") from error
    if last != len(program) - 1 or not machine.done:
        raise OddProgram("a program with something left over at its end")

"""Hostile pickles and torch archives, written instruction by instruction, each with what has to become of it.

`runs` says that the program would run something: it makes the canary, a file, when Python's own loader reads
it. That is tried, as a control, before the door is. A phrase is part of the refusal; "" = accepted.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

ROOT = "archive"
STOP = b"."
START = b"\x80\x02"
SIXTEEN = struct.pack("<4f", 1, 2, 3, 4)


@dataclass(frozen=True)
class Hostile:
    """One file: name in the report, bytes, a phrase of the refusal, whether it runs, the file's ending."""

    name: str
    data: bytes
    phrase: str
    runs: bool = False
    ending: str = ".bin"


# -- instructions ----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def many(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(module: str, attribute: str, *arguments: bytes) -> bytes:
    return name(module, attribute) + many(*arguments) + b"R"


def stored(count: int = 4, kind: str = "FloatStorage", key: str = "0", word: str = "storage") -> bytes:
    return many(text(word), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    storage: bytes | None = None, first: int = 0, size: tuple[int, ...] = (4,), steps: tuple[int, ...] = (1,)
) -> bytes:
    shape, strides = many(*map(number, size)), many(*map(number, steps))
    hooks = name("collections", "OrderedDict") + b")R"
    return call(
        "torch._utils",
        "_rebuild_tensor_v2",
        stored() if storage is None else storage,
        number(first),
        shape,
        strides,
        b"\x89",
        hooks,
    )


def table(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def program(value: bytes) -> bytes:
    return START + value + STOP


def weights(value: bytes, beside: bytes = b"") -> bytes:
    """A program with one tensor under a good name, or with something else in its place."""
    pairs = [(text("fc.weight"), value)] + ([(text("x"), beside)] if beside else [])
    return program(table(*pairs))


# -- archives --------------------------------------------------------------------------------------------


def archive(
    code: bytes,
    data: Mapping[str, bytes] | None = None,
    *,
    root: str = ROOT,
    packing: int = zipfile.ZIP_STORED,
    more: tuple[tuple[str, bytes], ...] = (),
) -> bytes:
    """A zip as torch.save writes it; `more`: further members."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", packing) as made:
        made.writestr(f"{root}/data.pkl", code)
        made.writestr(f"{root}/byteorder", "little")
        for key, content in ({"0": SIXTEEN} if data is None else data).items():
            made.writestr(f"{root}/data/{key}", content)
        made.writestr(f"{root}/version", "3\n")
        for member, content in more:
            made.writestr(member, content)
    return written.getvalue()


def saved(value: object, **keywords: object) -> bytes:
    """What torch.save makes of a value."""
    written = io.BytesIO()
    torch.save(value, written, **keywords)
    return written.getvalue()


class Does:
    """Something that calls `function` when Python's own loader reads it."""

    def __init__(self, function: object, *arguments: object) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self._call


def legacy_tar() -> bytes:
    """The tar format of torch before 0.1.10."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as made:
        for member in ("sys_info", "pickle", "storages", "tensors"):
            made.addfile(tarfile.TarInfo(member), io.BytesIO(b""))
    return written.getvalue()


def nested_tuples(levels: int) -> bytes:
    """A tuple of tuples, each twice the last one: small here, without end where it is hashed or printed."""
    code = b")q\x00"
    for level in range(levels):
        code += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return code


def nested_lists(levels: int) -> bytes:
    code = b"]q\x00"
    for level in range(levels):
        code += b"](" + (b"h" + bytes([level])) * 10 + b"eq" + bytes([level + 1])
    return code


def patched(data: bytes, old: bytes, new: bytes, count: int = -1) -> bytes:
    assert old in data and len(old) == len(new)
    return data.replace(old, new, count)


def with_sizes(data: bytes, size: int) -> bytes:
    """An archive whose directory says of every member that it has so many bytes."""
    changed = bytearray(data)
    place = changed.find(b"PK\x01\x02")
    while place >= 0:
        struct.pack_into("<II", changed, place + 20, size, size)
        place = changed.find(b"PK\x01\x02", place + 4)
    return bytes(changed)


def hostile(canary: Path) -> list[Hostile]:
    """Every case; those that run make the file `canary`."""
    made = str(canary)
    python = f"open({made!r}, 'w').close()"
    run = call("builtins", "exec", text(python))
    shell = call("os", "system", text(f"echo run > '{made}'"))
    look_up = call("builtins", "getattr", name("os", "path"), text("os"))
    good = weights(tensor())
    whole = archive(good)
    deep = table((text("fc.weight"), tensor()), (text("x"), b"]" * 3000 + b"a" * 2999))
    state = safetensors.torch.save({"fc.weight": torch.ones(4)})
    os_of = call("builtins", "getattr", look_up, text("system"))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"{ROOT}/data.pkl", good)
        packed.writestr(f"{ROOT}/data/0", bytes(64 << 20))
        packed.writestr(f"{ROOT}/version", "3\n")

    def runs(title: str, value: bytes, phrase: str = "mention", *, at: str = "weight") -> Hostile:
        code = weights(value) if at == "weight" else weights(tensor(), value)
        return Hostile(title, archive(code), phrase, True)

    return [
        Hostile("whole", whole, ""),
        Hostile("whole, torch's own", saved({"fc.weight": torch.ones(4)}), ""),
        Hostile(
            "whole, under state_dict",
            archive(
                program(
                    table(
                        (text("state_dict"), table((text("a"), tensor()))),
                    )
                )
            ),
            "",
        ),
        # programs that run something
        runs("os.system", shell),
        runs("posix.system", call("posix", "system", text(f"echo run > '{made}'"))),
        runs("os.system beside the weights", call("os", "system", text(f"echo run > '{made}'")), at="beside"),
        runs("subprocess", call("subprocess", "getoutput", text(f"echo run > '{made}'"))),
        runs("builtins.exec", run),
        runs("builtins.eval", call("builtins", "eval", text(python))),
        runs("__builtin__ of Python 2", call("__builtin__", "eval", text(python))),
        runs("builtins.open", call("builtins", "open", text(made), text("w"))),
        runs(
            "pathlib.Path.touch by getattr",
            call("builtins", "getattr", call("pathlib", "Path", text(made)), text("touch")) + b")R",
        ),
        runs("a chain of getattr", os_of + many(text(f"echo run > '{made}'")) + b"R"),
        runs("runpy", call("runpy", "run_path", text(made + ".py"))),
        runs(
            "code.InteractiveInterpreter",
            call("builtins", "getattr", call("code", "InteractiveInterpreter"), text("runcode"))
            + many(call("builtins", "compile", text(python), text("x"), text("exec")))
            + b"R",
        ),
        runs("timeit", call("timeit", "timeit", text(python), text("pass"), name("time", "time"), number(1))),
        runs(
            "a function of torch that starts programs",
            call("torch.utils.collect_env", "run", text(f"echo run > '{made}'")),
        ),
        runs(
            "map",
            call("builtins", "list", call("builtins", "map", name("builtins", "exec"), many(text(python)))),
        ),
        runs(
            "operator.methodcaller",
            call("operator", "methodcaller", text("touch"))
            + many(call("pathlib", "Path", text(made)))
            + b"R",
        ),
        runs(
            "functools.partial", call("functools", "partial", name("builtins", "exec"), text(python)) + b")R"
        ),
        Hostile("in a key", archive(program(table((run, tensor())))), "mention", True),
        Hostile(
            "before the weights, thrown away",
            archive(START + run + b"0" + table((text("a"), tensor())) + STOP),
            "mention",
            True,
        ),
        Hostile(
            "after the weights, as attributes",
            archive(
                START + name("collections", "OrderedDict") + b")R" + table((text("x"), run)) + b"b" + STOP
            ),
            "mention",
            True,
        ),
        Hostile("in the arguments of a tensor", archive(weights(tensor(run))), "mention", True),
        Hostile(
            "in the place of a storage's name",
            archive(
                weights(
                    tensor(
                        many(text("storage"), name("torch", "FloatStorage"), run, text("cpu"), number(4))
                        + b"Q"
                    )
                )
            ),
            "mention",
            True,
        ),
        Hostile(
            "with INST",
            archive(weights(b"(" + text(python) + b"ibuiltins\nexec\n")),
            "instruction INST",
            True,
        ),
        Hostile(
            "with OBJ",
            archive(weights(b"(" + name("builtins", "exec") + text(python) + b"o")),
            "mention",
            True,
        ),
        Hostile(
            "with NEWOBJ",
            archive(weights(name("subprocess", "Popen") + many(text("true")) + b"\x81")),
            "mention",
        ),
        Hostile(
            "with STACK_GLOBAL",
            archive(
                b"\x80\x04"
                + table((text("a"), text("builtins") + text("exec") + b"\x93" + many(text(python)) + b"R"))
                + STOP
            ),
            "pickle protocol 4",
            True,
        ),
        Hostile(
            "with STACK_GLOBAL under protocol 2",
            archive(weights(text("builtins") + text("exec") + b"\x93" + many(text(python)) + b"R")),
            "instruction STACK_GLOBAL",
            True,
        ),
        Hostile("with EXT1", archive(weights(b"\x82\x01")), "instruction EXT1"),
        Hostile(
            "with GLOBAL behind a memo",
            archive(weights(name("builtins", "exec") + b"q\x05" + b"0h\x05" + many(text(python)) + b"R")),
            "mention",
            True,
        ),
        Hostile(
            "protocol 0", archive(pickle.dumps({"a": Does(exec, python)}, 0)), "pickle instruction", True
        ),
        Hostile("protocol 1", archive(pickle.dumps({"a": Does(exec, python)}, 1)), "mention", True),
        Hostile("protocol 3", archive(pickle.dumps({"a": Does(exec, python)}, 3)), "mention", True),
        Hostile("protocol 4", archive(pickle.dumps({"a": Does(exec, python)}, 4)), "pickle protocol", True),
        Hostile("protocol 5", archive(pickle.dumps({"a": Does(exec, python)}, 5)), "pickle protocol", True),
        Hostile(
            "protocol 5 with buffers outside",
            archive(b"\x80\x05" + table((text("a"), b"\x97")) + STOP),
            "pickle protocol 5",
        ),
        Hostile("protocol 255", archive(b"\x80\xff" + good[2:]), "protocol 255"),
        Hostile(
            "torch.save of a class",
            saved({"fc.weight": torch.ones(4), "args": Does(exec, python)}),
            "mention",
            True,
        ),
        # what runs nothing and is not plain
        Hostile("torch.load in a pickle", archive(weights(call("torch", "load", text(made)))), "torch.load"),
        Hostile(
            "torch.hub", archive(weights(call("torch.hub", "load", text("a/b"), text("c")))), "torch.hub.load"
        ),
        Hostile(
            "torch.storage._load_from_bytes",
            archive(weights(call("torch.storage", "_load_from_bytes", text("x")))),
            "_load_from_bytes",
        ),
        Hostile(
            "numpy arrays",
            archive(
                weights(
                    call(
                        "numpy.core.multiarray",
                        "_reconstruct",
                        name("numpy", "ndarray"),
                        many(number(0)),
                        text("b"),
                    )
                )
            ),
            "numpy",
        ),
        Hostile(
            "a numpy number",
            archive(weights(tensor(), call("numpy.core.multiarray", "scalar", text("x")))),
            "numpy",
        ),
        Hostile("bytearray", archive(weights(call("builtins", "bytearray", number(10**9)))), "bytearray"),
        Hostile(
            "bytes by codecs",
            archive(weights(call("_codecs", "encode", text("x"), text("latin1")))),
            "_codecs",
        ),
        Hostile("a sparse tensor", saved({"a": torch.ones(2, 2).to_sparse()}), "mention"),
        Hostile(
            "a quantised tensor",
            archive(weights(call("torch._utils", "_rebuild_qtensor"))),
            "_rebuild_qtensor",
        ),
        Hostile(
            "a meta tensor",
            archive(weights(call("torch._utils", "_rebuild_meta_tensor_no_storage"))),
            "mention",
        ),
        Hostile(
            "a subclass of a tensor",
            archive(weights(call("torch._tensor", "_rebuild_from_type_v2"))),
            "mention",
        ),
        Hostile("a dict's subclass", archive(program(call("collections", "defaultdict"))), "defaultdict"),
        Hostile("a Counter", archive(program(call("collections", "Counter"))), "Counter"),
        Hostile("a set", archive(weights(b"\x8f")), "instruction EMPTY_SET"),
        Hostile(
            "an OrderedDict that hides its methods",
            archive(
                START
                + name("collections", "OrderedDict")
                + b")R("
                + text("a")
                + tensor()
                + b"u"
                + table(
                    *[
                        (text(n), number(3))
                        for n in ("items", "get", "keys", "values", "__len__", "__class__")
                    ]
                )
                + b"b"
                + STOP
            ),
            "",
        ),
        Hostile(
            "an OrderedDict out of arguments",
            archive(program(call("collections", "OrderedDict", table()))),
            "a call of collections.OrderedDict",
        ),
        Hostile(
            "a call of a storage",
            archive(weights(tensor(), call("torch.storage", "UntypedStorage", number(2_000_000_000)))),
            "a call of torch.storage.UntypedStorage",
        ),
        Hostile(
            "a call of a kind of storage",
            archive(weights(tensor(), call("torch", "FloatStorage", number(1 << 30)))),
            "a call of torch.FloatStorage",
        ),
        Hostile(
            "a call of a dtype",
            archive(weights(tensor(), call("torch", "float32", number(1)))),
            "a call of torch.float32",
        ),
        Hostile("a call of what was called", archive(weights(tensor() + b")R")), "a call of"),
        Hostile(
            "attributes of a tensor",
            archive(weights(tensor() + table((text("data"), number(1))) + b"b")),
            "values put into a tensor",
        ),
        Hostile(
            "another storage put into a tensor",
            archive(weights(tensor() + many(stored(), number(0), many(number(2)), many(number(1))) + b"b")),
            "values put into a tensor",
        ),
        Hostile(
            "a parameter of nothing",
            archive(weights(call("torch._utils", "_rebuild_parameter", b"N", b"\x89", b"}"))),
            "a call of torch._utils._rebuild_parameter",
        ),
        Hostile(
            "a size of a list",
            archive(weights(tensor(), call("torch", "Size", b"]"))),
            "a call of torch.Size",
        ),
        # tensors that claim what is not there
        Hostile(
            "more numbers than are stored",
            archive(weights(tensor(stored(40), size=(40,)))),
            "40 numbers of 4 bytes where 16 bytes",
        ),
        Hostile(
            "fewer numbers than are stored",
            archive(weights(tensor(stored(2), size=(2,)))),
            "2 numbers of 4 bytes where 16 bytes",
        ),
        Hostile("a negative number of numbers", archive(weights(tensor(stored(-4)))), "-4 numbers"),
        Hostile(
            "two billion numbers",
            archive(weights(tensor(stored((1 << 31) - 1)))),
            "where 16 bytes are stored",
        ),
        Hostile(
            "wider numbers than are stored",
            archive(weights(tensor(stored(4, "DoubleStorage")))),
            "4 numbers of 8 bytes",
        ),
        Hostile(
            "a storage of complex numbers",
            archive(weights(tensor(stored(2, "ComplexFloatStorage")))),
            "mention",
        ),
        Hostile("a storage that is not there", archive(weights(tensor(stored(key="1")))), "not there"),
        Hostile("a storage by a path", archive(weights(tensor(stored(key="../data.pkl")))), "not there"),
        Hostile("a storage by another word", archive(weights(tensor(stored(word="module")))), "not there"),
        Hostile(
            "a storage of two fields",
            archive(weights(tensor(many(text("storage"), text("0")) + b"Q"))),
            "another way",
        ),
        Hostile("a storage that is a text", archive(weights(tensor(text("0") + b"Q"))), "another way"),
        Hostile("a storage by a line of text", archive(weights(tensor(b"P0\n"))), "instruction PERSID"),
        Hostile("a negative size", archive(weights(tensor(size=(-4,)))), "found:"),
        Hostile("negative steps", archive(weights(tensor(first=3, steps=(-1,)))), "found:"),
        Hostile("a negative beginning", archive(weights(tensor(first=-1))), "found:"),
        Hostile(
            "a size that overflows",
            archive(weights(tensor(size=((1 << 31) - 1,) * 3, steps=(0, 0, 0)))),
            "found:",
        ),
        Hostile(
            "10^12 numbers of one",
            archive(weights(tensor(size=(10**6, 10**6), steps=(0, 0)))),
            "bytes claimed",
        ),
        Hostile("a view past the end", archive(weights(tensor(first=2))), "found:"),
        Hostile("steps past the end", archive(weights(tensor(size=(2,), steps=(1 << 30,)))), "found:"),
        Hostile("fewer steps than sizes", archive(weights(tensor(size=(2, 2), steps=(1,)))), "found:"),
        Hostile("forty dimensions", archive(weights(tensor(size=(7,) * 40, steps=(0,) * 40))), "found:"),
        Hostile(
            "fifty names for one storage",
            archive(program(table(*[(text(f"a{n}"), tensor()) for n in range(50)])), {"0": SIXTEEN}),
            "",
        ),
        # names and what stands under them
        Hostile("a tensor under a number", archive(program(table((number(3), tensor())))), "called by a int"),
        Hostile("a tensor under a tuple", archive(program(table((b")", tensor())))), "a tuple as a name"),
        Hostile(
            "a tensor under a tensor", archive(program(table((tensor(), tensor())))), "a tensor as a name"
        ),
        Hostile("a tensor under nothing", archive(program(table((b"N", tensor())))), "a other as a name"),
        Hostile("a name with a path", archive(program(table((text("../x"), tensor())))), "called '../x'"),
        Hostile("a name with a NUL", archive(program(table((text("a\0b"), tensor())))), "called"),
        Hostile(
            "a name of a million letters",
            archive(program(table((text("a" * 1_000_000), tensor())))),
            "called 'aaa",
        ),
        Hostile(
            "a name with half of a letter", archive(program(table((text("\ud800"), tensor())))), "found:"
        ),
        Hostile(
            "names that collide",
            archive(program(table(*[(number((n << 20) % (1 << 31)), b"N") for n in range(2000)]))),
            "found:",
        ),
        Hostile("negative numbers as names", archive(program(table((number(-1), tensor())))), "as a name"),
        Hostile("a list", archive(program(b"](" + tensor() + b"e")), "a list"),
        Hostile("a tensor alone", archive(program(tensor())), "a Tensor"),
        Hostile("a text", archive(program(text("x"))), "a str"),
        Hostile("nothing", archive(program(b"N")), "a NoneType"),
        Hostile("an empty dict", archive(program(b"}")), "no tensors"),
        Hostile("a number under a name", archive(weights(number(3))), "'fc.weight' is a int"),
        Hostile(
            "huge numbers",
            archive(weights(b"\x8b" + struct.pack("<i", 200_000) + b"\x7f" * 200_000)),
            "instruction LONG4",
        ),
        Hostile("a number of digits", archive(weights(b"I" + b"9" * 10_000 + b"\n")), "found:"),
        # bombs
        Hostile(
            "tuples that double, as a name",
            archive(program(nested_tuples(60) + b"0" + table((b"h\x3c", tensor())))),
            "instruction POP",
        ),
        Hostile(
            "tuples that double, hashed", archive(program(table((nested_tuples(60), tensor())))), "found:"
        ),
        Hostile(
            "tuples that double, beside",
            archive(program(table((text("a"), tensor()), (text("b"), b"(" + nested_tuples(60) + b"t")))),
            "'b' is a tuple",
        ),
        Hostile(
            "lists that grow tenfold",
            archive(program(table((text("a"), tensor()), (text("b"), b"(" + nested_lists(60) + b"t")))),
            "'b' is a tuple",
        ),
        Hostile("a list in itself", archive(program(table((text("a"), b"]q\x00h\x00a")))), "'a' is a list"),
        Hostile("3,000 lists in each other", archive(program(deep)), "'x' is a list"),
        Hostile(
            "two million instructions",
            archive(START + b"}" + b"q\x00" * 2_000_000 + STOP),
            "more than 1000000",
        ),
        Hostile("a text that claims 4 GiB", archive(START + b"X\xff\xff\xff\xffabc"), "found:"),
        Hostile(
            "a text that claims 2^63",
            archive(START + b"\x8d" + struct.pack("<Q", 1 << 63) + b"abc"),
            "found:",
        ),
        Hostile("a memo far away", archive(weights(b"Nr\xff\xff\xff\xff")), "is a NoneType"),
        Hostile("a million marks", archive(START + b"(" * 900_000 + STOP), "left over"),
        Hostile("a bomb", bomb.getvalue(), "compressed"),
        Hostile("a packed program", archive(good, packing=zipfile.ZIP_DEFLATED), "compressed"),
        Hostile("packed with bzip2", archive(good, packing=zipfile.ZIP_BZIP2), "compressed"),
        Hostile("packed with LZMA", archive(good, packing=zipfile.ZIP_LZMA), "compressed"),
        # damaged programs
        Hostile("an empty program", archive(b""), "found:"),
        Hostile("no end", archive(good[:-1]), "found:"),
        Hostile("an end too early", archive(START + STOP), "left over"),
        Hostile("something behind the end", archive(good + good), "left over"),
        Hostile("nothing to take", archive(START + b"R" + STOP), "without its values"),
        Hostile("no mark", archive(START + b"}u" + STOP), "without its mark"),
        Hostile("taking over a mark", archive(START + b"}N(Ns" + STOP), "without its values"),
        Hostile("a memo that is empty", archive(START + b"h\x07" + STOP), "never kept"),
        Hostile("a key without a value", archive(START + b"}(Nu" + STOP), "without its value"),
        Hostile("an unknown instruction", archive(START + b"\xff" + STOP), "found:"),
        Hostile("a name without its module", archive(START + b"cos\n"), "found:"),
        # archives
        Hostile("another root", archive(good, root="x" * 40), ""),
        Hostile("a root of two dots", archive(good, root=".."), "members"),
        Hostile("a root that is a drive", archive(good, root="C:"), "members"),
        Hostile("an absolute root", archive(good, root="/archive"), "members"),
        Hostile("a root with a backslash", archive(good, root="..\\x"), "members"),
        Hostile("a member outside", archive(good, more=(("../evil.py", b"x"),)), "members"),
        Hostile("an absolute member", archive(good, more=(("/etc/passwd", b"x"),)), "members"),
        Hostile("a member of another root", archive(good, more=(("other/data/1", b"x"),)), "members"),
        Hostile("two programs", archive(good, more=((f"{ROOT}/DATA.PKL", good),)), "members"),
        Hostile("a second root with a program", archive(good, more=(("Archive/data.pkl", good),)), "members"),
        Hostile("TorchScript", archive(good, more=((f"{ROOT}/code/x.py", b"x"),)), "TorchScript"),
        Hostile("constants", archive(good, more=((f"{ROOT}/constants.pkl", b"x"),)), "TorchScript"),
        Hostile(
            "a member with a NUL",
            patched(archive(good, more=((f"{ROOT}/data/1#", b"x"),)), b"data/1#", b"data/1\0"),
            "found:",
        ),
        Hostile("no program", patched(whole, b"data.pkl", b"date.pkl"), "members"),
        Hostile("sizes that lie", with_sizes(whole, 1 << 20), "found:"),
        Hostile("sizes of 4 GiB", with_sizes(whole, 0xFFFFFFFF), "found:"),
        Hostile("a directory cut off", whole[:-60], "found:"),
        Hostile("bytes before it", b"#!/bin/sh\n" + whole, "no zip archive"),
        Hostile("bytes behind it", whole + b"\0", "found:"),
        Hostile("two archives", whole + whole, "found:"),
        Hostile("a comment behind it", whole[:-2] + b"\x03\0abc", "found:"),
        Hostile(
            "marked as locked",
            patched(whole, b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"),
            "found:",
        ),
        Hostile("an end mark with 65,535 members", whole[:-14] + b"\xff\xff\xff\xff" + whole[-10:], "found:"),
        # other formats under these names
        Hostile("a raw pickle", program(run), "no zip archive", True),
        Hostile("a raw pickle of a module", pickle.dumps(Does(exec, python)), "no zip archive", True),
        Hostile(
            "the format before torch 1.6",
            saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False),
            "no zip archive",
        ),
        Hostile("the tar of torch before 0.1.10", legacy_tar(), "no zip archive"),
        Hostile("safetensors called .bin", state, "no zip archive"),
        Hostile("safetensors called .ckpt", state, "no zip archive", ending=".ckpt"),
        Hostile("a pickle called .safetensors", whole, "damaged", ending=".safetensors"),
        Hostile("a raw pickle called .safetensors", program(run), "damaged", True, ".safetensors"),
        Hostile("an ending in capitals", whole, "", ending=".BIN"),
        Hostile("another ending", whole, "a file with the ending '.pkl'", ending=".pkl"),
        Hostile("empty", b"", "0 bytes"),
        Hostile(
            "a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"
        ),
        Hostile("a web page", b"<html>Sign in</html>" * 20, "a web page"),
    ]

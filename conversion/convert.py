"""Turns published weights into our own files: recognises what they hold, asks the table for the rest, writes.

What is in a file (family, kind, sizes) is read off its tensors by the families and the kinds themselves. What
it cannot say (which layer, window, language, base) comes from a row of the table. Nothing is guessed: when no
row or several rows fit, the answer is an error that lists them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..bridges.base import Bridge, BridgeSpec, create, kinds, parse_spec
from ..bridges.errors import BridgeError
from ..bridges.file import BRANCH, BridgeHeader, EncoderRef, read_header, save_bridge
from ..encoders import guard
from ..encoders.base import Encoder, EncoderSpec, create_encoder, families
from ..encoders.dual import join
from ..encoders.file import METADATA_KEY as ENCODER_METADATA_KEY
from ..encoders.file import EncoderHeader, pack_encoder, read_encoder_header
from . import VERSION
from . import unet as unets
from .containers import SAFETENSORS, Part, Source, Weights, open_sources, provenance
from .presets import VOCABULARIES, MethodRow, Presets, TowerRow, published

Spec = TypeVar("Spec", EncoderSpec, BridgeSpec)

PROVENANCE_KEY = "language_bridge_conversion"
"""Metadata key of a converted tower, JSON; a converted bridge has the same under training["conversion"]."""
UNET_CHOICES = ("auto", "none", *unets.PARTS)
TOWER_ENDING = "-tower"

_BESIDE = (r"model\.diffusion_model\.", r"model_ema\.", r"first_stage_model\.")
"""Of a whole checkpoint: what is no text encoder and no bridge."""
_AROUND = re.compile(
    "|".join(
        (
            *(f"{place}.*" for place in _BESIDE),
            # other halves and heads of published text encoders, and buffers without content
            r"(.*\.)?(position_ids|token_type_ids|logit_scale|logit_bias|query_tokens)",
            r"(.*\.)?(inv_freq|rotary_emb\..*)",
            r"(.*\.)?(pooler|cls|lm_head|classifier|itm_head)\..*",
            r"(.*\.)?(visual|vision_model|visual_projection|clip_projector2?)\..*",
            r"(.*\.)?text_projection(\.weight)?",
            r"(text\.proj|(model\.)?decoder)\..*",
            r"encoder\.embed_tokens\.weight",  # T5's second name of `shared`
            r"qllama\..*\.cross_attn\..*",  # reads pictures in InternVL
            # the noise schedule of Lightning checkpoints
            r"(betas|alphas_cumprod(_prev)?|(sqrt|log)_\w+|posterior_\w+|lvlb_weights|logvar|scale_factor)",
        )
    )
)
_OTHER_HEADS = re.compile(r"(.*\.)?(transformation|pre_LN)\..*")
_MOST_PREFIXES = 3


@dataclass(frozen=True, eq=False)
class _Found:
    """What one part of the source holds, as class and spec; `prefix` stands before the bridge's names."""

    part: Part
    tower: tuple[type[Encoder], EncoderSpec] | None = None
    bridge: tuple[type[Bridge], BridgeSpec] | None = None
    prefix: str = ""
    unet: bool = False


@dataclass(frozen=True, eq=False)
class _Contents:
    """What the source holds: at most one bridge and one U-Net, and at most the two towers of a dual one.

    files: names of the tokenizer files that were named alone.
    """

    towers: tuple[_Found, ...]
    bridge: _Found | None
    unet: _Found | None
    files: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Choice:
    """The rows that were settled on: a method and the tower it reads, or a tower alone.

    parts: what holds the tower, its first half first where it has two; empty when it is not among the files.
    """

    method: MethodRow | None
    tower: TowerRow
    parts: tuple[_Found, ...] = ()


def convert(
    paths: Sequence[Path],
    out: Path,
    *,
    towers: Path | None = None,
    preset: str | None = None,
    reference: Path | None = None,
    unet: str = "auto",
    form: str = "replace",
    name: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    presets: Presets | None = None,
    between: Callable[[], None] | None = None,
) -> list[Path]:
    """Convert published files that belong together, and return the files that were written.

    paths: weight files, model folders, and single tokenizer files or config.json by their own names.
    out: folder for the bridge; towers: folder for the text tower (None = out). preset: the row of the table
    to follow (None = the only one that fits). reference: the checkpoint that the U-Net was trained from.
    unet: "auto" (what the method asks for), "none", "kv", "attn2" or "full"; form: "replace" or "delta".
    name: of the bridge file (None = the preset's). dtype: of the numbers written (None = as published).
    between: called between steps; what it raises ends the conversion, and nothing is written.

    BridgeError, and nothing is written, when a file is odd, unknown, claimed twice, or of several readings,
    when the U-Net is not as the method promises, or a file of that name is there and `overwrite` is not set.
    """
    if unet not in UNET_CHOICES or form not in unets.FORMS:
        guard.one_of(unet, UNET_CHOICES, "U-Net part", "conversion")
        guard.one_of(form, unets.FORMS, "form of the U-Net part", "conversion")
    step = between or _nothing_between
    table = published() if presets is None else presets
    source = open_sources(list(paths))
    contents = _contents(source)
    facts = provenance(source.paths, step)
    choice = _choose(contents, table, preset, {str(fact["sha256"]) for fact in facts})
    writes_bridge = choice.method is not None and (
        contents.bridge is not None or choice.method.kind == "identity"
    )
    target = out / f"{_file_name(name or (choice.method or choice.tower).name)}{SAFETENSORS}"
    if writes_bridge:
        _require_free(target, overwrite)
    if not contents.towers and not writes_bridge:
        raise _nothing(contents, choice)

    record: dict[str, object] = {
        "by": f"Language Bridge {VERSION}",
        "preset": (choice.method or choice.tower).name,
        "files": facts,
        "recognised": _recognised(contents),
        "about": (choice.method or choice.tower).about,
    }
    bridge: Bridge | None = None
    extra: dict[str, Tensor] = {}
    if writes_bridge:
        bridge, extra = _build_bridge(contents.bridge, cast(MethodRow, choice.method), dtype)
    training: dict[str, object] = {}
    beside = bridge is not None and bridge.beside
    if beside and unet != "auto":
        raise BridgeError(
            "A branch is a network of its own: no part of a U-Net is taken or left out.",
            f"U-Net part {unet}",
            "U-Net part auto",
            "Convert it without naming a U-Net part.",
        )
    if extra and unet != "full" and not beside:
        _require_left_out(extra, unet)
        training, extra = {"unet_complete": False}, {}
    part = None
    if not extra:
        part, said = _unet_part(contents, choice.method, reference, unet, form, record)
        training |= said
    tower = _build_tower(choice, table, source, dtype) if choice.parts else None
    with _Staging() as staging:
        step()
        digest = ""
        if tower is not None:
            place = (towers or out) / f"{_file_name(choice.tower.name)}{TOWER_ENDING}{SAFETENSORS}"
            digest = _write_tower(staging, place, tower, choice.tower, record, overwrite)
        step()
        if bridge is not None:
            method = cast(MethodRow, choice.method)
            training |= {"template": dict(method.template)} if method.template else {}
            tensors = extra or dict(part.tensors if part else {})
            header = BridgeHeader(
                kind=bridge.kind,
                spec=dataclasses.asdict(bridge.spec),
                base=method.base,
                encoder=_reference(choice.tower, digest),
                languages=method.languages,
                unet=part.part if part else (BRANCH if beside else "full") if extra else "none",
                training=training
                | ({"unet": "replace"} if extra and not beside else {})
                | {"conversion": record},
                licence=method.licence,
                source=method.source,
                name=target.stem,
            )
            if dtype is not None:
                tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            save_bridge(staging.file(target), header, bridge, unet=tensors)
        step()
        return staging.publish()


def _nothing_between() -> None:
    pass


def report(written: Sequence[Path]) -> list[str]:
    """Lines for people: what each written file is, and what its user must know."""
    lines: list[str] = []
    for path in written:
        header = read_header(path)
        if header is None:
            tower = cast(EncoderHeader, read_encoder_header(path))
            lines += [
                f"text tower {path}",
                f"  {tower.identity}: family {tower.family}, window {tower.window}, layer {tower.layer}",
            ]
            continue
        record = cast("dict[str, object]", header.training.get("conversion", {}))
        moved = cast("list[str]", cast("dict[str, object]", record.get("unet", {})).get("moved_besides", []))
        lines += [
            f"bridge {path}",
            f"  kind {header.kind} for {header.base}, reads {header.encoder.identity}",
        ]
        lines += [f"  {record['about']}"] if record.get("about") else []
        if not header.encoder.digest:
            lines.append(f"  Its text tower {header.encoder.identity!r} was not among the files.")
        if header.training.get("unet") == "own":
            lines.append("  It works only with the checkpoint that the method was published with.")
        elif header.unet == BRANCH:
            lines.append("  It is a branch: a network beside the U-Net, which stays as it is.")
        elif header.unet != "none":
            lines.append(f"  It carries {header.unet} of the U-Net ({header.training.get('unet')}).")
        if moved:
            lines.append(
                f"  NOT the whole method: {len(moved)} other U-Net tensors moved too: {moved[0]} ..."
            )
    return lines


# -- what is there ------------------------------------------------------------------------------------


def _contents(source: Source) -> _Contents:
    found = [_look(part, source.config) for part in source.parts]
    if not found:
        raise BridgeError(
            "There are no weights among the files.",
            ", ".join(path.name for path in source.paths[:8]) or "nothing",
            "a weight file or a model folder, besides tokenizer files",
            "Name the file or folder that holds the weights too.",
        )
    towers = [item for item in found if item.tower is not None]
    if len(towers) > 2:
        raise _several("text towers", towers)
    bridge, unet = (
        _only(noun, [item for item in found if getattr(item, attribute)])
        for noun, attribute in (("bridges", "bridge"), ("U-Nets", "unet"))
    )
    for item in found:
        if item.tower is not None or item.bridge is not None:
            _require_known(item)
    return _Contents(tuple(towers), bridge, unet, frozenset(source.files))


def _only(noun: str, found: list[_Found]) -> _Found | None:
    if len(found) > 1:
        raise _several(noun, found)
    return found[0] if found else None


def _several(noun: str, found: Sequence[_Found]) -> BridgeError:
    return BridgeError(
        f"There are several {noun} among the files.",
        ", ".join(item.part.name for item in found),
        "one of each",
        "Convert them one after the other.",
    )


def _look(part: Part, config: Mapping[str, object]) -> _Found:
    """Ask every family and every kind; at most one of each may claim the part."""
    shapes = part.weights.shapes
    has_unet = unets.is_unet(shapes)
    beside = re.compile("|".join(_BESIDE))
    rest = {key: shape for key, shape in shapes.items() if not beside.match(key)}
    if has_unet and len(rest) == len(shapes):
        return _Found(part, unet=True)  # a diffusers U-Net holds nothing else
    if _is_ours(rest):
        raise BridgeError(
            f"{part.name!r} was saved by Language Bridge already.",
            "a file of our own format",
            "published weights",
            "Use it as it is: bridges in models/language_bridges, towers in models/text_encoders.",
        )
    towers = [
        (family, spec)
        for family in families().values()
        if (spec := family.recognise(rest, part.config or config)) is not None
    ]
    for family, spec in towers[:1]:  # a head that is the tower's own is no bridge
        origins = family.origins(spec, rest)
        own = {origins[key].name for key in family.own_shapes(spec)}
        rest = {
            key: shape for key, shape in rest.items() if key not in own or not _OTHER_HEADS.fullmatch(key)
        }
    bridges: list[tuple[type[Bridge], BridgeSpec]] = []
    prefix = ""
    for _ in range(_MOST_PREFIXES):
        inside = {key[len(prefix) :]: shape for key, shape in rest.items()}
        bridges = [(kind, spec) for kind in kinds().values() if (spec := kind.recognise(inside)) is not None]
        firsts = {key.partition(".")[0] for key in inside}
        if bridges or len(firsts) != 1 or any("." not in key for key in inside):
            break
        prefix += f"{firsts.pop()}."
    prefix = prefix if bridges else ""
    for noun, claims in (
        ("families of towers", [family.family for family, _ in towers]),
        ("kinds of bridge", [kind.kind for kind, _ in bridges]),
    ):
        if len(claims) > 1:
            raise _unclear(part, f"claimed by the {noun} {', '.join(claims)}")
    if not towers and not bridges and not has_unet:
        raise _unclear(part, "claimed by nobody")
    return _Found(part, towers[0] if towers else None, bridges[0] if bridges else None, prefix, unet=has_unet)


def _is_ours(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(key == "tokenizer" or key.startswith(("bridge.", "encoder.", "unet.")) for key in shapes) and (
        "tokenizer" in shapes or all(not key.startswith("encoder.") for key in shapes)
    )


def _unclear(part: Part, found: str) -> BridgeError:
    shapes = part.weights.shapes
    seen = ", ".join(f"{key} {list(shape)}" for key, shape in sorted(shapes.items())[:8])
    return BridgeError(
        f"{part.name!r} does not look like one published text tower, bridge or checkpoint.",
        f"{found}; {len(shapes)} tensors: {seen}",
        f"the layout of one family ({', '.join(families())}) or kind ({', '.join(kinds())})",
        "Check that this is the file that the method's page means, and that Language Bridge is up to date.",
    )


def _require_known(found: _Found) -> None:
    """Refuse tensors that belong to nothing: what a file holds besides could change what it means."""
    shapes = found.part.weights.shapes
    taken: set[str] = set()
    if found.tower is not None:
        family, spec = found.tower
        origins = family.origins(spec, shapes)
        taken |= {origins[key].name for key in family.own_shapes(spec)}
    if found.bridge is not None:
        kind, _ = found.bridge
        inside = {key[len(found.prefix) :]: key for key in shapes if key.startswith(found.prefix)}
        taken |= set(kind.part(inside).values())
        taken |= {inside[key] for key in _unet_keys(kind, inside, shapes)}
    unknown = sorted(
        key
        for key in shapes
        if key not in taken
        and not _AROUND.fullmatch(key)
        and not (found.bridge is not None and _OTHER_HEADS.fullmatch(key))
    )
    if unknown:
        raise BridgeError(
            f"{found.part.name!r} holds tensors that belong to nothing known.",
            f"{len(unknown)}: " + ", ".join(f"{key} {list(shapes[key])}" for key in unknown[:8]),
            f"a {_noun(found)} and what is usually published around it",
            "The model was changed by somebody, or is newer than this version. Use the original file.",
        )


def _noun(found: _Found) -> str:
    names = [found.tower and found.tower[0].family, found.bridge and found.bridge[0].kind]
    return " and ".join(name for name in [*names, "U-Net" if found.unet else None] if name)


def _unet_keys(
    kind: type[Bridge], inside: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> set[str]:
    marks = {key: torch.empty(shapes[full], device="meta") for key, full in inside.items()}
    chosen = {id(tensor) for tensor in kind.unet_part(marks).values()}
    return {key for key, mark in marks.items() if id(mark) in chosen}


def _recognised(contents: _Contents) -> dict[str, object]:
    found: dict[str, object] = {}
    towers = [_sizes(item) for item in contents.towers]
    if towers:
        found |= {"tower": towers[0]} if len(towers) == 1 else {"towers": towers}
    if contents.bridge is not None and contents.bridge.bridge is not None:
        kind, bridge_spec = contents.bridge.bridge
        found["bridge"] = {"kind": kind.kind, **dataclasses.asdict(bridge_spec)}
    if contents.unet is not None:
        found["unet"] = contents.unet.part.name
    return found


def _sizes(found: _Found) -> dict[str, object]:
    family, spec = cast("tuple[type[Encoder], EncoderSpec]", found.tower)
    return {"family": family.family, **dataclasses.asdict(spec)}


# -- which row ----------------------------------------------------------------------------------------


def _choose(contents: _Contents, table: Presets, wanted: str | None, hashes: set[str]) -> _Choice:
    choices = _fitting(contents, table)
    if wanted is not None:
        named = [item for item in choices if wanted == (item.method or item.tower).name]
        if not named and wanted in table.methods and contents.bridge is None:
            # The tower of a method whose bridge is published elsewhere.
            row = table.tower_of(table.methods[wanted])
            named = [item for item in choices if item.tower == row and item.method is None]
        if named:
            return named[0]
        _require_pair(contents, table, wanted)
        raise BridgeError(
            f"The files are not what the table calls {wanted!r}.",
            json.dumps(_recognised(contents))
            if wanted in {*table.methods, *table.towers}
            else "no such name",
            f"one of {_names(choices)}" if choices else "a name of the table",
            "Choose one of those names, or look at the list of the table (install.py convert --list).",
        )
    pinned = [item for item in choices if _pins(item) & hashes]
    if pinned:
        choices = pinned
    methods = [item for item in choices if item.method is not None]
    # A tower that a fitting method reads is not a reading of its own.
    read = {item.tower.name for item in methods}
    choices = methods + [item for item in choices if item.method is None and item.tower.name not in read]
    if len(choices) == 1:
        return choices[0]
    if choices:
        raise BridgeError(
            "Several published models look like these files.",
            _names(choices),
            "one of them; the files do not say which",
            "Choose by the name of the model you downloaded: --as NAME, or the preset of the node.",
        )
    _require_pair(contents, table, None)
    raise BridgeError(
        "The table of published models has no row for these files.",
        json.dumps(_recognised(contents)),
        "sizes of a published model",
        "Write a row with its layer, window, base and languages into a table of your own (--presets FILE).",
    )


def _fitting(contents: _Contents, table: Presets) -> list[_Choice]:
    """Every row that the contents fit, methods first."""
    fits = {row.name: parts for row in table.towers.values() if (parts := _holders(row, contents, table))}
    choices: list[_Choice] = []
    for method in table.methods.values():
        row = table.tower_of(method)
        if contents.towers and row.name not in fits:
            continue
        if contents.bridge is not None and contents.bridge.bridge is not None:
            kind, bridge_spec = contents.bridge.bridge
            if method.fits(kind.kind, bridge_spec):
                choices.append(_Choice(method, row, fits.get(row.name, ())))
        elif contents.towers and method.kind == "identity":
            choices.append(_Choice(method, row, fits[row.name]))
    if contents.bridge is None:
        choices += [_Choice(None, table.towers[name], parts) for name, parts in fits.items()]
    return choices


def _holders(row: TowerRow, contents: _Contents, table: Presets) -> tuple[_Found, ...]:
    """The parts that hold this tower, its first half first; empty when they do not, or hold more."""
    if not row.halves:
        only = contents.towers[0] if len(contents.towers) == 1 else None
        return (only,) if only is not None and _fits(row, only, contents) else ()
    if len(contents.towers) != len(row.halves):
        return ()
    halves = [table.towers[name] for name in row.halves]
    for parts in (contents.towers, contents.towers[::-1]):
        if all(_fits(half, part, contents) for half, part in zip(halves, parts, strict=True)):
            return parts
    return ()


def _fits(row: TowerRow, found: _Found, contents: _Contents) -> bool:
    family, spec = cast("tuple[type[Encoder], EncoderSpec]", found.tower)
    return row.fits(family.family, spec, found.part.weights, {*found.part.files, *contents.files})


def _require_pair(contents: _Contents, table: Presets, wanted: str | None) -> None:
    """Say what is wrong with the two towers of a dual one, where files or the wanted row speak of one."""
    found = contents.towers
    row = next((row for row in _dual_rows(contents, table, wanted) if found), None)
    if row is None:
        if len(found) > 1:
            raise _several("text towers", found)
        return
    if _holders(row, contents, table):
        return  # both are there; it is the bridge that does not fit
    halves = [table.towers[name] for name in row.halves]
    names = " and one ".join(f"{half.name} (family {half.family})" for half in halves)
    taken = [[half.name for half in halves if _fits(half, item, contents)] for item in found]
    strange = [item for item, fitting in zip(found, taken, strict=True) if not fitting]
    if len(found) == 1 and strange:
        return  # a tower that has nothing to do with the pair
    if strange and wanted is None and contents.bridge is None:
        raise _several("text towers", found)
    if strange:
        raise BridgeError(
            f"The two text towers are not those of {row.name}.",
            "; ".join(f"{item.part.name} is {json.dumps(_sizes(item))}" for item in strange),
            f"one {names}",
            "Name the two text towers that the method reads, and no other.",
        )
    given = ", ".join(f"{item.part.name} is {name[0]}" for item, name in zip(found, taken, strict=True))
    raise BridgeError(
        f"One half of the text tower {row.name} is {'missing' if len(found) == 1 else 'there twice'}.",
        given,
        f"one {names}",
        "Name the files of both text towers, each once.",
    )


def _dual_rows(contents: _Contents, table: Presets, wanted: str | None) -> list[TowerRow]:
    """The dual towers that may be meant: by name, or else because the bridge can read them."""
    if wanted is not None:
        method = table.methods.get(wanted)
        named = table.towers.get(wanted) if method is None else table.tower_of(method)
        rows = [] if named is None else [named]
    elif contents.bridge is not None and contents.bridge.bridge is not None:
        kind, spec = contents.bridge.bridge
        rows = [table.tower_of(row) for row in table.methods.values() if row.fits(kind.kind, spec)]
    else:
        rows = list(table.towers.values()) if len(contents.towers) > 1 else []
    return [row for row in rows if row.halves]


def _pins(choice: _Choice) -> set[str]:
    return {*choice.tower.sha256, *(choice.method.sha256 if choice.method else ())}


def _names(choices: Iterable[_Choice]) -> str:
    return ", ".join(dict.fromkeys((item.method or item.tower).name for item in choices))


def _nothing(contents: _Contents, choice: _Choice) -> BridgeError:
    return BridgeError(
        "There is nothing to convert.",
        json.dumps(_recognised(contents)),
        f"the text tower or the bridge of {(choice.method or choice.tower).name}",
        "Name the file that holds the text tower or the bridge too.",
    )


# -- building -----------------------------------------------------------------------------------------


def _build_tower(choice: _Choice, table: Presets, source: Source, dtype: torch.dtype | None) -> Encoder:
    row, parts = choice.tower, choice.parts
    if not row.halves:
        return _build_single(parts[0], row, row, {**parts[0].part.files, **source.files}, dtype)
    first, second = (
        _build_single(part, table.towers[name], row, _files_of_half(part, source), dtype)
        for name, part in zip(row.halves, parts, strict=True)
    )
    return join(first, second, identity=row.name, window=row.window)


def _build_single(
    found: _Found, row: TowerRow, whole: TowerRow, files: Mapping[str, bytes], dtype: torch.dtype | None
) -> Encoder:
    """The tower that one part holds, read as `row` says, under the name and the window of `whole`."""
    family, spec = cast("tuple[type[Encoder], EncoderSpec]", found.tower)
    spec = _changed(spec, row)
    encoder = create_encoder(
        family.family,
        spec,
        family.tokenizer_from(files),
        identity=whole.name,
        window=whole.window,
        layer=row.layer,
        mask_rule=row.mask_rule,
        device="meta",
    )
    _put_in(encoder, family.adopt(found.part.weights, spec), dtype, f"text tower in {found.part.name!r}")
    return encoder


def _files_of_half(found: _Found, source: Source) -> Mapping[str, bytes]:
    """The tokenizer of one of two towers: what lies beside its weights, else the one named that fits it.

    BridgeError when none of those that were named alone can be this tower's.
    """
    if not {*VOCABULARIES}.isdisjoint(found.part.files):
        return found.part.files
    family, spec = cast("tuple[type[Encoder], EncoderSpec]", found.tower)
    others = {name: data for name, data in source.files.items() if name not in VOCABULARIES}
    for name in VOCABULARIES:
        if name not in source.files:
            continue
        files = {**others, name: source.files[name]}
        try:
            tokenizer = family.tokenizer_from(files)
            create_encoder(family.family, spec, tokenizer, identity="", window=spec.window, device="meta")
        except BridgeError:
            continue  # the other tower's
        return files
    return others  # the family says what is missing


def _build_bridge(
    found: _Found | None, method: MethodRow, dtype: torch.dtype | None
) -> tuple[Bridge, dict[str, Tensor]]:
    """The bridge, and what its file holds of the U-Net (by LDM name)."""
    if found is None or found.bridge is None:
        return create(method.kind, method.match), {}
    kind, spec = found.bridge
    spec = _changed(spec, method)
    weights = found.part.weights
    inside = Weights(
        {key[len(found.prefix) :]: shape for key, shape in weights.shapes.items()},
        {key[len(found.prefix) :]: number for key, number in weights.dtypes.items()},
        lambda key: weights[found.prefix + key],
    )
    bridge = create(kind.kind, spec, device="meta")
    _put_in(bridge, kind.adopt(inside, spec), dtype, f"bridge in {found.part.name!r}")
    return bridge, kind.unet_part(inside)


def _changed(spec: Spec, row: TowerRow | MethodRow) -> Spec:
    """The spec with what the row says and the file cannot; BridgeError when there are no such fields."""
    known = dataclasses.asdict(cast(Any, spec))
    return parse_spec(type(spec), known | dict(row.change), f"row {row.name!r} of the table")


def _put_in(module: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype | None, what: str) -> None:
    """Hang published tensors into a module that holds no memory: they stay on the disk until written."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    guard.require_shapes(guard.shapes_of(module), shapes, f"published {what}")
    odd = [f"{key} {str(value.dtype)[6:]}" for key, value in state.items() if not value.is_floating_point()]
    if odd:
        raise BridgeError(
            f"The published {what} is of an odd type.",
            ", ".join(odd[:4]),
            "float16, bfloat16, float32 or float64",
            "Take the weights as their authors published them, not a quantised copy.",
        )
    chosen = dtype or _common_dtype(state)
    module.load_state_dict({key: value.to(chosen) for key, value in state.items()}, strict=True, assign=True)


def _common_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype that all weights share, so that no number changes; float32 when they differ."""
    found = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return found.pop() if len(found) == 1 else torch.float32


def _reference(row: TowerRow, digest: str) -> EncoderRef:
    return EncoderRef(row.family, row.name, row.layer, row.window, row.mask_rule, digest)


# -- the U-Net ----------------------------------------------------------------------------------------


def _unet_part(
    contents: _Contents,
    method: MethodRow | None,
    reference: Path | None,
    wanted: str,
    form: str,
    record: dict[str, object],
) -> tuple[unets.UnetPart | None, dict[str, object]]:
    """What goes into the bridge of the U-Net, and what the training record says of it."""
    if method is None:
        return None, {}
    if wanted == "none" or (wanted == "auto" and method.unet != "kv"):
        return None, {} if method.unet == "none" else {"unet": "own"}
    if contents.unet is None:
        raise BridgeError(
            f"The bridge {method.name} needs the U-Net that was trained with it.",
            "no U-Net among the files",
            "the whole diffusers folder or single file, with text encoder and U-Net",
            "Name the whole model; or ask for U-Net part none, for a bridge that works only with the "
            "method's own checkpoint.",
        )
    weights = contents.unet.part.weights
    if wanted == "full":
        part = unets.whole(weights)
    else:
        if reference is None:
            raise BridgeError(
                f"The U-Net of {method.name} can only be taken apart beside the one it started from.",
                "no reference",
                "the checkpoint that its training started from (SD 1.4 for AltDiffusion)",
                "Name it (--reference FILE); or ask for U-Net part none, for a bridge that works only with "
                "the method's own checkpoint.",
            )
        started = open_sources([reference])
        holders = [item.weights for item in started.parts if unets.is_unet(item.weights.shapes)]
        empty = Weights({}, {}, dict[str, Tensor]().__getitem__)
        part = unets.extract(weights, holders[0] if holders else empty, part=wanted, form=form)
        record["reference"] = provenance(tuple(p for item in started.parts for p in item.paths))
    record["unet"] = {"part": part.part, "tensors": len(part.tensors), "moved_besides": list(part.moved)}
    return part, {"unet": part.form, "unet_complete": part.complete}


def _require_left_out(extra: Mapping[str, Tensor], wanted: str) -> None:
    """Refuse a bridge file with U-Net tensors of its own, unless it was said what becomes of them."""
    if wanted != "none":
        raise BridgeError(
            "The bridge file replaces a piece of the U-Net as well.",
            f"{len(extra)} U-Net tensors: {', '.join(sorted(extra)[:4])}",
            "to be told what becomes of them",
            "Ask for U-Net part none (they are left out, and the bridge is not the whole method) or full.",
        )


# -- writing ------------------------------------------------------------------------------------------


class _Staging:
    """Files under passing names in their own folders, which all get their names at the end, or all vanish."""

    def __init__(self) -> None:
        self._files: dict[Path, Path] = {}
        self._there: list[Path] = []

    def __enter__(self) -> _Staging:
        return self

    def __exit__(self, *_: object) -> None:
        for passing in self._files.values():
            passing.unlink(missing_ok=True)

    def file(self, target: Path) -> Path:
        """The passing name for `target`."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            raise BridgeError(
                f"The folder {str(target.parent)!r} cannot be made.",
                error,
                "a folder that can be written to",
                "Choose another folder.",
            ) from error
        passing = target.with_name(f".{target.name}.{secrets.token_hex(6)}{guard.TEMPORARY_SUFFIX}")
        self._files[target] = passing
        return passing

    def keep(self, target: Path) -> None:
        """A file that is there already and is the very one."""
        self._there.append(target)

    def publish(self) -> list[Path]:
        """Give every file its name."""
        for target, passing in self._files.items():
            try:
                os.replace(passing, target)
            except OSError as error:
                raise BridgeError(
                    f"The file {target.name!r} cannot get its name.",
                    error,
                    "a folder that can be written to, and no program that holds the old file open",
                    "Close ComfyUI or choose another name, and convert again.",
                ) from error
        return [*self._there, *self._files]


def _write_tower(
    staging: _Staging,
    target: Path,
    tower: Encoder,
    row: TowerRow,
    record: Mapping[str, object],
    overwrite: bool,
) -> str:
    """Write the tower unless the very same is there; returns its digest."""
    header, tensors = pack_encoder(tower, languages=row.languages, licence=row.licence, source=row.source)
    if not overwrite and target.is_file() and _same_tower(target, header):
        staging.keep(target)
        return header.digest
    _require_free(target, overwrite)
    metadata = {ENCODER_METADATA_KEY: header.to_json(), PROVENANCE_KEY: json.dumps(record, sort_keys=True)}
    guard.write(staging.file(target), tensors, metadata)
    return header.digest


def _same_tower(path: Path, header: EncoderHeader) -> bool:
    try:
        return read_encoder_header(path) == header
    except BridgeError:
        return False


def _require_free(target: Path, overwrite: bool) -> None:
    try:
        there = target.exists() or target.is_symlink()
    except OSError as error:  # a name that the system cannot take
        raise BridgeError(
            f"The file {target.name!r} cannot be written there.",
            error,
            "a folder that can be written to",
            "Choose another folder.",
        ) from error
    if there and not overwrite:
        raise BridgeError(
            f"There is a file {target.name!r} already.",
            str(target),
            "a name that is free",
            "Move the old file away, choose another name or folder, or allow to overwrite it (--force).",
        )


def _file_name(name: str) -> str:
    """The same name when it is one on every system; not a device of Windows, whatever its ending."""
    device = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE)
    if device or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,99}", name):
        raise BridgeError(
            "The bridge file cannot have this name.",
            repr(name)[:120],
            "letters, digits, dots and dashes, without a folder and without an ending",
            "Choose another name.",
        )
    return name

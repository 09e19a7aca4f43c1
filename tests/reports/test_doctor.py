"""The doctor: each thing that can be wrong is found by name, with one thing to do, in two languages."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from language_bridge.bridges.file import METADATA_KEY, read_header, save_bridge
from language_bridge.encoders import guard
from language_bridge.encoders.file import save_encoder
from language_bridge.manifest.errors import Stopped
from language_bridge.manifest.lock import Lock, Made, Record, write_lock
from language_bridge.manifest.schema import DOWNLOADS, Conversion, Manifest, dump
from language_bridge.reports import doctor, words
from language_bridge.reports.doctor import Finding, Machine
from language_bridge.tests.conversion.layouts import pea, random, save
from language_bridge.tests.fixtures.offers import offered
from language_bridge.tests.fixtures.towers import tiny_bridge, tiny_tower, write_bridge
from language_bridge.tests.manifest.hub import Hub, LoopbackWire, running

CHECKOUT = Path(doctor.__file__).resolve().parent.parent
BODY = b"published " * 999
MANIFEST = offered(BODY)
ADAPTER, ASKING, TOWER, _ = MANIFEST.published
NEEDS_TOWER = replace(ADAPTER, name="tiny-zh-set", conversion=Conversion("tiny-zh", ("pytorch_model.bin",)))
PLACE = ADAPTER.files[0].place


@dataclass
class Patient:
    """An installation that is whole, and what tests do to it."""

    machine: Machine

    @property
    def models(self) -> Path:
        assert self.machine.models is not None
        return self.machine.models

    def folder(self, name: str) -> Path:
        folder = Path(self.machine.roots[name][0])
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def set_manifest(self, manifest: Manifest) -> None:
        (self.machine.pack / "weights_manifest.json").write_text(dump(manifest), encoding="utf-8")

    def put(self, place: str, content: bytes = BODY) -> Path:
        path = self.models / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def bridge(self, place: str = "language_bridges/b.safetensors", *, digest: str = "", **how: Any) -> Path:
        """A bridge that reads the tower tiny-zh."""
        tower = tiny_tower()
        path = self.models / place
        path.parent.mkdir(parents=True, exist_ok=True)
        bridge = tiny_bridge("linear", "sd1", tower)
        write_bridge(path, "sd1", bridge, tower, **how)
        if digest:
            header = read_header(path)
            assert header is not None
            header = dataclasses.replace(header, encoder=dataclasses.replace(header.encoder, digest=digest))
            save_bridge(path, header, bridge)
        return path

    def tower(self, place: str = "text_encoders/t.safetensors", **how: Any) -> Path:
        path = self.models / place
        path.parent.mkdir(parents=True, exist_ok=True)
        save_encoder(path, tiny_tower(**how))
        return path

    def known(self, content: bytes = BODY, *, made: bool = False) -> None:
        """The lock file of a set that was fetched, or converted into language_bridges/mine.safetensors."""
        digest = hashlib.sha256(content).hexdigest()
        record = Record(ADAPTER.files[0].key, len(content), digest, "hub", True, True)
        entry = Made("language_bridges/mine.safetensors", len(content), digest)
        second = Made("text_encoders/mine-tower.safetensors", len(content), digest)
        write_lock(self.models, Lock({PLACE: record}, {"mine": (entry, second)} if made else {}))

    def findings(self, **how: Any) -> list[Finding]:
        return doctor.examine(self.machine, environ={}, **how)


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    pack, models = tmp_path / "pack", tmp_path / "\u6a21\u578b und models"
    pack.mkdir()
    roots = {name: (models / name, tmp_path / "shared disk" / name) for name in doctor.CATEGORIES}
    versions = [("Python", "3.12.1"), ("ComfyUI", "0.30.0"), ("torch", "2.9.1+cu128")]
    whole = Patient(Machine(pack, models, roots, versions, comfyui="0.30.0"))
    whole.set_manifest(MANIFEST)
    return whole


def old_host(patient: Patient) -> None:
    patient.machine = replace(patient.machine, comfyui="0.9.3")


def old_torch(patient: Patient) -> None:
    patient.machine = replace(patient.machine, versions=[("torch", "2.5.1+cpu")])


def wrong_python(patient: Patient) -> None:
    patient.machine = replace(patient.machine, missing=("torch", "tokenizers"))


def wrong_yaml(patient: Patient) -> None:
    patient.machine = replace(patient.machine, unread=[("extra.yaml cannot be understood.", "a list")])


def no_host(patient: Patient) -> None:
    patient.machine = replace(patient.machine, models=None, comfyui="")


def no_manifest(patient: Patient) -> None:
    (patient.machine.pack / "weights_manifest.json").unlink()


def shipped_cut(patient: Patient) -> None:
    manifest = json.loads((CHECKOUT / "weights_manifest.json").read_text(encoding="utf-8"))
    file = manifest["entries"][0]["files"][0]
    text = json.dumps(manifest | {"entries": [manifest["entries"][0] | {"files": [file]}], "published": []})
    (patient.machine.pack / "weights_manifest.json").write_text(text, encoding="utf-8")
    path = patient.machine.pack / file["path"]
    path.parent.mkdir(parents=True)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


def lock_damaged(patient: Patient) -> None:
    patient.put(f"{DOWNLOADS}/lock.json", b"{")


def fetched_changed(patient: Patient) -> None:
    patient.known()
    patient.put(PLACE, BODY[:-1] + b"?")


def made_changed(patient: Patient) -> None:
    patient.bridge("language_bridges/mine.safetensors", inside=True)
    whole = (patient.models / "language_bridges" / "mine.safetensors").read_bytes()
    patient.known(whole, made=True)
    patient.put("text_encoders/mine-tower.safetensors", whole)
    patient.bridge("language_bridges/mine.safetensors", inside=True, unet="kv")
    (patient.models / "text_encoders" / "mine-tower.safetensors").unlink()
    shutil.copy(
        patient.models / "language_bridges" / "mine.safetensors", patient.models / "language_bridges" / "a"
    )


def unfinished(patient: Patient) -> None:
    patient.put(f"{PLACE}.part", b"x" * 200_000)


def bridge_in_loras(patient: Patient) -> None:
    patient.bridge("loras/\u6211\u7684 bridge.safetensors", inside=True)


def bridge_on_the_shared_disk(patient: Patient) -> None:
    there = Path(patient.machine.roots["checkpoints"][1])
    shutil.move(patient.bridge(inside=True), (there.mkdir(parents=True), there / "b.safetensors")[1])


def tower_in_checkpoints(patient: Patient) -> None:
    patient.tower("checkpoints/sub/t.safetensors")


def published_elsewhere(patient: Patient) -> None:
    to = replace(ADAPTER.files[0], to="checkpoints/wonder.ckpt", path="wonder.ckpt")
    patient.set_manifest(Manifest((), (replace(ADAPTER, files=(to,), needs=(), conversion=None),)))
    patient.put("loras/wonder.ckpt")


def newer_file(patient: Patient) -> None:
    path = patient.bridge(inside=True)
    header = read_header(path)
    assert header is not None
    text = json.dumps(json.loads(header.to_json()) | {"format": 99})
    guard.write(path, guard.read_tensors(path, guard.read_layout(path)), {METADATA_KEY: text})


def cut_bridge(patient: Patient) -> None:
    path = patient.bridge(inside=True)
    path.write_bytes(path.read_bytes()[:-100])


def lfs_tower(patient: Patient) -> None:
    patient.put("text_encoders/t.safetensors", b"version https://git-lfs.github.com/spec/v1\n")


def published_by_name(patient: Patient) -> None:
    patient.put("text_encoders/OPPO/pytorch_model.bin")


def published_by_size(patient: Patient) -> None:
    patient.put("controlnet/\u4e0b\u8f7d (1).bin")


def adapter_by_tensors(patient: Patient) -> None:
    save(patient.folder("text_encoders") / "adapter.safetensors", random(pea("P3")))


def stranger_among_bridges(patient: Patient) -> None:
    patient.put("language_bridges/what.pth", b"PK")


def tower_absent(patient: Patient) -> None:
    patient.bridge()


def tower_to_be_fetched(patient: Patient) -> None:
    patient.set_manifest(replace(MANIFEST, published=(*MANIFEST.published, NEEDS_TOWER)))
    patient.bridge()


def tower_by_hand(patient: Patient) -> None:
    patient.set_manifest(
        replace(MANIFEST, published=(ADAPTER, ASKING, TOWER, replace(TOWER, name="tiny-zh", needs=())))
    )
    patient.bridge()


def tower_of_another_window(patient: Patient) -> None:
    patient.bridge()
    patient.tower(window=40)


def tower_of_another_training(patient: Patient) -> None:
    patient.bridge(digest="0" * 64)
    patient.tower(seed=1)


Case = tuple[Callable[[Patient], None], str, str, str]
CASES: tuple[Case, ...] = (
    (old_host, "host_old", "0.9.3", "ComfyUI"),
    (old_torch, "torch_old", "2.5.1", "torch"),
    (wrong_python, "modules_missing", "torch, tokenizers", "Python"),
    (wrong_yaml, "roots_unread", "a list", "models"),
    (no_host, "no_comfyui", "custom_nodes", "COMFYUI_PATH"),
    (no_manifest, "shipped_damaged", "weights_manifest.json", ""),
    (shipped_cut, "shipped_damaged", "pocket/assets/", ""),
    (lock_damaged, "lock_damaged", f"{DOWNLOADS}/lock.json", ""),
    (fetched_changed, "fetched_damaged", PLACE, "get mine"),
    (made_changed, "made_damaged", "language_bridges/mine.safetensors", "get mine --force"),
    (made_changed, "made_missing", "text_encoders/mine-tower.safetensors", "get mine --force"),
    (unfinished, "unfinished", f"{PLACE} ", "get mine"),
    (bridge_in_loras, "bridge_elsewhere", "loras/\u6211\u7684 bridge.safetensors", "models/language_bridges"),
    (bridge_on_the_shared_disk, "bridge_elsewhere", "checkpoints/b.safetensors", "models/language_bridges"),
    (tower_in_checkpoints, "tower_elsewhere", "checkpoints/sub/t.safetensors", "models/text_encoders"),
    (published_elsewhere, "published_elsewhere", "loras/wonder.ckpt", "models/checkpoints"),
    (newer_file, "pack_old", "language_bridges/b.safetensors", ""),
    (cut_bridge, "file_damaged", "language_bridges/b.safetensors", ""),
    (lfs_tower, "file_damaged", "text_encoders/t.safetensors", ""),
    (published_by_name, "unconverted", "text_encoders/OPPO/pytorch_model.bin", "get mine"),
    (published_by_size, "unconverted", "controlnet/\u4e0b\u8f7d (1).bin", "get mine"),
    (adapter_by_tensors, "unknown_unconverted", "text_encoders/adapter.safetensors", ""),
    (stranger_among_bridges, "unknown_unconverted", "language_bridges/what.pth", ""),
    (tower_absent, "tower_missing", "language_bridges/b.safetensors", "models/text_encoders"),
    (tower_to_be_fetched, "tower_fetchable", "tiny-zh", "get tiny-zh-set"),
    (tower_by_hand, "tower_by_hand", "tiny-zh", "https://huggingface.co/who/pea"),
    (tower_of_another_window, "tower_differs", "text_encoders/t.safetensors", "models/text_encoders"),
    (tower_of_another_training, "tower_differs", "digest", "models/text_encoders"),
)
HAN = re.compile("[\u4e00-\u9fff]")


def test_a_whole_installation_has_no_finding(patient: Patient) -> None:
    patient.bridge("controlnet/b.safetensors")
    patient.tower("language_bridges/t.safetensors")
    patient.bridge("text_encoders/inside.safetensors", inside=True)
    save(patient.folder("checkpoints") / "sd.safetensors", random({"model.x": (2, 2)}))
    patient.put("loras/broken.safetensors", b"not ours")
    patient.put("loras/style.pt", b"PK")
    assert patient.findings() == []
    for code in words.CODES:
        say = words.words_of(code)
        assert say("doctor_well") in doctor.report(patient.machine, [], say)


@pytest.mark.parametrize(
    ("act", "code", "names", "does"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_each_thing_is_found_by_name_with_one_thing_to_do_in_both_languages(
    patient: Patient, act: Callable[[Patient], None], code: str, names: str, does: str
) -> None:
    place = str(patient.models)
    act(patient)
    found = {finding.code: finding for finding in patient.findings()}
    both = {"made_damaged", "made_missing"}
    assert set(found) == ({code} if code not in both else both)
    finding = found[code]
    english, chinese = (words.words_of(language) for language in words.CODES)
    for say in (english, chinese):
        assert names in finding.text(say) and does in finding.action(say)
        text = doctor.report(patient.machine, [finding], say)
        assert finding.text(say) in text and finding.action(say) in text
        assert place not in text
    assert HAN.search(finding.action(chinese))
    assert not HAN.search(finding.action(english).replace("\u6211\u7684", ""))


def test_a_published_file_is_no_finding_once_it_is_converted(patient: Patient) -> None:
    published_by_name(patient)
    path = patient.bridge(inside=True)
    header = read_header(path)
    assert header is not None and patient.findings()
    training = {"conversion": {"preset": "pea-sdxl-chinese-clip"}}
    tower = tiny_tower()
    save_bridge(
        path, dataclasses.replace(header, training=training), tiny_bridge("linear", "sd1", tower), tower
    )
    assert patient.findings() == []


def test_without_torch_files_are_still_judged_by_the_manifest(
    patient: Patient, monkeypatch: pytest.MonkeyPatch
) -> None:
    published_by_size(patient)
    wrong_python(patient)
    monkeypatch.setattr(doctor, "_look", None)
    assert {finding.code for finding in patient.findings()} == {"modules_missing", "unconverted"}


def test_a_set_that_the_user_removed_whole_is_no_fault(patient: Patient) -> None:
    patient.known(made=True)
    assert patient.findings() == []


def test_a_circle_of_links_ends(patient: Patient) -> None:
    loop = patient.folder("loras") / "again"
    loop.symlink_to(patient.folder("loras"), target_is_directory=True)
    bridge_in_loras(patient)
    assert [finding.code for finding in patient.findings()] == ["bridge_elsewhere"]


def test_paths_are_whole_where_the_user_asked_on_a_console(patient: Patient) -> None:
    tower_in_checkpoints(patient)
    patient.machine = replace(patient.machine, whole_paths=True)
    text = patient.findings()[0].text(words.words_of("en"))
    assert str(patient.models / "checkpoints" / "sub" / "t.safetensors") in text


def test_it_stops_when_the_user_says_so(patient: Patient) -> None:
    patient.bridge()
    with pytest.raises(Stopped):
        patient.findings(stopped=lambda: True)


def test_the_sources_are_asked_only_when_the_user_wants_it(patient: Patient) -> None:
    def asked(hub: Hub, silent: Hub) -> tuple[tuple[str, str], ...]:
        return ("hub", hub.url("")), ("mirror", silent.url("")), ("modelscope", "http://example.org")

    with running(lambda request: request.reply(200)) as hub, running(lambda request: None) as silent:
        wire, places = LoopbackWire({hub.host, silent.host}), asked(hub, silent)
        assert patient.findings(wire=wire, asked=places) == [] and not hub.log
        found = patient.findings(hosts=True, wire=wire, asked=places)
    assert [finding.code for finding in found] == ["host_answers", "host_silent", "host_silent"]
    assert [request.method for request in hub.log] == ["HEAD"]
    assert silent.url("") in found[1].text(words.words_of("zh"))
    assert "list of hosts" in found[2].text(words.words_of("en"))


def test_asking_a_silent_source_stops_within_a_second(patient: Patient) -> None:
    with running(lambda request: time.sleep(5)) as silent:
        start = time.monotonic()
        places = (("hub", silent.url("")),)
        with pytest.raises(Stopped):
            patient.findings(
                hosts=True,
                wire=LoopbackWire({silent.host}),
                asked=places,
                stopped=lambda: bool(silent.log),
            )
        assert silent.log and time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("problem", "cause"),
    [
        ("a certificate that does not prove the host", "certificate"),
        ("a proxy of the kind 'socks5'; only HTTP proxies can be used", "proxy"),
        ("no answer for 20 seconds", "silent"),
    ],
)
def test_each_cause_has_its_own_advice(problem: str, cause: str) -> None:
    from language_bridge.manifest.reach import Reached

    assert Reached("hub", "https://x", problem, 0.0).cause == cause
    assert Reached("hub", "https://x", "", 0.0).cause == ""
    said = [words.words_of(code)(f"doctor_host_{cause}_do") for code in words.CODES]
    assert all(said) and len({*said}) == 2


@pytest.mark.parametrize(
    "environ",
    [
        {"LANGUAGE_BRIDGE_SOURCES": "hugging"},
        {"HF_ENDPOINT": "http://x.org"},
        {"LANGUAGE_BRIDGE_HOSTS": "https://x"},
    ],
    ids=str,
)
def test_a_wrong_variable_is_named(patient: Patient, environ: Mapping[str, str]) -> None:
    found = doctor.examine(patient.machine, environ=environ)
    assert [finding.code for finding in found] == ["variable_wrong"]
    assert next(iter(environ)) in found[0].text(words.words_of("zh"))


def test_every_sentence_of_the_doctor_can_be_said() -> None:
    source = Path(doctor.__file__).read_text(encoding="utf-8")
    codes = set(re.findall(r"Finding\(\s*\"(\w+)\"", source)) | {
        f"host_{cause}" for cause in ("certificate", "proxy", "silent")
    }
    codes |= set(re.findall(r"\"((?:made|tower)_\w+)\"", source))
    texts = json.loads((CHECKOUT / "locales" / "en" / "reports.json").read_text(encoding="utf-8"))
    assert {f"doctor_{code}" for code in codes} | {f"doctor_{code}_do" for code in codes} <= set(texts)
    said = {name.removesuffix("_do") for name in texts if name.endswith("_do") and name != "doctor_do"}
    assert {name for name in said if name.startswith("doctor_")} == {f"doctor_{code}" for code in codes}


def test_the_oldest_host_is_the_one_that_the_registry_is_told() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'requires-comfyui = ">={doctor.OLDEST_COMFYUI}"' in text

"""The roots of extra_model_paths.yaml are those that ComfyUI's own reader finds."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from language_bridge.manifest import roots
from language_bridge.manifest.errors import FetchError

FOLDERS = ("text_encoders", "controlnet", "diffusion_models", "language_bridges", "checkpoints")

YAML = """
comfyui:
    base_path: ~/far/../away
    is_default: true
    clip: models/clip/
    controlnet: |
        models/ControlNet
        models/T2IAdapter
\u6a21\u578b:
    base_path: \u6211\u7684 \u6a21\u578b
    language_bridges: \u6865
    text_encoders: "$LB_ROOT_NAME/towers"
nothing:
absolute:
    unet: /srv/unet
    checkpoints: plain/checkpoints
again:
    is_default: true
    text_encoders: {models}/text_encoders
later:
    base_path: \u6211\u7684 \u6a21\u578b
    language_bridges: \u6865
variable:
    base_path: $LB_ROOT_NAME
    language_bridges: .
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LB_ROOT_NAME", "named")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    file = tmp_path / "Comfy UI" / roots.FILE
    file.parent.mkdir()
    text = YAML.replace("{models}", (file.parent / "models").as_posix())
    file.write_text(text, encoding="utf-8")
    return file.parent


def test_the_roots_are_those_of_the_host(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from utils.extra_config import load_extra_path_config

    models = tree / "models"
    known = {
        "text_encoders": ([str(models / "text_encoders"), str(models / "clip")], set()),
        "diffusion_models": ([str(models / "unet"), str(models / "diffusion_models")], set()),
        "controlnet": ([str(models / "controlnet"), str(models / "t2i_adapter")], set()),
        "checkpoints": ([str(models / "checkpoints")], set()),
        "language_bridges": ([str(models / "language_bridges")], set()),
    }
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    load_extra_path_config(str(tree / roots.FILE))
    for folder in FOLDERS:
        ours = [str(path) for path in roots.roots(folder, models, tree=tree)]
        assert ours == folder_paths.get_folder_paths(folder), folder
        assert len(ours) > 1 and all(os.path.isabs(path) for path in ours)


def test_the_old_names_of_folders_are_understood(tree: Path) -> None:
    models = tree / "models"
    for old, new in roots.OLD_NAMES.items():
        assert roots.roots(old, models, tree=tree) == roots.roots(new, models, tree=tree)


def test_a_further_file_adds_its_roots_and_none_is_needed(tmp_path: Path) -> None:
    models = tmp_path / "models"
    assert roots.roots("loras", models, tree=tmp_path) == (models / "loras",)
    more = tmp_path / "sub" / "more.yaml"
    more.parent.mkdir()
    more.write_text("mine:\n    loras: here\n", encoding="utf-8")
    assert roots.roots("loras", models, files=[more]) == (models / "loras", more.parent / "here")
    more.write_text("", encoding="utf-8")
    assert roots.roots("loras", models, files=[more]) == (models / "loras",)


@pytest.mark.parametrize(
    "content",
    [
        b"a: [b: c",
        b"- loras\n",
        b"mine: loras\n",
        b"mine:\n    loras: 3\n",
        b"mine:\n    loras:\n        - one\n        - two\n",
        b"mine:\n    base_path: [one]\n    loras: two\n",
        b"mine:\n    1: two\n",
        b"mine:\n    loras: \xff\xfe\n",
        b"mine: !!python/object/apply:os.system [true]\n",
        b"# " + b"x" * roots.LARGEST_BYTES,
        b"[" * 5000,
    ],
)
def test_what_cannot_be_understood_is_refused_in_words(content: bytes, tmp_path: Path) -> None:
    (tmp_path / roots.FILE).write_bytes(content)
    with pytest.raises(FetchError, match="what to do: Mend the file") as caught:
        roots.roots("loras", tmp_path / "models", tree=tmp_path)
    assert str(tmp_path) not in str(caught.value)

"""Writes weights_manifest.json anew from the files in pocket/assets: sizes and hashes as they are now.

    python bootstrap.py run recipes/manifest.py [--check]

What a person wrote (about, licence, source) is kept. With --check nothing is written and the exit code tells.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from language_bridge.manifest.schema import Entry, Manifest, dump, parse
from language_bridge.manifest.verify import measure

PACK = Path(__file__).resolve().parent.parent
FILE = PACK / "weights_manifest.json"


def refreshed(manifest: Manifest) -> Manifest:
    """The manifest with one entry per shipped asset, old words and published sets kept."""
    known = {entry.name: entry for entry in manifest.entries}
    entries: list[Entry] = []
    for path in sorted((PACK / "pocket" / "assets").rglob("*.safetensors")):
        fresh = Entry(path.stem, "", "pocket", "GPL-3.0-or-later", "recipes/", ())
        files = (measure(PACK, path.relative_to(PACK).as_posix()),)
        entries.append(replace(known.get(path.stem, fresh), files=files))
    return Manifest(tuple(entries), manifest.published)


def main() -> int:
    """Refresh or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = FILE.read_text(encoding="utf-8") if FILE.is_file() else dump(Manifest(()))
    fresh = dump(refreshed(parse(text)))
    if options.check:
        return int(fresh != text)
    FILE.write_text(fresh, encoding="utf-8")
    print(f"{FILE.name}: {len(parse(fresh).entries)} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())

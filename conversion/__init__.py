"""Published weights -> our own files: the guarded door, the table of what is published, the conversion."""

VERSION = "0.1.0"
"""Written into the provenance of every file that is made here; the same as in pyproject.toml."""

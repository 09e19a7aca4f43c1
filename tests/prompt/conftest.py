"""Property tests run the same cases each time and are not hurried on a busy machine."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True, database=None, max_examples=200)
settings.load_profile("steady")

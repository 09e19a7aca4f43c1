"""The one error of fetching, written in the three parts that every error of the pack has.

It is no BridgeError because this room stands alone: install.py runs it without torch.
"""

from __future__ import annotations


class FetchError(ValueError):
    """A file was not fetched: what went wrong, what was found against expected, what to do."""

    def __init__(self, what: str, found: object, expected: object, action: str) -> None:
        self.what = what
        self.found = str(found)
        self.expected = str(expected)
        self.action = action
        super().__init__(
            f"{what}\n  found: {self.found}\n  expected: {self.expected}\n  what to do: {action}"
        )

    def __reduce__(self) -> tuple[type[FetchError], tuple[str, str, str, str]]:
        """Let the error travel between processes (the default would call it with one argument)."""
        return type(self), (self.what, self.found, self.expected, self.action)


class Stopped(Exception):
    """The user stopped the download; what had arrived is kept and goes on next time."""

"""The one error that a user of the pack meets, written in three parts."""

from __future__ import annotations

LONGEST = 4000
"""The most letters of each part: what is found comes from files, which may hold a name of eight million."""


class BridgeError(ValueError):
    """Something that the user can mend: what went wrong, what was found against expected, what to do."""

    def __init__(self, what: str, found: object, expected: object, action: str) -> None:
        self.what = _cut(what)
        self.found = _cut(str(found))
        self.expected = _cut(str(expected))
        self.action = action
        super().__init__(
            f"{self.what}\n  found: {self.found}\n  expected: {self.expected}\n  what to do: {action}"
        )

    def __reduce__(self) -> tuple[type[BridgeError], tuple[str, str, str, str]]:
        """Let the error travel between processes (the default would call it with one argument)."""
        return type(self), (self.what, self.found, self.expected, self.action)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."

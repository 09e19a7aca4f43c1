"""The one error that a user of the pack meets, written in three parts."""

from __future__ import annotations


class BridgeError(ValueError):
    """Something that the user can mend: what went wrong, what was found against expected, what to do."""

    def __init__(self, what: str, found: object, expected: object, action: str) -> None:
        self.what = what
        self.found = str(found)
        self.expected = str(expected)
        self.action = action
        super().__init__(
            f"{what}\n  found: {self.found}\n  expected: {self.expected}\n  what to do: {action}"
        )

    def __reduce__(self) -> tuple[type[BridgeError], tuple[str, str, str, str]]:
        """Let the error travel between processes (the default would call it with one argument)."""
        return type(self), (self.what, self.found, self.expected, self.action)

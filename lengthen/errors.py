"""What every part raises for a mistake that the user can mend. Imports nothing."""


class UserError(Exception):
    """A mistake the user can fix: one line that says what and where, and a hint (a command where possible)."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint


class LowYield(UserError):
    """Fewer records than --min-yield came out: exit code 3."""

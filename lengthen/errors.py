"""A mistake that the user can mend, as every part raises it; how running out of memory is known. Imports nothing."""


class UserError(Exception):
    """A mistake the user can fix: one line that says what and where, and a hint (a command where possible)."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message, self.hint = message, hint


class LowYield(UserError):
    """Fewer records than --min-yield came out: exit code 3."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch means that memory ran out.

    Known by name, so that nobody imports torch to ask: CUDA's allocator raises torch.OutOfMemoryError, a CPU's a plain
    RuntimeError with this text.
    """
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)

"""Calls that fail at their n-th time, put in the place of the real ones."""

import errno
import os


class Failing:
    """Calls through until the n-th call, which raises; `forever`: so do all later ones."""

    def __init__(self, function, at: int, error: BaseException, forever: bool = False) -> None:
        self.function, self.at, self.error, self.forever, self.calls = function, at, error, forever, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.at or (self.forever and self.calls > self.at):
            raise self.error
        return self.function(*args, **kwargs)


def full(code: int = errno.ENOSPC) -> OSError:
    """What a full disk raises, or an error of another code."""
    return OSError(code, os.strerror(code))

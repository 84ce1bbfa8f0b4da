"""What a refusal is recognized by: the code of its `UserError`, in this process or at the end of a command's message."""

import contextlib
import re
import subprocess
from collections.abc import Iterator

import pytest

from utils.errors import UserError


@contextlib.contextmanager
def refused(code: str, words: str = "") -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a `UserError` of this code (of several problems, one must have it); yields it.

    `words` are for the one test that pins a message's wording, or tells apart what has one code.
    """
    with pytest.raises(UserError) as caught:
        yield caught
    assert code in caught.value.codes, f"{caught.value.codes}: {caught.value}"
    assert words in str(caught.value)


def refusal_code(done: subprocess.CompletedProcess) -> str:
    """The code of the one refusal that ended a command; fails unless the command ended with exit code 2 and one message."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr and done.stderr.count("error: ") == 1, done.stderr
    found = re.search(r"\[([a-z0-9-]+)\]\s*$", done.stderr)
    assert found, done.stderr
    return found[1]

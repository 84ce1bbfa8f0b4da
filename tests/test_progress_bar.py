"""Progress is a bar on a screen, lines in a file, nothing where quiet is asked for."""

import contextlib
import io

import pytest

from utils.progress_bar import progress_bar


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


both = pytest.mark.parametrize("kind", [io.StringIO, Screen], ids=["file", "screen"])


def work(stderr: io.StringIO, **more) -> None:
    with contextlib.redirect_stderr(stderr), progress_bar("measuring", 40, "block", **more) as bar:
        for number in range(40):
            bar.set_postfix_str(f"model {number // 20}", refresh=False)
            bar.update()


@both
def test_a_screen_has_a_bar_and_a_file_has_lines(kind):
    stderr = kind()
    work(stderr)
    shown = stderr.getvalue()
    assert "measuring" in shown and "40/40" in shown and "model 1" in shown and shown.endswith("\n")
    assert ("\r" in shown) == stderr.isatty()
    lines = shown.splitlines()
    assert all(line.strip() for line in lines) or stderr.isatty()


@both
def test_quiet_is_silent(kind):
    stderr = kind()
    work(stderr, quiet=True)
    assert stderr.getvalue() == ""


@both
def test_an_error_ends_the_line(kind):
    stderr = kind()
    bar = contextlib.ExitStack()
    with pytest.raises(RuntimeError), contextlib.redirect_stderr(stderr), bar:
        bar.enter_context(progress_bar("merging", 2, "B", unit_scale=True)).update()
        raise RuntimeError
    assert stderr.getvalue().endswith("\n")

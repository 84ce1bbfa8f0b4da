"""How a command ends: one message and an exit code, never a traceback for what a user can mend.

python -m pytest tests/test_errors.py
"""

import errno
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.refusals import refusal_code
from utils.errors import Problem, UserError, brief, is_of_the_moment, raise_collected, run_command


def end_of(error: BaseException, capsys) -> tuple[int, str]:
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    return caught.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("pair.yaml: nsamples is 0"), 2, "error: pair.yaml: nsamples is 0\n"),
        (KeyboardInterrupt(), 130, "interrupted; nothing unfinished was left behind\n"),
        (
            OSError(28, "No space left on device", "/x/norms.csv"),
            2,
            "error: No space left on device (/x/norms.csv); nothing unfinished was left behind [os-error]\n",
        ),
        (OSError("odd"), 2, "error: odd; nothing unfinished was left behind [os-error]\n"),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            2,
            "error: No module named 'torch'; install the requirements: pip install -r requirements.txt [package-missing]\n",
        ),
    ],
)
def test_exit_code_and_message(capsys, error, code, message):
    assert end_of(error, capsys) == (code, message)


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (OSError(errno.EMFILE, "Too many open files"), True),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), False),
        (OSError("a library's own words"), False),
        (ValueError("no JSON"), False),
        (None, False),
    ],
)
def test_what_the_system_refused_just_then_is_not_what_is_wrong(cause, expected):
    between = UserError("it cannot be read")
    between.__cause__ = cause
    error = UserError("left out")
    error.__cause__ = between
    assert is_of_the_moment(error) is expected


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_is_no_defect(capsys, error):
    code, said = end_of(error, capsys)
    assert code == 2 and said.startswith("error: memory ran out; ") and said.endswith("left behind [memory-host]\n")


def test_limits_of_the_process_are_said_with_what_lifts_them(capsys):
    assert "ulimit -n" in end_of(OSError(errno.EMFILE, "Too many open files", "/x"), capsys)[1]
    assert "ulimit -f" in end_of(OSError(errno.EFBIG, "File too large", "/x"), capsys)[1]


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (UserError("the disk is full", "x"), "error: the disk is full. What is finished stays [x]\n"),
        (KeyboardInterrupt(), "interrupted; what is finished stays\n"),
        (OSError(28, "No space left on device"), "error: No space left on device; what is finished stays [os-error]\n"),
    ],
)
def test_what_stays_is_said_in_every_case(capsys, error, ending):
    error.kept = "what is finished stays"
    assert end_of(error, capsys)[1] == ending


@pytest.mark.parametrize("error", [ValueError("a defect"), ModuleNotFoundError("no utils.x", name="utils.x")])
def test_a_defect_of_ours_keeps_its_traceback(error, capsys):
    def main():
        raise error

    error.kept = "what is finished stays"
    with pytest.raises(type(error)) as caught:
        run_command(main)
    assert caught.value is error and capsys.readouterr().err == "what is finished stays\n"


def test_a_current_folder_that_was_removed_is_named(tmp_path, monkeypatch, capsys):
    plain = FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert end_of(plain, capsys)[1].endswith("[os-error]\n")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, said = end_of(plain, capsys)
    assert code == 2 and said.endswith("[folder-removed]\n")


def test_what_a_library_says_fits_on_a_line():
    assert brief(ValueError("first:\n\n  second")) == "first: second"
    assert brief(ValueError()) == "ValueError"
    assert brief(ValueError("x" * 500), 10) == "xxxxxxx..."


def test_problems_are_collected():
    raise_collected([], "config")
    with pytest.raises(UserError) as one:
        raise_collected([Problem("a is 0", "zero")] * 2, "config")
    assert (str(one.value), one.value.code) == ("config: a is 0", "zero")
    with pytest.raises(UserError) as two:
        raise_collected([Problem("a is 0", "zero"), Problem("b is 1", "one")], "config")
    assert str(two.value) == "config: 2 problems\n  - a is 0\n  - b is 1"
    assert (two.value.code, two.value.codes) == ("several", ("zero", "one"))


SCRIPT = """
import sys
from utils.errors import run_command

def main():
    {body}

run_command(main, one_result={one_result})
"""


def run(body: str, redirect: str = "", one_result: str = "False", **environment: str) -> subprocess.CompletedProcess:
    command = f'"$0" -c "$1" {redirect}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, sys.executable, SCRIPT.format(body=body, one_result=one_result)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


REMEDY = "(standard output): let it go to a file, or to a reader that takes all of it"


def test_a_reader_that_goes_away_is_said():
    ended = run("[print('x' * 1000) for _ in range(100000)]", "| head -n 1")
    assert ended.stdout == "x" * 1000 + "\n"
    assert ended.stderr == f"error: Broken pipe {REMEDY}; nothing unfinished was left behind [stdout-unwritable]\n"
    assert ended.returncode == 2


def test_a_reader_of_everything_that_goes_away_ends_it_all_the_same():
    ended = run("[print('x' * 1000) for _ in range(100000)]", "2>&1 | head -n 1")
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "x" * 1000 + "\n", "")


@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_no_failure(redirect):
    ended = run("print('out'); print('err', file=sys.stderr); sys.stderr.write('more')", redirect)
    assert ended.returncode == 0
    assert "Traceback" not in ended.stderr + ended.stdout


def test_a_full_device_behind_stdout_is_said():
    ended = run("print('out')", "> /dev/full")
    assert ended.returncode == 2
    left = "nothing unfinished was left behind"
    assert ended.stderr == f"error: No space left on device {REMEDY}; {left} [stdout-unwritable]\n"


@pytest.mark.parametrize("ending", ["raise UserError('the model is odd', 'x')", "raise KeyboardInterrupt"])
def test_what_waits_for_a_full_stdout_does_not_change_the_ending(ending):
    ended = run(f"from utils.errors import UserError; print('out'); {ending}", "> /dev/full")
    assert ended.returncode == (130 if "Keyboard" in ending else 2)
    assert ended.stderr.count("\n") == 1 and "space" not in ended.stderr


PUBLISHED = "from utils.signals import finish; finish(); print('wrote')"


@pytest.mark.parametrize(
    ("then", "redirect", "said"),
    [
        ("", "> /dev/full", "No space left on device (standard output)"),
        ("; raise OSError(5, 'Input/output error', '/x')", "", "Input/output error (/x)"),
    ],
)
def test_the_result_is_there_whatever_fails_after_it(then, redirect, said):
    ended = run(PUBLISHED + then, redirect, one_result="True")
    assert ended.returncode == 0
    assert ended.stderr == f"warning: {said}; the result is complete and in its place\n"


def test_a_locale_without_the_character_is_no_failure():
    ended = run("print('caf\\u00e9 \\udc80')", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (ended.returncode, ended.stdout) == (0, "caf\\xe9 \\udc80\n")


def test_a_traceback_with_its_cause_where_it_is_asked_for(run_command_line):
    words = ("lewis_importance.py", "--config", "nowhere.yaml", "--out_dir", "out")
    plain, shown = run_command_line(*words), run_command_line(*words, "--traceback")
    assert refusal_code(plain) == "file-missing"
    assert shown.returncode == 2 and shown.stderr.endswith(plain.stderr)
    assert "FileNotFoundError: [Errno 2]" in shown.stderr and "the direct cause of the following" in shown.stderr
    assert shown.stderr.count("Traceback (most recent call last)") == 2


def test_a_long_message_is_cut_in_the_middle_of_whole_lines(capsys):
    lines = [f"line {number} of a message that goes on and on" for number in range(2000)]
    code, written = end_of(UserError("\n".join(lines), "several"), capsys)
    assert code == 2 and len(written) < 2200
    shown = written.removeprefix("error: ").removesuffix(" [several]\n").splitlines()
    assert shown[0] == lines[0] and shown[-1] == lines[-1]
    (place,) = [number for number, line in enumerate(shown) if line not in lines]
    left_out = len("\n".join(lines)) - len("\n".join(shown[:place])) - len("\n".join(shown[place + 1 :]))
    assert str(left_out) in shown[place]


@pytest.mark.parametrize("length", [2048, 2049, 20_000])
def test_a_message_without_lines_is_cut_too(length, capsys):
    message = "x" * (length - 1) + "!"
    code, written = end_of(UserError(message), capsys)
    assert code == 2 and written.rstrip().endswith("!") and len(written) < 2200
    assert (message in written) == (length <= 2048)

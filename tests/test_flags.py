"""Flags: underscores and dashes, booleans that mean what they say, mistakes named with the remedy.

python -m pytest tests/test_flags.py
"""

import math
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from utils.flags import FlagParser, boolean, number, path, whole_number


@pytest.fixture(autouse=True)
def handlers_restored():
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def parser() -> FlagParser:
    flags = FlagParser(prog="some.py", description="Does something.")
    flags.flag("out_dir", "where to write", required=True)
    flags.flag("gamma", "lower bound, 50% say", type=number(0, 1), default=0.3)
    flags.flag("count", "how many", type=whole_number(1, 100))
    flags.flag("kind", "which", choices=("a", "b"), default="a")
    flags.switch("lazy_unpickle", "read lazily")
    flags.switch("low_cpu_memory", "default on", default=True)
    flags.switch("cuda", "not said", default=None)
    return flags


def parse(*words: str):
    return parser().parse(["--out_dir", "x", *words])


def refusal(capsys, code: str, *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parser().parse(list(words))
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.endswith(f"(`some.py --help` explains every flag) [{code}]\n")
    assert len(err.splitlines()) == 2
    return err


# --- booleans ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["True", "true", "TRUE", "yes", "on", "1", " True "])
def test_words_for_true(word):
    assert boolean(word) is True
    assert parse("--lazy_unpickle", word).lazy_unpickle is True


@pytest.mark.parametrize("word", ["False", "false", "FALSE", "no", "off", "0"])
def test_words_for_false(word):
    assert boolean(word) is False
    assert parse("--low_cpu_memory", word).low_cpu_memory is False
    assert parse(f"--low-cpu-memory={word}").low_cpu_memory is False


@pytest.mark.parametrize("word", ["", "maybe", "2", "nope", "none", "tru"])
def test_anything_else_is_refused(capsys, word):
    with pytest.raises(ArgumentTypeError, match="neither True nor False"):
        boolean(word)
    said = refusal(capsys, "flag-invalid", "--out_dir", "x", f"--lazy_unpickle={word}")
    assert said.startswith(f"error: argument --lazy_unpickle: {word!r} is neither True nor False")


@pytest.mark.parametrize(
    ("words", "lazy", "low"),
    [
        ((), False, True),
        (("--lazy_unpickle",), True, True),
        (("--lazy-unpickle", "--no-low-cpu-memory"), True, False),
        (("--no-lazy_unpickle", "--no_low_cpu_memory"), False, False),
        (("--lazy_unpickle", "--kind", "b"), True, True),
    ],
)
def test_switches(words, lazy, low):
    flags = parse(*words)
    assert (flags.lazy_unpickle, flags.low_cpu_memory, flags.cuda) == (lazy, low, None)


def test_a_negated_switch_takes_no_value(capsys):
    assert "--no-lazy-unpickle takes no value" in refusal(
        capsys, "flag-invalid", "--out_dir", "x", "--no-lazy-unpickle", "True"
    )


# --- spellings --------------------------------------------------------------------------------------------------------


def test_dashes_and_underscores_are_the_same_flag():
    assert parser().parse(["--out-dir", "y"]).out_dir == "y"
    assert parser().parse(["--out_dir=y"]).out_dir == "y"


def test_the_same_value_twice_is_fine_another_is_not(capsys):
    assert parse("--out-dir", "x").out_dir == "x"
    assert "--out_dir is given twice, as 'x' and as 'y'" in refusal(
        capsys, "flag-twice", "--out_dir", "x", "--out-dir", "y"
    )
    said = refusal(capsys, "flag-twice", "--out_dir", "x", "--lazy_unpickle", "--no-lazy-unpickle")
    assert "--lazy_unpickle is given twice, as 'True' and as 'False'" in said
    assert not hasattr(parse(), "_given")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--out_dir", "x", "--gama", "0.3"), "unknown argument '--gama'; did you mean --gamma?"),
        (("--out_dri", "x"), "unknown argument '--out_dri'; did you mean --out_dir?"),  # the required one misspelled
        (("--out_dir", "x", "--gamm=0.3"), "unknown argument '--gamm=0.3'; did you mean --gamma?"),
        (("--out_dir", "x", "--out", "y"), "unknown argument '--out'"),  # no abbreviations
        (("--out_dir", "x", "--zzzzz"), "unknown argument '--zzzzz'; --help lists the flags"),
        (("--out_dir", "x", "#delta", "dfs"), "unknown argument '#delta'; --help lists the flags"),  # pasted comment
        (("--out_dir", "x", " "), "unknown argument ' '"),  # a space after the backslash at a line's end
        ((), "the following arguments are required: --out_dir"),
        (("--out_dir",), "expected one argument"),
        (("--out_dir", "x", "--kind", "c"), "invalid choice: 'c'"),
        (("--out_dir", "x", "--kind", "A"), "invalid choice: 'A'"),
    ],
)
def test_mistakes_get_the_nearest_flag(capsys, words, expected):
    code = "flag-unknown" if expected.startswith("unknown") else "flag-invalid"
    assert expected in refusal(capsys, code, *words)


def test_help_shows_each_flag_once_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parser().parse(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "--out_dir OUT_DIR where to write" in shown
    assert "lower bound, 50% say [default: 0.3]" in shown
    assert "--low_cpu_memory default on [default: True]" in shown and "--no-NAME" in shown
    assert shown.startswith("usage: some.py --out_dir OUT_DIR [flags] Does something.")
    assert "--out-dir" not in shown and "--no-lazy" not in shown


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nan", "'nan' is not a finite number"),
        ("inf", "'inf' is not a finite number"),
        ("-inf", "'-inf' is not a finite number"),
        ("1e999", "'1e999' is not a finite number"),
        ("0,3", "'0,3' is not a number (write the decimal point as '.')"),
        ("", "'' is not a number"),
        ("1.01", "1.01 is outside [0, 1]"),
        ("-0.1", "-0.1 is outside [0, 1]"),
    ],
)
def test_numbers_refused(capsys, text, expected):
    assert expected in refusal(capsys, "flag-invalid", "--out_dir", "x", f"--gamma={text}")


def test_numbers_accepted():
    assert number(0, 1)("0") == 0 and number(0, 1)("1") == 1 and number()("-1e-3") == -0.001
    with pytest.raises(ArgumentTypeError, match=r"0 is outside \(0, 1\]"):
        number(0, 1, low_open=True)("0")


@given(st.floats())
def test_a_number_comes_back_as_it_was_or_is_refused(value):
    parse_unit = number(0, 1)
    try:
        assert parse_unit(repr(value)) == value
    except ArgumentTypeError:
        assert not (math.isfinite(value) and 0 <= value <= 1)


@pytest.mark.parametrize("text", ["1.5", "ten", "", "0x10", "nan"])
def test_whole_numbers_refused(text):
    with pytest.raises(ArgumentTypeError, match="is not a whole number"):
        whole_number(1, 100)(text)


def test_without_an_upper_bound_the_lower_one_is_said():
    with pytest.raises(ArgumentTypeError, match="0 is not at least 1"):
        whole_number(1)("0")
    with pytest.raises(ArgumentTypeError, match="0 is not above 0"):
        number(0, low_open=True)("0")


def test_whole_number_bounds(capsys):
    assert (whole_number(1, 100)("1"), whole_number(1, 100)("100")) == (1, 100)
    assert "101 is outside [1, 100]" in refusal(capsys, "flag-invalid", "--out_dir", "x", "--count", "101")
    assert "0 is outside [1, 100]" in refusal(capsys, "flag-invalid", "--out_dir", "x", "--count", "0")


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert path("~/x") == Path("/somewhere/x")
    assert path("a b ") == Path("a b ")
    for text in ("", "  "):
        with pytest.raises(ArgumentTypeError, match="the path is empty"):
            path(text)
    with pytest.raises(ArgumentTypeError, match="no such user's home folder"):
        path("~no_such_user/x")
    monkeypatch.delenv("HOME")
    assert path("~/x").is_absolute()  # from the user database


def test_parsing_needs_no_heavy_import():
    code = (
        "import sys; import utils.flags, utils.errors, utils.pair.config, utils.publishing.files, utils.models.checkpoints\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'mergekit', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_every_command_can_be_quiet_and_show_tracebacks():
    assert (parse().quiet, parse("--quiet").quiet, parse("--no-quiet").quiet) == (False, True, False)
    assert vars(parse("--traceback", "False")) == vars(parse())


def test_a_switch_leaves_words_of_no_flag_to_the_command():
    def read(*words):
        parser = FlagParser(prog="x")
        parser.add_argument("names", nargs="*")
        parser.switch("controls", "uniform merges", default=True)
        found = parser.parse(list(words))
        return found.names, found.quiet, found.controls

    assert read("--quiet", "a.yaml", "b") == (["a.yaml", "b"], True, True)
    assert read("--no-controls", "a.yaml") == (["a.yaml"], False, False)
    assert read("a.yaml", "--controls", "False", "--quiet") == (["a.yaml"], True, False)

"""Local data files: every format gives the same rows; a broken line is named; nothing is guessed.

python -m pytest tests/pair/test_rows.py
"""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.refusals import refused
from utils.errors import UserError
from utils.pair.rows import READERS, local_rows, looks_like_file

ROWS = [
    {"q": "plain", "a": "1"},
    {"q": "two\nlines, a comma and \"quotes\"", "a": ""},
    {"q": "\u05e9\u05dc\u05d5\u05dd \U0001f600 e\u0301", "a": " spaced "},
]  # fmt: skip


def csv_text(rows) -> str:
    def field(value):
        return '"' + value.replace('"', '""') + '"'

    return "\n".join(",".join(map(field, row)) for row in [rows[0].keys(), *(row.values() for row in rows)]) + "\n"


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows{kind}"
    if kind in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == ".csv":
        path.write_text(csv_text(ROWS), encoding="utf-8")
    elif kind == ".parquet":
        import pandas as pd

        pd.DataFrame(ROWS).to_parquet(path)
    return path


def refusal(code: str, path: Path) -> str:
    before = path.read_bytes() if path.is_file() else None
    with refused(code) as caught:
        local_rows(str(path))
    assert before is None or path.read_bytes() == before
    message = str(caught.value)
    assert message.startswith("dataset.path ") and len(message) < 1000 and "\n" not in message
    return message


# --- the same rows from every format ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = local_rows(str(write(tmp_path, kind)))
    assert len(rows) == 3
    assert [dict(rows[i]) for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]  # in any order


@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_text_files_have_one_row_a_line(tmp_path, kind):
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n  second\n\t\nlast")
    rows = local_rows(str(path))
    assert [row["text"] for row in rows] == ["first", "  second", "last"]


def test_json_lines_in_a_json_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row["a"] for row in local_rows(str(path))] == [1, 2]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_windows_line_ends_and_blank_lines(tmp_path, kind):
    content = {
        ".jsonl": '{"a": "x"}\r\n\r\n{"a": "y"}\r\n',
        ".json": '\r\n[{"a": "x"},\r\n{"a": "y"}]\r\n',
        ".csv": "a\r\nx\r\n\r\ny\r\n",
    }[kind]
    path = tmp_path / f"rows{kind}"
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert [dict(row) for row in local_rows(str(path))] == [{"a": "x"}, {"a": "y"}]


def test_values_keep_their_types(tmp_path):
    import pandas as pd

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"m": messages, "n": None, "i": 3, "f": 0.5, "b": True}) + "\n")
    assert local_rows(str(tmp_path / "x.jsonl"))[0] == {"m": messages, "n": None, "i": 3, "f": 0.5, "b": True}
    pd.DataFrame({"m": [messages, messages], "n": ["x", None], "f": [0.5, None]}).to_parquet(tmp_path / "x.parquet")
    rows = local_rows(str(tmp_path / "x.parquet"))
    assert rows[0] == {"m": messages, "n": "x", "f": 0.5}
    assert rows[1] == {"m": messages, "n": None, "f": None}


def test_csv_values_are_text_as_written(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,c\n007,NA,1e5\nnan,,NULL\n")
    assert [dict(row) for row in local_rows(str(tmp_path / "x.csv"))] == [
        {"a": "007", "b": "NA", "c": "1e5"},
        {"a": "nan", "b": "", "c": "NULL"},
    ]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_a_row_of_ten_megabytes(tmp_path, kind):
    long = "word " * 2_000_000
    path = tmp_path / f"x{kind}"
    path.write_text({".jsonl": json.dumps({"text": long}), ".csv": f"text\n{long}\n", ".txt": long}[kind])
    assert local_rows(str(path))[0]["text"] == long


@pytest.mark.parametrize("kind", sorted(READERS))
def test_an_empty_file_has_no_rows_or_is_refused(tmp_path, kind):
    path = tmp_path / f"x{kind}"
    path.touch()
    if kind == ".parquet":
        refusal("text-invalid", path)
    else:
        assert len(local_rows(str(path))) == 0


def test_mixed_schemas_are_rows_like_any_other(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": "x", "c": []}\n{}\n')
    assert list(local_rows(str(tmp_path / "x.jsonl"))) == [{"a": 1}, {"b": "x", "c": []}, {}]


# --- refused ----------------------------------------------------------------------------------------------------------

BROKEN = {
    "a broken line": (".jsonl", b'{"a": 1}\n\n{"a": \n', "text-invalid", "line 3"),
    "a trailing comma": (".jsonl", b'{"a": 1,}\n', "text-invalid", "line 1"),
    "a comma between rows": (".jsonl", b'{"a": 1},\n{"a": 2}\n', "text-invalid", "line 1"),
    "a truncated last line": (".jsonl", b'{"a": 1}\n{"a": "x', "text-invalid", "line 2"),
    "a row that is a list": (".jsonl", b"[1]\n", "text-bad-row", "line 1"),
    "a row that is text": (".jsonl", b'"x"\n', "text-bad-row", "line 1"),
    "Latin-1": (".jsonl", '{"a": "caf\u00e9"}\n'.encode("latin-1"), "text-not-utf8", "line 1"),
    "UTF-16": (".jsonl", '{"a": 1}\n'.encode("utf-16"), "text-not-utf8", "line 1"),
    "binary bytes": (".jsonl", bytes(range(128, 256)), "text-not-utf8", "line 1"),
    "nested too deeply": (".jsonl", b"[" * 100_000, "text-invalid", "line 1"),
    "a number of many digits": (".jsonl", b'{"a": ' + b"9" * 5000 + b"}", "text-invalid", "line 1"),
    "a text line in Latin-1": (".txt", b"fine\ncaf\xe9\n", "text-not-utf8", "line 2"),
    "a JSON list cut short": (".json", b'[{"a": 1},', "text-invalid", ""),
    "a JSON list of numbers": (".json", b"[1, 2]", "text-bad-row", ""),
    "a JSON list of many digits": (".json", b"[" + b"9" * 5000 + b"]", "text-invalid", ""),
    "a JSON list in Latin-1": (".json", '[{"a": "caf\u00e9"}]'.encode("latin-1"), "text-not-utf8", "byte 11"),
    "a JSON object over several lines": (".json", b'{\n "data": [{"a": 1}]\n}', "text-invalid", "line 1"),
    "too many fields": (".csv", b"a,b\n1,2\n1,2,3\n", "text-bad-row", "line 3"),
    "too many fields in every row": (".csv", b"a,b\n1,2,3\n4,5,6\n", "text-bad-row", "line 2"),
    "too few fields": (".csv", b"a,b\n1\n", "text-bad-row", "line 2"),
    "an open quote": (".csv", b'a,b\n"1,2\n3,4\n', "text-invalid", ""),
    "text behind a quote": (".csv", b'a,b\n"1"x,2\n', "text-invalid", "line 2"),
    "a column twice": (".csv", b"a,b,a\n1,2,3\n", "text-column-twice", ""),
    "a CSV in Latin-1": (".csv", b"a\ncaf\xe9\n", "text-not-utf8", "byte 5"),
    "a long CSV in Latin-1": (".csv", b"a\n" + b"x\n" * 50_000 + b"caf\xe9\n", "text-not-utf8", "byte 100005"),
    "a CSV in UTF-16": (".csv", "a\nb\n".encode("utf-16"), "text-not-utf8", "byte 0"),
    "a text as Parquet": (".parquet", b"PAR1 but not really PAR1", "text-invalid", ""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_the_line(tmp_path, case):
    kind, content, code, place = BROKEN[case]
    path = tmp_path / f"x{kind}"
    path.write_bytes(content)
    assert place in refusal(code, path)


WORDING = {
    "a comma between rows": "dataset.path PATH, line 1: not valid JSON: Extra data: line 1 column 9 (char 8)",
    "a row that is a list": "dataset.path PATH, line 1: a row must be an object, got list",
    "Latin-1": "dataset.path PATH, line 1: not UTF-8 text (byte 10); save it as UTF-8",
    "a JSON list of numbers": "dataset.path PATH must hold a list of objects",
    "a CSV in Latin-1": "dataset.path PATH is not UTF-8 text (byte 5); save it as UTF-8",
    "too few fields": "dataset.path PATH, line 2: 1 fields where the first line has 2 (fields are separated by commas; "
    "quote a field that holds one)",
    "a column twice": "dataset.path PATH: a column is given twice (a, b, a); rename one",
}


@pytest.mark.parametrize("case", WORDING)
def test_what_a_message_says(tmp_path, case):
    kind, content, code, _ = BROKEN[case]
    path = tmp_path / f"x{kind}"
    path.write_bytes(content)
    assert refusal(code, path) == WORDING[case].replace("PATH", str(path))


def test_a_parquet_file_with_a_column_twice(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([[1], [2]], names=["a", "a"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    assert "(a, a)" in refusal("text-column-twice", tmp_path / "x.parquet")


def test_a_parquet_file_whose_text_is_no_text(tmp_path):
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b"caf\xe9", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"a": broken}), tmp_path / "x.parquet")
    assert "is not a readable Parquet file" in refusal("text-invalid", tmp_path / "x.parquet")


def write_groups(path: Path, rows: int, group: int, text: str) -> list[dict]:
    """A Parquet file with `group` rows each group, of long texts that are all alike but for the last row."""
    import pyarrow
    import pyarrow.parquet

    values = [{"a": text, "m": [{"role": "user", "content": text}], "n": number} for number in range(rows)]
    values[-1] = {"a": None, "m": [], "n": -1}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path, row_group_size=group)
    return values


@pytest.mark.parametrize("kept", [0, 4000, 2**29])
def test_rows_of_a_parquet_file_in_groups(tmp_path, monkeypatch, kept):
    monkeypatch.setattr("utils.pair.rows.PARQUET_KEPT_BYTES", kept)
    values = write_groups(tmp_path / "x.parquet", 10, 4, "word " * 100)
    rows = local_rows(str(tmp_path / "x.parquet"))
    assert [rows[number] for number in (3, 9, 0, -1, 4, 8, 5)] == [values[number] for number in (3, 9, 0, -1, 4, 8, 5)]
    assert list(rows) == values
    with pytest.raises(IndexError):
        rows[10]


def test_a_parquet_file_that_unpacks_to_far_more_than_it_holds(tmp_path):
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 20_000), ["word " * 10_000]
    )  # a gigabyte written out
    table = pyarrow.table({"a": text, "n": [*range(19_999), -1]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=5000, store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 2**20
    script = f"""
import resource
from utils.pair.rows import local_rows
import pyarrow.parquet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = local_rows({str(tmp_path / "x.parquet")!r})
assert rows[19_998]["a"].startswith("word word") and rows[19_999]["n"] == -1
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert int(done.stdout) < 200_000, done.stderr  # KiB


def test_a_group_of_rows_that_is_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.pair.rows.PARQUET_MOST_GROUP_BYTES", 10)
    assert "row_group_size" in refusal("text-row-group-too-large", write(tmp_path, ".parquet"))


def test_a_parquet_file_below_a_folder_with_an_equals_sign_gains_no_column(tmp_path):
    (tmp_path / "split=train").mkdir()
    assert dict(local_rows(str(write(tmp_path / "split=train", ".parquet")))[0]) == ROWS[0]


def zipped(content: bytes, folder: Path) -> bytes:
    with zipfile.ZipFile(folder / "z.zip", "w") as file:
        file.writestr("x.jsonl", content)
    return (folder / "z.zip").read_bytes()


@pytest.mark.parametrize("kind", sorted(READERS))
@pytest.mark.parametrize("method", ["gzip", "bzip2", "xz", "zip"])
def test_compressed_files_under_any_name(tmp_path, kind, method):
    content = b'{"text": "x"}\n'
    packed = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zip": lambda c: zipped(c, tmp_path)}
    path = tmp_path / f"x{kind}"
    path.write_bytes(packed[method](content))
    assert f"is compressed ({method}), whatever its name says; unpack it first" in refusal("text-compressed", path)


def test_paths_that_are_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "x.pdf").write_text("x")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path, code in {
        "none.jsonl": "text-missing",
        "folder.jsonl": "text-is-folder",
        "x.pdf": "text-kind",
        "x.jsonl.gz": "text-missing",
        "loop.jsonl": "text-missing",
        "pipe.jsonl": "text-not-a-file",
        "/dev/zero": "text-not-a-file",
        "https://example.org/x.jsonl": "text-url",
        "~no_such_user/x.jsonl": "text-missing",
        "x" * 300 + ".jsonl": "text-missing",
    }.items():
        with refused(code) as caught:
            local_rows(path)
        assert str(caught.value).startswith(f"dataset.path {path}")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    import builtins

    path = write(tmp_path, ".jsonl")

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(builtins, "open", denied)
    with refused("text-unreadable"):
        local_rows(str(path))


@pytest.mark.parametrize(
    ("path", "local"),
    [
        ("openai/gsm8k", False), ("rows.jsonl", True), ("a/b.CSV", True), ("./x", True), ("~/x", True), ("/x", True),
        ("there", True), ("x" * 5000, False), ("https://example.org/x.jsonl", True), ("a\0b", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_file(tmp_path, monkeypatch, path, local):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    assert looks_like_file(path) is local


def test_a_line_file_is_not_kept_in_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "x.jsonl"
    path.write_text((json.dumps({"text": "x" * 10_000}) + "\n") * 2_000)  # 20 MB
    tracemalloc.start()
    rows = local_rows(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(rows) == 2_000 and len(rows[1_999]["text"]) == 10_000
    assert peak < 2_000_000


# --- fuzz -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_fuzz_mutated_file(tmp_path, kind):
    if kind == ".txt":
        (tmp_path / "rows.txt").write_text("one\ntwo\n")
    valid = write(tmp_path, kind).read_bytes()

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def check(data):
        content = bytearray(valid)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            piece = data.draw(
                st.binary(max_size=3) | st.sampled_from([b"\n", b'"', b",", b"{", b"]", b"\0", b"NaN", b"\xed\xa0\x80"])
            )
            content[at : at + data.draw(st.integers(0, 3))] = piece
        path = tmp_path / f"fuzz{kind}"
        path.write_bytes(bytes(content))
        try:
            rows = local_rows(str(path))
            assert all(isinstance(dict(rows[i]), dict) for i in range(len(rows)))
        except UserError as error:
            assert len(str(error)) < 1000

    check()

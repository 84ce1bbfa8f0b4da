"""One reader for all measured tables: what is there comes back in its kind, what is wrong is said once, by its code."""

import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.refusals import refused
from utils.guidance.columns import TableFormat, expert, grid_problems, number, read_tables, row_problems, text, whole

PARTS = TableFormat(
    "parts.csv",
    (
        expert("model"),
        whole("layer", -1, below=9),
        text("component", blank=True),
        number("spread"),
        number("shift", -9.0),
    ),
    key=("model", "layer"),
)
KINDS = TableFormat("kinds.csv", (text("kind", names=("block", "tensor")),), last=(text("note"),), may_be_empty=True)
ROWS = [("code", -1, "", 0.5, -1.0), ("code", 0, "q", 1e-300, 2.0), ("math", 0, "NA", 3.0, 0.1)]
EXPERTS = ("code", "math")


def read(folder, content: str | bytes, form: TableFormat = PARTS):
    (folder / form.file).write_bytes(content.encode() if isinstance(content, str) else content)
    return read_tables(folder, [form], EXPERTS)[0]


def changed(line: int, column: str, value: str) -> str:
    table = [row.split(",") for row in PARTS.content(ROWS).decode().splitlines()]
    table[line - 1][PARTS.names.index(column)] = value
    return "".join(",".join(row) + "\n" for row in table)


def test_a_table_comes_back_as_it_was_written(tmp_path):
    table = read(tmp_path, PARTS.content(ROWS))
    assert list(table.itertuples(index=False, name=None)) == ROWS  # NA is a name, an empty component is ""
    assert [table[name].dtype.kind for name in ("layer", "spread", "shift")] == ["i", "f", "f"]


@given(st.lists(st.floats(min_value=0, allow_infinity=False), min_size=1))
def test_numbers_come_back_bit_for_bit(tmp_path_factory, values):
    rows = [("code", 0, "q", value, 0.0) for value in values]
    form = TableFormat(PARTS.file, PARTS.columns)
    assert read(tmp_path_factory.mktemp("numbers"), form.content(rows), form)["spread"].tolist() == values


def test_names_may_look_like_numbers(tmp_path):
    form = TableFormat("names.csv", (expert("model"), whole("layer")))
    (tmp_path / "names.csv").write_bytes(form.content([("01", 1), ("1e3", 2), ("nan", 3)]))
    (table,) = read_tables(tmp_path, [form], ("01", "1e3", "nan"))
    assert table["model"].tolist() == ["01", "1e3", "nan"]


@pytest.mark.parametrize(
    ("line", "column", "value", "code", "words"),
    [
        (2, "model", "maths", "table-unknown-expert", "parts.csv: model 'maths' is not an expert of the config"),
        (3, "layer", "0.5", "table-bad-value", "parts.csv, line 3 (model code, layer 0.5): layer is 0.5, not a whole number"),
        (3, "layer", "-2", "table-bad-value", "layer is -2, not a whole number of at least -1, below 9"),
        (3, "layer", "9", "table-bad-value", "layer is 9"),
        (3, "layer", "", "table-bad-value", "layer is nan"),
        (3, "layer", "first", "table-bad-value", "layer is 'first'"),
        (4, "spread", "-0.1", "table-bad-value", "line 4 (model math, layer 0): spread is -0.1, not a finite number of at least 0"),
        (4, "spread", "nan", "table-bad-value", "spread is 'nan'"),
        (4, "spread", "inf", "table-bad-value", "spread is inf"),
        (4, "spread", "many", "table-bad-value", "spread is 'many'"),
        (4, "shift", "-10", "table-bad-value", "shift is -10.0, not a finite number of at least -9"),
        (3, "layer", "-1", "table-row-twice", "line 3 (model code, layer -1) is there twice"),
    ],
)  # fmt: skip
def test_a_value_that_is_wrong(tmp_path, line, column, value, code, words):
    with refused(code) as caught:
        read(tmp_path, changed(line, column, value))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("kind\nhead\n", "table-bad-value"),
        ("kind,note\nblock,\n", "table-bad-value"),
        ("kind,more\nblock,x\n", "table-columns"),
        ("note\nblock\n", "table-columns"),
        ("kind,kind\nblock,block\n", "table-unreadable"),
        ("kind\nblock\n\ntensor\n", "table-unreadable"),
        ("kind\nblock,tensor,head\n", "table-unreadable"),
        (b"kind\n\xff\n", "table-unreadable"),
        ("", "table-unreadable"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, content, code):
    with refused(code):
        read(tmp_path, content, KINDS)


def test_last_columns_and_rows_where_none_are_needed(tmp_path):
    assert list(read(tmp_path, "kind,note\nblock,x\n", KINDS).columns) == ["kind", "note"]
    assert list(read(tmp_path, "kind\nblock\n", KINDS).columns) == ["kind"]
    assert read(tmp_path, "kind\n", KINDS).empty


def test_a_table_that_is_missing_or_empty(tmp_path):
    with refused("table-missing") as caught:
        read_tables(tmp_path, [PARTS], EXPERTS)
    assert "parts.csv is missing; run lewis_importance.py" in str(caught.value)
    with refused("table-no-rows"):
        read(tmp_path, PARTS.content([]))


def test_what_is_wrong_with_several_tables_is_in_one_message(tmp_path):
    (tmp_path / PARTS.file).write_text(changed(2, "spread", "x").replace(",0.1", ",y"))
    (tmp_path / KINDS.file).write_text("kind\nblock\nhead\nlimb\n")
    with refused("table-bad-value") as caught:
        read_tables(tmp_path, [PARTS, KINDS], EXPERTS)
    said = str(caught.value)
    assert "3 problems" in said and "'x'" in said and "'y'" in said and "not one of block, tensor (2 such rows)" in said


def test_rows_that_are_missing_and_rows_too_many():
    table = PARTS.frame(ROWS)
    found = row_problems(PARTS, table, [("code", 0), ("code", 1), ("math", 0)])
    assert [problem.code for problem in found] == ["table-row-missing", "table-row-unexpected"]
    assert found[0].text == "parts.csv: no row for model code, layer 1"
    assert found[1].text == "parts.csv: model code, layer -1: there should be no such row"


def test_a_component_is_in_a_layer_once():
    table = pd.DataFrame({"layer": [0, 1, 0, 0], "component": ["q", "q", "v", "v"]})
    found = grid_problems(table, "parts.csv")
    assert [(problem.code, problem.text.partition(";")[0]) for problem in found] == [
        ("table-row-twice", "parts.csv: 2 rows for layer 0, component v"),
    ]


def test_minus_infinity_as_the_least_lets_every_finite_number_pass(tmp_path):
    form = TableFormat("any.csv", (number("value", least=-math.inf),))
    assert read(tmp_path, form.content([(-1e300,), (0.0,)]), form)["value"].tolist() == [-1e300, 0.0]
    with refused("table-bad-value"):
        read(tmp_path, "value\n-inf\n", form)

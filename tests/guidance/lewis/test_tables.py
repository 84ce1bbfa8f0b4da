"""LEWIS's tables: written in the reference's layout, read strictly; a message names the file that is at fault."""

import pandas as pd
import pytest

from tests.refusals import refused
from utils.guidance.lewis.tables import NORM_TABLE, read_measurements, table_files

LAYERS, PARTS = 3, ("q", "up")
EXPERTS = ("math", "code")


def tables() -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    deltas = {
        name: pd.DataFrame({part: [0.1 * layer for layer in range(LAYERS)] for part in PARTS}) for name in EXPERTS
    }
    norms = NORM_TABLE.frame(
        (model, layer, part, f"layers.{layer}.{part}.weight", 1.5, 12)
        for model in ("base", *EXPERTS)
        for layer in range(LAYERS)
        for part in PARTS
    )
    return deltas, norms


def saved(folder, deltas, norms=None, without=()):
    files = table_files(deltas, tables()[1] if norms is None else norms, "base")
    for name, content in files.items():
        if name not in without:
            (folder / name).write_bytes(content)
    return folder


def read(folder, components=PARTS):
    return read_measurements(folder, EXPERTS, "base", components, has_norms=True)


def lost_row(frame: pd.DataFrame, row: int) -> pd.DataFrame:
    return frame.drop(index=frame.index[row])


def test_what_was_written_is_read(tmp_path):
    deltas, norms = tables()
    found = read(saved(tmp_path, deltas))
    for name in EXPERTS:
        pd.testing.assert_frame_equal(found.deltas[name], deltas[name], check_exact=True)
    pd.testing.assert_frame_equal(found.norms, norms, check_dtype=False)
    assert found.warnings == ()
    header = (tmp_path / "math_delta.csv").read_text().splitlines()[0]
    assert header == "q_delta_math_base,up_delta_math_base"  # the reference's names


@pytest.mark.parametrize("with_norms", [True, False])
@pytest.mark.parametrize("row", [0, 1, -1])
def test_a_row_lost_from_one_experts_deltas_is_that_files_fault(tmp_path, with_norms, row):
    deltas, _ = tables()
    deltas["math"] = lost_row(deltas["math"], row)
    saved(tmp_path, deltas, without=() if with_norms else ("norms.csv",))
    with refused("table-row-missing") as caught:
        read(tmp_path)
    said = str(caught.value)
    assert "a row is missing from math_delta.csv" in said and said.count("a row is missing") == 1


def test_a_row_lost_from_all_deltas_is_theirs_not_that_of_the_norms(tmp_path):
    deltas, _ = tables()
    saved(tmp_path, {name: lost_row(frame, -1) for name, frame in deltas.items()})
    with refused("table-row-missing") as caught:
        read(tmp_path)
    said = str(caught.value)
    assert "math_delta.csv has rows for 2 layers, but norms.csv for 3: a row is missing from math_delta.csv" in said
    assert "missing from code_delta.csv" in said and "missing from norms.csv" not in said


def test_layers_lost_from_the_norms_are_theirs(tmp_path):
    deltas, norms = tables()
    saved(tmp_path, deltas, norms[norms["layer"] < LAYERS - 1])
    with refused("table-row-missing") as caught:
        read(tmp_path)
    assert "a row is missing from norms.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda norms: norms.assign(layer=0.5), "table-bad-value"),
        (lambda norms: norms.assign(params=0), "table-bad-value"),
        (lambda norms: norms.assign(norm=float("inf")), "table-bad-value"),
        (lambda norms: norms.assign(tensor=""), "table-bad-value"),
        (lambda norms: pd.concat([norms, norms[:1]]), "table-row-twice"),
    ],
)
def test_norms_that_were_edited_wrongly(tmp_path, change, code):
    deltas, norms = tables()
    with refused(code) as caught:
        read(saved(tmp_path, deltas, change(norms)))
    assert "norms.csv, line " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda deltas: deltas.assign(q=-0.1), "table-bad-value"),
        (lambda deltas: deltas.assign(q="many"), "table-bad-value"),
        (lambda deltas: deltas.drop(columns="q"), "table-columns"),
        (lambda deltas: deltas.assign(v=0.1), "table-columns"),
        (lambda deltas: deltas[:0], "table-no-rows"),
    ],
)
def test_deltas_that_were_edited_wrongly(tmp_path, change, code):
    deltas, _ = tables()
    deltas["code"] = change(deltas["code"])
    with refused(code) as caught:
        read(saved(tmp_path, deltas))
    assert "code_delta.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("0.1", "nan ", "table-bad-value"),
        ("0.1", "inf", "table-bad-value"),
        ("0.1", "", "table-bad-value"),
        ("0.1", "=cmd|0.1", "table-bad-value"),
        (",", ";", "table-unreadable"),
        ("q_delta", "up_delta", "table-unreadable"),
        ("\n", "\n\n", "table-unreadable"),
    ],
)
def test_text_of_a_table_that_was_edited_wrongly(tmp_path, old, new, code):
    path = saved(tmp_path, tables()[0]) / "code_delta.csv"
    path.write_text(path.read_text().replace(old, new, 1))
    with refused(code, "code_delta.csv, line 3" if code == "table-bad-value" else "code_delta.csv"):
        read(tmp_path)


def test_files_of_other_experts_and_files_that_are_missing(tmp_path):
    deltas, _ = tables()
    saved(tmp_path, {"math": deltas["math"], "law": deltas["code"]})
    with refused("table-missing") as caught:
        read(tmp_path)
    assert set(caught.value.codes) == {"table-missing", "table-unknown-expert"}


def test_norms_may_be_missing_with_a_warning(tmp_path):
    deltas, _ = tables()
    found = read(saved(tmp_path, deltas, without=("norms.csv",)), components=None)
    assert found.norms is None and "norms.csv is missing" in found.warnings[0]
    assert list(found.deltas["code"].columns) == list(PARTS)

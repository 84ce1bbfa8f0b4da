"""The sweep of architectures against its record, and the record against transformers' own mappings.

python -m pytest tests/architectures                              the record, and one small row
python -m pytest -m slow tests/architectures -n 2                 every row (half an hour on two free cores)

A row that has passed is not run again while no source of this project and no version has changed, so that a run that was
cut goes on where it stood. A row fails where a step is worse than it was recorded, or wrong; after a change for the better,
`python -m tests.architectures.table --rows LABEL` records it.
"""

import importlib.metadata
import json
from pathlib import Path

import pytest
import yaml

from tests.architectures.record import LEFT_OUT, RECORD, REFUSED, known_labels, severity, state
from tests.architectures.shrinking import all_rows
from tests.architectures.sweep import STEPS, read_rows, sweep
from tests.architectures.table import PAGE, page, silence
from tests.commands_here import done_here
from tests.tiny_mixtures import save_mixtures

ROWS = {row.label: row for row in read_rows()}


def recorded():
    return json.loads(RECORD.read_text())


def test_every_row_is_recorded():
    known, here = recorded(), {row.label for row in all_rows()}
    assert list(known) == sorted(ROWS)
    for label, one in known.items():
        assert {"merge", "lewis"} <= set(one["steps"]) <= set(STEPS), label
        if label in here:  # an older version of transformers has fewer
            assert one["architecture"] == ROWS[label].architecture


def test_no_row_is_recorded_as_wrong():
    wrong = [label for label, one in recorded().items() if max(map(severity, one["steps"].values())) > REFUSED]
    assert wrong == []


def test_the_page_is_that_of_the_record():
    assert PAGE.read_text() == page({label: recorded()[label] for label in ROWS})


def test_the_rows_are_those_of_transformers_mappings():
    """A row that is left out says why; those that another version adds or takes away are named."""
    left_out = yaml.safe_load(LEFT_OUT.read_text())
    found, listed = {row.label for row in all_rows()}, known_labels()
    version = importlib.metadata.version("transformers")
    if version == left_out["transformers"]:
        assert found == listed
    else:
        pytest.skip(f"transformers {version}: {sorted(found ^ listed)[:20]} differ from {left_out['transformers']}")


@pytest.mark.parametrize(
    "label",
    [
        "mixtral:causal",  # each expert stored apart
        "gpt_oss:causal",  # all experts of a block in one tensor
        "qwen3_5_text:causal",  # two kinds of attention
        "qwen2_5_vl:image-text",  # a vision tower beside
    ],
)
def test_one_row_of_each_kind_is_measured_and_merged(label, tmp_path):
    silence()
    outcome = sweep(ROWS[label], tmp_path / "pair", ("merge", "lewis"))
    assert outcome.steps == {"merge": "ok", "lewis": "ok"}


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["lewis", "saliency_budget"])
def test_states_that_a_model_keeps_in_float32_do_not_end_a_measurement_in_bfloat16(guidance, tmp_path, monkeypatch):
    """Of texts within one chunk of xLSTM's: on longer ones transformers' own forward ends in an error in bfloat16."""
    monkeypatch.chdir(save_mixtures(tmp_path / "pair", "xlstm"))
    config = yaml.safe_load(Path("pair.yaml").read_text())
    config["dataset"]["seqlen"] = 5
    Path("pair.yaml").write_text(yaml.safe_dump(config))
    flags = [
        "--config",
        "pair.yaml",
        "--out_dir",
        "dfs",
        "--guidance",
        guidance,
        "--dtype",
        "bfloat16",
        "--device",
        "cpu",
    ]
    done_here("lewis_importance.py", *flags, *(["--accept_useless_text"] if guidance != "lewis" else []))


@pytest.mark.slow
def test_every_row_is_recorded_with_every_step():
    """Steps that were added since are recorded by another run of the table."""
    lacking = {label: sorted(set(STEPS) - set(one["steps"])) for label, one in recorded().items()}
    assert not any(lacking.values()), lacking


@pytest.mark.slow
@pytest.mark.parametrize("label", ROWS)
def test_a_row_is_what_was_recorded_or_better(label, tmp_path, request):
    key, now = f"architectures/{label.replace(':', '-')}", state(ROWS[label])
    if request.config.cache is not None and request.config.cache.get(key, None) == now:
        return  # it has passed in this very state
    silence()
    steps, before = sweep(ROWS[label], tmp_path / "pair").steps, recorded()[label]["steps"]
    worse = {
        step: value
        for step, value in steps.items()
        if severity(value) > REFUSED or severity(value) > severity(before.get(step, "ok"))
    }
    assert worse == {}
    if request.config.cache is not None:
        request.config.cache.set(key, now)

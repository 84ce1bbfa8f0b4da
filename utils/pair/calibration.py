"""Where calibration text comes from: which rows of which data set.

Rows come from a hub data set or a local file; `nsamples` of them are chosen by the permutation that
`datasets.Dataset.shuffle(seed)` uses, so that a local copy of a hub data set yields the same samples.
"""

from collections.abc import Sequence
from dataclasses import replace

from utils.errors import UserError, brief
from utils.pair.rows import Rows, local_rows, looks_like_file
from utils.pair.sample_text import Sample, make_sample, template_columns
from utils.pair.source import CalibrationSource

# The reference's data sets and text format (arXiv 2503.03874, released code).
BUILT_IN = {
    "gsm8k": CalibrationSource(path="openai/gsm8k", subset="main", split="train", text="{question} {answer}"),
    "mbpp": CalibrationSource(path="google-research-datasets/mbpp", subset="full", split="train", text="{text} {code}"),
}

_SHORT = 10


def with_defaults(source: CalibrationSource) -> CalibrationSource:
    """Fill what the built-in data set `source.name` defines and the user left out.

    Raises:
        UserError: a subset or split of a local file.
    """
    built_in = BUILT_IN.get(source.name or "", CalibrationSource(split="train"))
    own_path = source.path is not None
    is_file = own_path and looks_like_file(source.path)
    for key in ("subset", "split"):
        if is_file and getattr(source, key):
            raise UserError(
                f"dataset.{key}: {source.path} is a file, which has no {key}; remove the key", "text-key-of-file"
            )
    return replace(
        source,
        path=source.path or built_in.path,
        # Subset and split belong to the hub's data set; a path of the user's own has its own.
        subset=source.subset or (None if own_path else built_in.subset),
        split=source.split or (None if is_file else built_in.split),
        text=source.text or (None if source.is_chat else built_in.text),
    )


def choose_samples(source: CalibrationSource, nsamples: int) -> list[Sample]:
    """Choose `nsamples` rows and make their text.

    Raises:
        UserError: the file or data set cannot be read, has fewer rows, lacks a column, or a chosen row has no text.
    """
    source = with_defaults(source)
    rows = open_rows(source)
    if len(rows) < nsamples:
        raise UserError(
            f"dataset {source.path} has {len(rows)} rows, but nsamples is {nsamples}; lower nsamples",
            "text-too-few-rows",
        )
    chosen = row_order(source, len(rows))[:nsamples]
    values = {row: rows[row] for row in sorted(chosen)}  # in the order in which a large file is read
    return [make_sample(row, values[row], source) for row in chosen]


def open_rows(source: CalibrationSource) -> Rows:
    """The rows of a source whose defaults are filled in (`with_defaults`), column name to value each.

    Raises:
        UserError: the template is none, or the file or data set cannot be read.
    """
    if source.text is not None:
        template_columns(source.text, "dataset.text")
    for number, turn in enumerate(source.chat or ()):
        template_columns(turn.content, f"dataset.chat[{number}].content")
    return local_rows(source.path) if looks_like_file(source.path) else _hub_rows(source)


def row_order(source: CalibrationSource, count: int) -> list[int]:
    """The order in which rows are chosen, of a data set with `count` of them."""
    import numpy

    return numpy.random.default_rng(source.seed).permutation(count).tolist()


def text_doubts(source: CalibrationSource, encoded: Sequence[Sequence[int]]) -> list[str]:
    """Sentences about calibration text that is allowed but unlikely to be meant."""
    found = []
    if "test" in (source.split or "").lower():
        found.append(f"calibrating on the {source.split} split: scores on it later will not be held-out scores")
    if len(encoded) > 1 and len({tuple(ids) for ids in encoded}) == 1:
        found.append(f"all {len(encoded)} samples are the same {len(encoded[0])} tokens")
    longest = max(map(len, encoded))
    if longest < _SHORT:
        found.append(f"the longest sample has {longest} tokens; so little text says little about a model")
    return found


def _hub_rows(source: CalibrationSource) -> Rows:
    from datasets import load_dataset

    shown = f"dataset {source.path}" + (f" ({source.subset})" if source.subset else "")
    try:
        return load_dataset(source.path, name=source.subset, split=source.split)
    except Exception as error:  # the hub, the network, the cache and the builders raise errors of many kinds
        raise UserError(
            f"{shown}, split {source.split}: cannot be loaded: {brief(error)}. For a local file give dataset.path its name",
            "text-not-loadable",
        ) from error

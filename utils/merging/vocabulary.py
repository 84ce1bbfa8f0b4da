"""How the tokens of several models come together: compared, and aligned only where that changes anything.

A recipe's `tokenizer_source` (or `tokenizer`) makes mergekit rebuild every embedding row by row through the tokenizers.
If all tokenizers have the same tokens and every embedding has exactly one row per token, that rebuilds what is there already:
the rows are then merged as they are, which gives the same tensors much faster.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoTokenizer

from utils.errors import Problem, UserError, brief, raise_collected
from utils.mergekit_api import BuildTokenizer, ModelReference, TokenizerInfo, vocabularies_by_id
from utils.merging.inputs import MergeInput, MergeInputs
from utils.merging.vocabulary_rows import one_row_per_token, rows_beyond_tokens, token_tables
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.planned_tensors import ArchitecturePlan
from utils.models.tokenizer_files import fingerprint, has_chat_template, has_tokenizer
from utils.trial import is_failure

_SHOWN = 3


@dataclass(frozen=True)
class VocabularyPlan:
    """What happens to tokens and embedding rows.

    Attributes:
        summary: one sentence for the user.
        warnings: sentences about differences that the merge does not align.
        asked: the recipe has a tokenizer block.
        task: mergekit's task that builds the tokenizer and aligns the rows; None if no alignment takes place.
        info: what that task gives.
        size: rows of every embedding of the result; None if they stay as they are.
        cuts_only: aligning leaves each model's first `size` rows as they are, and drops those behind them.
    """

    summary: str
    warnings: tuple[str, ...] = ()
    asked: bool = False
    task: BuildTokenizer | None = None
    info: TokenizerInfo | None = field(default=None, repr=False)
    size: int | None = None
    cuts_only: bool = False


def plan_vocabulary(
    inputs: MergeInputs, architecture: ArchitecturePlan, *, trust_remote_code: bool, keep_rows: bool = False
) -> VocabularyPlan:
    """Compare the tokenizers and decide whether embedding rows are aligned or merged as they are.

    Args:
        inputs: the models and the recipe.
        architecture: what is merged of them.
        trust_remote_code: let tokenizers load code from the model folders.
        keep_rows: the method has numbers for each row: rows are not cut off where tokenizers are the same.

    Raises:
        UserError: the recipe asks for a tokenizer that is not there or cannot be loaded, or a model's tokenizer has
            tokens that its embeddings do not.
    """
    config, donor = inputs.config, inputs.donor
    asked = config.tokenizer_source is not None or config.tokenizer is not None
    folders = {model.reference: model.checkpoint.folder for model in inputs.models}
    prints = {reference: fingerprint(folder) for reference, folder in folders.items() if has_tokenizer(folder)}
    same = len(set(prints.values())) <= 1
    warnings = tuple(_template_notes(inputs)) + tuple(
        f"{model.label} has no tokenizer; its token ids are taken to be those of {donor.label}"
        for model in inputs.models
        if model.reference not in prints and prints
    )
    if not asked:
        if same:
            text = "tokenizers are the same" if prints else "no model has a tokenizer"
            return VocabularyPlan(f"{text}; embeddings are merged row by row", warnings)
        notes = tuple(_differences(inputs, prints, trust_remote_code))
        return VocabularyPlan("embeddings are merged row by row, by token id", warnings + notes)
    if donor.reference not in prints:
        raise UserError(
            f"model {donor.checkpoint.name} has no tokenizer, which the recipe's tokenizer block needs; add its "
            "tokenizer files, or remove tokenizer_source from the recipe",
            "merge-no-tokenizer",
        )
    if _is_plain(config) and (same or _same_tokens(inputs, prints, trust_remote_code)):
        alike = "are byte-identical" if same else "have the same tokens"
        if why := _as_they_are(inputs, architecture, trust_remote_code, keep_rows):
            summary = f"tokenizers {alike}, {why}; the recipe's tokenizer block is skipped"
            return VocabularyPlan(summary, warnings, asked=True)
    return _aligned(inputs, architecture, warnings, trust_remote_code)


def _same_tokens(inputs: MergeInputs, prints: Mapping[ModelReference, str], trust_remote_code: bool) -> bool:
    """Whether every tokenizer has the donor's tokens under the donor's ids, whatever its settings are: which one pads, say.

    A token that one of them keeps whole in a text, as added tokens are, and the donor does not, would become one of the result.
    """
    ours, donor = prints[inputs.donor.reference], _tokenizer(inputs.donor, trust_remote_code)
    others = [model for model in inputs.models if prints.get(model.reference, ours) != ours]
    loaded = (_tokenizer(model, trust_remote_code) for model in others)
    return all(
        one.get_vocab() == donor.get_vocab() and one.added_tokens_decoder.items() <= donor.added_tokens_decoder.items()
        for one in loaded
    )


def _as_they_are(inputs: MergeInputs, architecture: ArchitecturePlan, trust_remote_code: bool, keep_rows: bool) -> str:
    """Why rows need no alignment where all tokenizers have the same tokens, as a clause; "" if they are aligned."""
    size = len(_vocabulary(inputs.donor, trust_remote_code))
    if one_row_per_token(inputs, architecture, size, trust_remote_code):
        return f"with one token per embedding row ({size}): rows are merged as they are, which gives the same tensors"
    counts = [architecture.embedding_rows(model.checkpoint.tensors) for model in inputs.models]
    if keep_rows and all(one == counts[0] for one in counts) and min(counts[0].values(), default=0) >= size:
        return (
            f"and the recipe's vectors belong to rows: all {max(counts[0].values())} are merged as they are, with those of "
            f"no token ({size} tokens)"
        )
    if rows := rows_beyond_tokens(inputs, architecture, trust_remote_code):
        return f"and {', '.join(rows)} has rows that stand for no token: rows are merged as they are"
    if tables := token_tables(inputs.donor, architecture, trust_remote_code):
        return f"and {', '.join(tables)} has an entry for each row of the embeddings: rows are merged as they are"
    return ""


def vocabulary_difference(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """How two token -> id tables differ, as a clause with the first few examples; "" if they do not."""
    parts = []
    if len(ours) != len(theirs):
        parts.append(f"{len(ours)} and {len(theirs)} tokens")
    moved = [token for token, place in ours.items() if theirs.get(token, place) != place]
    for tokens, text in (
        (moved, "have other ids"),
        ([token for token in ours if token not in theirs], "are only in the first"),
        ([token for token in theirs if token not in ours], "are only in the second"),
    ):
        if tokens:
            first = ", ".join(repr(token) for token in sorted(tokens, key=(theirs | ours).get)[:_SHOWN])
            parts.append(f"{len(tokens)} {text} ({first}{', ...' if len(tokens) > _SHOWN else ''})")
    return "; ".join(parts)


def _is_plain(config: Any) -> bool:
    """Whether the tokenizer block asks for nothing beyond `union` or `base`."""
    if config.tokenizer is None:
        return config.tokenizer_source in ("union", "base")
    block = config.tokenizer
    return block.source in ("union", "base") and not block.tokens and not block.pad_to_multiple_of


def _vocabulary(model: MergeInput, trust_remote_code: bool) -> dict[str, int]:
    """Token -> id of a model's tokenizer."""
    return _tokenizer(model, trust_remote_code).get_vocab()


def _tokenizer(model: MergeInput, trust_remote_code: bool) -> Any:
    try:
        with quiet_mergekit():
            return AutoTokenizer.from_pretrained(model.checkpoint.folder, trust_remote_code=trust_remote_code)
    except BaseException as error:  # tokenizers raise anything, from KeyError to their own Rust exceptions
        if not is_failure(error):
            raise
        raise UserError(
            f"model {model.checkpoint.name}: its tokenizer cannot be loaded: {brief(error)}",
            "merge-tokenizer-unreadable",
        ) from error


def _differences(inputs: MergeInputs, prints: Mapping[ModelReference, str], trust_remote_code: bool) -> list[str]:
    donor = inputs.donor
    if donor.reference not in prints:
        return [f"{donor.label} has no tokenizer; those of the other models differ and none is used"]
    ours = _vocabulary(donor, trust_remote_code)
    notes = []
    for model in inputs.models[1:]:
        if prints.get(model.reference, prints[donor.reference]) == prints[donor.reference]:
            continue
        difference = vocabulary_difference(ours, _vocabulary(model, trust_remote_code))
        if difference:
            notes.append(
                f"the tokenizers of {donor.label} and {model.label} differ: {difference}. Rows are merged by id; to "
                "align them by token, add tokenizer_source: union to the recipe"
            )
    return notes


def _aligned(
    inputs: MergeInputs, architecture: ArchitecturePlan, warnings: tuple[str, ...], trust_remote_code: bool
) -> VocabularyPlan:
    config = inputs.config
    block = config.tokenizer
    task = BuildTokenizer(
        base_model=config.base_model,
        referenced_models=tuple(config.referenced_models()),
        tokenizer_source=block.source if block else config.tokenizer_source,
        trust_remote_code=trust_remote_code,
        add_tokens=tuple((block.tokens or {}) if block else ()),
    )
    for model in inputs.models:
        if has_tokenizer(model.checkpoint.folder):
            _vocabulary(model, trust_remote_code)  # mergekit only logs a tokenizer it cannot load
    info = _build(task, inputs)
    vocabulary = info.tokenizer.get_vocab()
    _check_permutations(inputs, architecture, info, vocabulary)
    warnings += tuple(_moved_special_tokens(inputs.donor, vocabulary, trust_remote_code))
    size = len(vocabulary)
    multiple = block.pad_to_multiple_of if block else None
    if multiple and size % multiple:
        size += multiple - size % multiple
    before = sorted(set(architecture.embedding_rows(inputs.donor.checkpoint.tensors).values()))
    tables = token_tables(inputs.donor, architecture, trust_remote_code)
    if tables and before != [size]:
        raise UserError(
            f"model {inputs.donor.checkpoint.name}: {', '.join(tables)} says something of each of {before[-1]} token ids, and "
            f"the recipe's tokenizer block would make them {size}; remove it from the recipe",
            "merge-token-table",
        )
    change = f", {' and '.join(map(str, before))} rows become {size}" if before != [size] else f", {size} rows"
    cuts_only = _is_plain(config) and _keeps_places(info, vocabulary)
    return VocabularyPlan(f"embedding rows are aligned by token{change}", warnings, True, task, info, size, cuts_only)


def _keeps_places(info: TokenizerInfo, vocabulary: Mapping[str, int]) -> bool:
    """Whether tokens are numbered from 0 on without a gap, and every model's embedding of each is the row of that number."""
    places = range(len(vocabulary))
    return sorted(vocabulary.values()) == list(places) and all(
        all(own.get(place) == place for place in places) for own in info.permutations.values()
    )


def _build(task: BuildTokenizer, inputs: MergeInputs) -> TokenizerInfo:
    try:
        # mergekit draws a progress bar here that none of its options switches off
        with quiet_mergekit(), contextlib.redirect_stderr(io.StringIO()), vocabularies_by_id():
            return task.execute()
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        names = ", ".join(model.label for model in inputs.models)
        raise UserError(
            f"the tokenizers of {names} cannot be combined: {brief(error)}", "merge-tokenizers-apart"
        ) from error


def _check_permutations(
    inputs: MergeInputs, architecture: ArchitecturePlan, info: TokenizerInfo, vocabulary: Mapping[str, int]
) -> None:
    """Find tokens without an embedding row, on which mergekit would stop in the middle of the merge."""
    problems = []
    for model in inputs.models:
        places = info.permutations[model.reference]
        counts = architecture.embedding_rows(model.checkpoint.tensors)
        if not counts and all(places.get(place) == place for place in vocabulary.values()):
            continue  # the plan has no tensor to align (stock mergekit's of a model that it infers), and nothing would move
        rows = min(counts.values(), default=0)
        short = [token for token, place in vocabulary.items() if places.get(place, rows) >= rows]
        if short:
            text = (
                f"model {model.checkpoint.name}: its tokenizer knows {len(short)} tokens without an embedding row "
                f"({', '.join(map(repr, short[:_SHOWN]))}; it has {rows} rows); remove them from its tokenizer, or "
                "tokenizer_source from the recipe"
            )
            problems.append(Problem(text, "merge-tokens-without-rows"))
    raise_collected(problems, "tokenizers")


def _moved_special_tokens(donor: MergeInput, ours: Mapping[str, int], trust_remote_code: bool) -> Iterator[str]:
    """Special tokens that `config.json` names by id and that mean something else in the result's tokenizer."""
    before = {place: token for token, place in _vocabulary(donor, trust_remote_code).items()}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        places = donor.checkpoint.config.get(key)
        for place in places if isinstance(places, list) else [places]:
            token = before.get(place)
            if token is not None and ours.get(token) != place:
                where = f"has id {ours[token]} in" if token in ours else "is not in"
                yield (
                    f"config.json of {donor.label} says {key} {place} ({token!r}), which {where} the result's "
                    "tokenizer; correct config.json and generation_config.json of the result"
                )


def _template_notes(inputs: MergeInputs) -> list[str]:
    donor = inputs.donor
    having = [model.label for model in inputs.models if has_chat_template(model.checkpoint.folder)]
    if not having or donor.label in having or inputs.config.chat_template:
        return []
    return [
        f"{donor.label} has no chat template, {having[0]} has; the result has none unless the recipe says "
        "chat_template: auto"
    ]

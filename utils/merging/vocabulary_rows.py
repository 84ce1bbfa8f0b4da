"""How many rows embeddings have, against the tokens of a tokenizer, and what else is looked up by token id."""

from utils.merging.inputs import MergeInput, MergeInputs
from utils.models.headers import FLOAT_DTYPES
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.planned_tensors import ArchitecturePlan


def one_row_per_token(inputs: MergeInputs, architecture: ArchitecturePlan, size: int, trust_remote_code: bool) -> bool:
    """Whether all inputs have `size` rows in every embedding and head, and their configs say so."""
    for model in inputs.models:
        rows = set(architecture.embedding_rows(model.checkpoint.tensors).values())
        declared = _declared_tokens(model, trust_remote_code)
        if rows != {size} or declared != size:
            return False
    return True


def rows_beyond_tokens(inputs: MergeInputs, architecture: ArchitecturePlan, trust_remote_code: bool) -> list[str]:
    """The embeddings and heads to which the model's class gives another number of rows than its config's vocab_size.

    They are the same in all inputs. Cut to one row per token, such a model would not load.
    """
    found: list[dict[str, int]] = []
    for model in inputs.models:
        declared = _declared_tokens(model, trust_remote_code)
        rows = architecture.embedding_rows(model.checkpoint.tensors)
        found.append({name: count for name, count in rows.items() if count != declared})
    return list(found[0]) if all(one == found[0] for one in found) else []


def token_tables(model: MergeInput, architecture: ArchitecturePlan, trust_remote_code: bool) -> list[str]:
    """What a model looks up by token id beside its embeddings, as routing by tokens does: tables of whole numbers.

    They are not cut or lengthened with the embeddings.
    """
    declared = _declared_tokens(model, trust_remote_code)
    stored = {tensor.name: tensor.stored_name(model.checkpoint.tensors) for tensor in architecture.tensors}
    headers = {name: model.checkpoint.tensors[found] for name, found in stored.items() if found is not None}
    return [
        name
        for name, header in headers.items()
        if header.dtype not in FLOAT_DTYPES and len(header.shape) > 1 and header.shape[0] == declared
    ]


def _declared_tokens(model: MergeInput, trust_remote_code: bool) -> int | None:
    """The vocabulary's size by a model's config."""
    with quiet_mergekit():
        config = model.reference.config(trust_remote_code)
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)

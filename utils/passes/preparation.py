"""The models of a pair, made ready to be measured: everything that can be known and refused without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint, find_small_files, read_model_config
from utils.models.headers import FLOAT_DTYPES
from utils.models.opening import open_checkpoint
from utils.models.tokenizer import forget_handed_on, load_tokenizer, tokenizer_digest
from utils.pair.config import ModelEntry, PairConfig
from utils.pair.sample_text import Sample
from utils.pair.source import CalibrationSource
from utils.pair.tokens import encode
from utils.passes.subjects import EncodedText, Subject
from utils.runtime import computing_dtype

if TYPE_CHECKING:
    import torch

    from utils.models.decoder import Decoder
    from utils.models.stored_layout import StoredLayout


@dataclass(frozen=True)
class Precision:
    """How to compute: the device, `auto` or a torch dtype's name, and tokens per micro-batch (None: by device).

    `auto` is the checkpoint's own dtype, or float32 where the device is slow in it (`computing_dtype`); with
    `parity: reference` the checkpoint's own, as published.
    """

    device: "torch.device"
    dtype: str
    micro_batch_tokens: int | None

    @property
    def tokens_at_once(self) -> int:
        """Tokens per micro-batch: enough to keep the device busy, few enough to bound activations."""
        return self.micro_batch_tokens or (16384 if self.device.type == "cuda" else 2048)


Samples = Mapping[CalibrationSource, Sequence[Sample]]
Encoded = dict[CalibrationSource, list[list[int]]]


def prepare_subjects(
    config: PairConfig, samples: Samples, precision: Precision, trust_remote_code: bool
) -> list[Subject]:
    """Open every model's checkpoint, build its skeleton, find its blocks and tokenize the samples for it.

    Args:
        config: the pair config.
        samples: the samples of each of its texts.
        precision: how to compute.
        trust_remote_code: run code that comes with a model.

    Raises:
        UserError: a model that is missing, malformed, of an unsupported kind, or not shaped like the base; a tokenizer
            that is missing or does not belong to the weights; samples longer than the model's positions.
    """
    from utils.models.language_tower import as_whole_model

    read: dict[str, tuple[Any, Encoded]] = {}  # models with the very same tokenizer share its work
    encoded = {}
    for entry in config.model_info:  # small files of every model before the weights of any
        folder = find_small_files(entry.name, entry.revision)
        key = tokenizer_digest(folder, read_model_config(folder, entry.name))
        if key not in read:
            tokenizer = load_tokenizer(folder, entry.name, trust_remote_code)
            where = f"model {entry.name}"
            ids = {source: encode(chosen, tokenizer, source.seqlen, where) for source, chosen in samples.items()}
            read[key] = (tokenizer, ids)
        encoded[entry.type] = read[key]
    forget_handed_on()
    opened = {entry.type: open_checkpoint(entry.name, entry.revision) for entry in config.model_info}
    whole = {key: as_whole_model(one, opened[config.base.type], trust_remote_code) for key, one in opened.items()}
    subjects = [
        _subject(entry, whole[entry.type], *encoded[entry.type], config, precision, trust_remote_code)
        for entry in config.model_info
    ]
    base = next(subject for subject in subjects if subject.entry == config.base)
    for subject in subjects:
        _same_structure(base, subject)
    return subjects


def _subject(
    entry: ModelEntry,
    checkpoint: Checkpoint,
    tokenizer: Any,
    encoded: Encoded,
    config: PairConfig,
    precision: Precision,
    trust_remote_code: bool,
) -> Subject:
    import torch

    from utils.models.decoder import find_decoder
    from utils.models.experts_apart import with_slices
    from utils.models.stored_layout import stored_layout
    from utils.models.weight_source import build_skeleton
    from utils.passes.dry_walk import dry_walk

    where = f"model {entry.name}"
    dtype = getattr(torch, _dtype_of(checkpoint, precision, config.parity))
    model = build_skeleton(checkpoint, dtype, trust_remote_code)
    _refuse_looking_ahead(model, where)
    decoder = find_decoder(model, config.components, config.prefix_mapping, where)
    _refuse_shared(decoder, where)
    layout = stored_layout(model, checkpoint)
    apart = with_slices(checkpoint, model, layout)
    if apart is not checkpoint:
        checkpoint, layout = apart, stored_layout(model, apart)
    _refuse_incomplete(decoder, layout, where)
    _refuse_integer_weights(checkpoint, layout, model)
    texts = {
        source: _batched(ids, source.seqlen, config.parity, tokenizer, model, precision.tokens_at_once, where)
        for source, ids in encoded.items()
    }
    dry_walk(decoder, next(iter(encoded.values()))[0], where)
    return Subject(entry, checkpoint, decoder, layout, dtype, texts, trust_remote_code)


def _dtype_of(checkpoint: Checkpoint, precision: Precision, parity: bool) -> str:
    if precision.dtype != "auto":
        return precision.dtype
    return checkpoint.float_dtype if parity else computing_dtype(checkpoint.float_dtype, precision.device)


def _batched(
    encoded: list[list[int]], seqlen: int, parity: bool, tokenizer: Any, model: Any, tokens_at_once: int, where: str
) -> EncodedText:
    from utils.pair.batches import micro_batches, reference_batches

    longest = seqlen if parity else max(map(len, encoded))
    rows = check_tokens(model, longest, max(max(ids) for ids in encoded), where)
    if parity:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{where}: parity: reference pads with EOS, but the tokenizer has no EOS token", "tokenizer-no-eos"
            )
        left = tokenizer.padding_side == "left"
        return EncodedText(encoded, reference_batches(encoded, seqlen, tokens_at_once, tokenizer.eos_token_id, left))
    return EncodedText(encoded, micro_batches(encoded, tokens_at_once, pad_token(tokenizer, rows)))


def check_tokens(model: Any, longest: int, top: int, where: str) -> int:
    """Check that a model has a position for every token of its longest sample, and a row for its largest token id.

    Returns:
        The rows of its embedding.

    Raises:
        UserError: it has not.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions and 0 < positions < longest:
        raise UserError(
            f"{where} has {positions} positions, but samples reach {longest} tokens; lower seqlen", "text-too-long"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if top >= rows:
        raise UserError(
            f"{where}: its tokenizer gives token {top}, but its embedding has {rows} rows; the tokenizer does not "
            "belong to these weights",
            "tokenizer-other-model",
        )
    return rows


def pad_token(tokenizer: Any, rows: int) -> int:
    """A token id to pad with, of an embedding with `rows` rows."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None and i < rows), 0)


def _refuse_incomplete(decoder: "Decoder", layout: "StoredLayout", where: str) -> None:
    """Refuse a checkpoint that lacks weights of the body; a head may be absent where none is asked for."""
    from utils.passes.block_runner import body_names

    absent = sorted(set(layout.missing) & set(body_names(decoder)))
    if absent:
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        raise UserError(
            f"{where}: its weights lack {', '.join(absent[:4])}{more}, which config.json makes the model have; is the "
            "checkpoint complete?",
            "model-incomplete",
        )


def _refuse_looking_ahead(model: Any, where: str) -> None:
    """Refuse a model whose text attends to later tokens: it predicts no next token, and padding changes what it computes."""
    if getattr(model.config.get_text_config(decoder=True), "use_bidirectional_attention", None) is True:
        raise UserError(
            f"{where}: its tokens attend to later ones (use_bidirectional_attention in config.json), so text says nothing "
            "about how it predicts; merge it with the same coefficients everywhere (utils/merger.py with a recipe of your "
            "own)",
            "model-not-causal",
        )


def _refuse_shared(decoder: "Decoder", where: str) -> None:
    """Refuse blocks that have parameters in common: what one of them is to be merged with, the others would be too."""
    from utils.passes.block_runner import shared_in_blocks

    if shared := shared_in_blocks(decoder):
        raise UserError(
            f"{where}: {', '.join(shared[:2])} of its decoder blocks are shared with other blocks or with what lies outside "
            "them, so that no block can be measured on its own; merge it with the same coefficients everywhere "
            "(utils/merger.py with a recipe of your own)",
            "model-unsupported",
        )


def _refuse_integer_weights(checkpoint: Checkpoint, layout: "StoredLayout", model: Any) -> None:
    """Refuse weights that are not floating-point numbers that torch computes with: they are quantized."""
    for name, _ in model.named_parameters():
        for header in layout.headers(name):
            if header.dtype not in FLOAT_DTYPES:
                raise UserError(
                    f"model {checkpoint.name}: tensor {header.name} is stored as {header.dtype}, not as floating-point "
                    f"numbers ({', '.join(FLOAT_DTYPES)}); give the unquantized checkpoint",
                    "model-quantized",
                )


def model_doubts(base: Subject, subject: Subject) -> list[str]:
    """Sentences about differences from the base that are allowed but change what the norms are taken of."""
    found = []
    if any(text.encoded != base.texts[source].encoded for source, text in subject.texts.items()):
        found.append(f"{subject.entry.name} and the base split the text into different tokens")
    ours, theirs = (getattr(one.decoder.model.config, "rope_parameters", None) for one in (base, subject))
    if ours != theirs:
        found.append(f"{subject.entry.name} rotates positions differently from the base (rope_parameters): {theirs}")
    return found


def _same_structure(base: Subject, expert: Subject) -> None:
    """Refuse an expert whose blocks are not shaped like the base's: the norms could not be compared nor merged."""
    where = f"model {expert.entry.name} is no fine-tune of the base {base.entry.name}, so they cannot be compared"
    if expert is not base and expert.checkpoint.place == base.checkpoint.place:
        raise UserError(
            f"{where}: they are the same folder, {base.checkpoint.folder}; every delta would be 0", "model-twice"
        )
    for key in ("model_type", "num_attention_heads", "num_key_value_heads"):
        values = [getattr(one.decoder.model.config.get_text_config(decoder=True), key, None) for one in (expert, base)]
        if values[0] != values[1]:
            raise UserError(f"{where}: {key} is {values[0]} against {values[1]}", "model-not-of-base")
    ours, theirs = len(base.decoder.blocks), len(expert.decoder.blocks)
    if ours != theirs:
        raise UserError(f"{where}: {theirs} decoder blocks against {ours}", "model-not-of-base")
    ours, theirs = (dict(one.decoder.model.named_parameters()) for one in (base, expert))
    for layer in range(len(base.decoder.blocks)):
        for component in base.decoder.components_of(layer):
            name = base.decoder.weight_name(layer, component)
            if name not in theirs:
                raise UserError(f"{where}: it has no {name} ({expert.checkpoint.architecture})", "model-not-of-base")
            shapes = [tuple(table[name].shape) for table in (ours, theirs)]
            if shapes[0] != shapes[1]:
                raise UserError(f"{where}: {name} is {list(shapes[1])} against {list(shapes[0])}", "model-not-of-base")

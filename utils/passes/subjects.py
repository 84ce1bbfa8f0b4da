"""The models of a pair, made ready to be measured: everything that can be known and refused without weights."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError, brief
from utils.models.checkpoints import (
    FLOAT_DTYPES,
    INDEX,
    Checkpoint,
    find_small_files,
    open_checkpoint,
    read_model_config,
)
from utils.pair.calibration import Sample, encode, micro_batches, reference_batches
from utils.pair.config import ModelEntry, PairConfig
from utils.pair.source import CalibrationSource
from utils.publishing.manifest import file_sha256
from utils.runtime import computing_dtype
from utils.trial import is_failure

if TYPE_CHECKING:
    import torch

    from utils.models.decoder import Component, Decoder
    from utils.models.stored_layout import StoredLayout
    from utils.pair.batches import MicroBatch


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


@dataclass(frozen=True)
class EncodedText:
    """A text in one model's tokens: token ids per sample, and the micro-batches made of them."""

    encoded: list[list[int]]
    batches: "list[MicroBatch]"

    @property
    def tokens(self) -> int:
        """Tokens that are computed and counted."""
        return sum(batch.tokens for batch in self.batches)


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor that is a component or a piece of one: what it is called in tables, and in the checkpoint."""

    name: str
    tensor: str


@dataclass(frozen=True)
class Subject:
    """One model, ready to be measured: nothing of its weights is in memory yet.

    `layout` says which stored tensors the model's are made of. `texts` holds every text of the pair config in the model's
    tokens. Pickled, it takes no modules along: skeleton and layout are made again from the checkpoint's folder, which has
    to be there.
    """

    entry: ModelEntry
    checkpoint: Checkpoint
    decoder: "Decoder"
    layout: "StoredLayout"
    dtype: "torch.dtype"
    texts: Mapping[CalibrationSource, EncodedText]
    trust_remote_code: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        plain = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("decoder", "layout")}
        return _with_new_skeleton, (plain, self.decoder.without_model())

    def stored_name(self, parameter: str) -> str:
        """The name in the checkpoint of a parameter that is stored as one tensor."""
        (name,) = self.layout.stored_names(parameter)
        return name

    def parts(self, layer: int, component: "Component") -> list[StoredPart]:
        """What a component of a block is stored as: one tensor, or one for each expert and matrix."""
        names = self.layout.stored_names(self.decoder.weight_name(layer, component))
        if len(names) == 1:
            return [StoredPart(component.name, names[0])]
        return [StoredPart(_IN_BLOCK.sub("", name).removesuffix(".weight"), name) for name in names]


_IN_BLOCK = re.compile(r"^.*?\.\d+\.")  # what stands before a name inside a block


def _with_new_skeleton(plain: Mapping[str, Any], found: Mapping[str, Any]) -> Subject:
    from utils.models.decoder import Decoder
    from utils.models.stored_layout import stored_layout
    from utils.models.weight_source import build_skeleton

    model = build_skeleton(plain["checkpoint"], plain["dtype"], plain["trust_remote_code"])
    layout = stored_layout(model, plain["checkpoint"])
    return Subject(decoder=Decoder.on_model(model, found), layout=layout, **plain)


def component_names(subject: Subject) -> dict[str, str]:
    """What each stored tensor that is a component, or a piece of one, is called in tables."""
    decoder = subject.decoder
    return {
        part.tensor: part.name
        for layer in range(len(decoder.blocks))
        for component in decoder.components_of(layer)
        for part in subject.parts(layer, component)
    }


def stored_as(subjects: "Sequence[Subject]", parameter: str) -> "tuple[StoredLayout, str]":
    """The first layout that has a parameter or the one it is tied to, and which of them.

    Raises:
        ValueError: none of the models' checkpoints has it.
    """
    from utils.models.weight_source import tied_names

    tied = tied_names(subjects[0].decoder.model)
    others = [tied.get(parameter), *(name for name, other in tied.items() if other == parameter)]
    for name in (parameter, *others):
        for subject in subjects:
            if name is not None and name in subject.layout:
                return subject.layout, name
    raise ValueError(f"no checkpoint has {parameter}")


def first_stored_name(subjects: "Sequence[Subject]", parameter: str) -> str:
    """A parameter's name in the first checkpoint that has it: its own, else that of the one it is tied to.

    Raises:
        ValueError: none of the models' checkpoints has it, or it is stored in pieces.
    """
    layout, name = stored_as(subjects, parameter)
    (stored,) = layout.stored_names(name)
    return stored


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
    subjects = [
        _subject(entry, *encoded[entry.type], config, precision, trust_remote_code) for entry in config.model_info
    ]
    base = next(subject for subject in subjects if subject.entry == config.base)
    for subject in subjects:
        _same_structure(base, subject)
    return subjects


def _subject(
    entry: ModelEntry,
    tokenizer: Any,
    encoded: Encoded,
    config: PairConfig,
    precision: Precision,
    trust_remote_code: bool,
) -> Subject:
    import torch

    from utils.models.decoder import find_decoder
    from utils.models.stored_layout import stored_layout
    from utils.models.weight_source import build_skeleton

    where = f"model {entry.name}"
    checkpoint = open_checkpoint(entry.name, entry.revision)
    dtype = getattr(torch, _dtype_of(checkpoint, precision, config.parity))
    model = build_skeleton(checkpoint, dtype, trust_remote_code)
    decoder = find_decoder(model, config.components, config.prefix_mapping, where)
    layout = stored_layout(model, checkpoint)
    _refuse_incomplete(decoder, layout, where)
    _refuse_integer_weights(checkpoint, layout, model)
    texts = {
        source: _batched(ids, source.seqlen, config.parity, tokenizer, model, precision.tokens_at_once, where)
        for source, ids in encoded.items()
    }
    return Subject(entry, checkpoint, decoder, layout, dtype, texts, trust_remote_code)


def _dtype_of(checkpoint: Checkpoint, precision: Precision, parity: bool) -> str:
    if precision.dtype != "auto":
        return precision.dtype
    return checkpoint.float_dtype if parity else computing_dtype(checkpoint.float_dtype, precision.device)


def _batched(
    encoded: list[list[int]], seqlen: int, parity: bool, tokenizer: Any, model: Any, tokens_at_once: int, where: str
) -> EncodedText:
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
    if positions and longest > positions:
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


_TOKENIZER_REMEDY = (
    "put the tokenizer.json and tokenizer_config.json it was trained with there; if it needs code of its own, give "
    "--trust_remote_code"
)
_TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py", ".tiktoken"}
_NOT_TOKENIZER = {"config.json", "generation_config.json", INDEX}


def tokenizer_digest(folder: Path, config: Mapping[str, Any]) -> str:
    """SHA-256 over what makes a model's tokenizer: equal digests mean equal tokenizers.

    That is every small file that is not known to be something else, and what `config.json` says where they do not
    name its class.
    """
    digest = hashlib.sha256(f"{config.get('model_type')}:{config.get('tokenizer_class')}".encode())
    for path in sorted([*folder.iterdir(), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in _TOKENIZER_SUFFIXES and path.name not in _NOT_TOKENIZER and path.is_file():
            digest.update(f"{path.relative_to(folder)}:{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool) -> Any:
    """The tokenizer in a model's folder; `name` is what to call the model.

    Raises:
        UserError: it is missing, needs code that was not allowed, or cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except BaseException as error:  # tokenizer files fail in many ways, each with an exception of its own
        if not is_failure(error):
            raise
        raise UserError(
            f"model {name}: its tokenizer cannot be loaded from {folder}; {_TOKENIZER_REMEDY} ({brief(error)})",
            "tokenizer-unreadable",
        ) from error
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes an empty one where files are missing
        raise UserError(
            f"model {name}: {folder} holds no vocabulary for its tokenizer; {_TOKENIZER_REMEDY}", "tokenizer-missing"
        )
    return tokenizer


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
    if expert is not base and expert.checkpoint.folder == base.checkpoint.folder:
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


def memory_estimate(subject: Subject) -> int:
    """Bytes: what lies outside the blocks, two blocks, all hidden states, one micro-batch's widest activations."""
    model, decoder, size = subject.decoder.model, subject.decoder, subject.dtype.itemsize
    blocks = [sum(value.numel() for value in block.parameters()) for block in decoder.blocks]
    body = sum(value.numel() for value in decoder.body.parameters()) - sum(blocks)
    hidden = model.config.get_text_config(decoder=True).hidden_size
    widest = max(max(value.shape[-2:]) for value in decoder.blocks.parameters() if value.ndim > 1)
    slots = [[batch.input_ids.numel() for batch in text.batches] for text in subject.texts.values()]
    activations = max(map(max, slots)) * (widest * (3 * size + 4) + 4 * hidden * size)
    return size * (body + 2 * max(blocks) + max(map(sum, slots)) * hidden) + activations

"""Candidates made ready to be scored: their skeletons and where their tensors come from. No weights are read here."""

import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.evaluation.candidates import Candidate, changes_layers
from utils.evaluation.weights import MergedModel
from utils.merging.merged_tensors import prepare
from utils.merging.planning import PlannedMerge, SharedPlans, plan_recipe
from utils.merging.resources import arithmetic_bytes
from utils.merging.run import run_merge
from utils.merging.settings import MergeSettings
from utils.merging.small_files import write_small_files
from utils.merging.stacked_outputs import written_tensors
from utils.models.checkpoints import Checkpoint, read_model_config
from utils.models.decoder import Decoder, find_decoder
from utils.models.headers import FLOAT_CODES, FLOAT_DTYPES, TensorHeader
from utils.models.opening import open_checkpoint
from utils.models.stored_layout import StoredLayout, stored_layout
from utils.models.tokenizer import load_tokenizer
from utils.models.weight_source import StreamedWeights, WeightSource, build_skeleton
from utils.publishing.disk import free_bytes, remove_tree
from utils.runtime import computing_dtype, gigabytes

_MOST_PLANS = 128  # kept, each of about a megabyte
_WRITTEN, _END = ".scored.", ".part"  # around 8 characters of `tempfile`: a folder that a model is written into
_HIDDEN = re.compile(f"{re.escape(_WRITTEN)}[a-z0-9_]{{8}}{re.escape(_END)}")


def sweep_written(beside: Path) -> None:
    """Remove models that a killed run had written for a while; the caller has the folder to itself."""
    for folder in beside.iterdir():
        if _HIDDEN.fullmatch(folder.name) and not folder.is_symlink():
            remove_tree(folder)


def refuse_little_disk(needed: int, beside: Path | None) -> None:
    """Raise a `UserError` (`disk-full`) if models of so many bytes have no room where they are written for a while: in a
    folder, or in the system's for temporary files."""
    free, place = free_bytes(Path(tempfile.gettempdir()) if beside is None else beside)
    if needed > free:
        raise UserError(
            f"recipes' models have to be merged into a temporary folder before they are scored, {gigabytes(needed)} at a "
            f"time, {place} has {gigabytes(free)} free; make room there",
            "disk-full",
        )


@dataclass(frozen=True)
class ReadyCandidate:
    """A candidate whose losses can be computed: its skeleton, and what opens its weights.

    `folder` holds its tokenizer. `merging` are the bytes that making one of its tensors takes beside it, 0 for a model.
    """

    candidate: Candidate
    decoder: Decoder = field(repr=False)
    folder: Path
    dtype: torch.dtype
    open_weights: Callable[[], WeightSource | MergedModel] = field(repr=False)
    merging: int = 0


@dataclass
class Preparing:
    """How candidates are made ready: where they are computed, in what dtype, with what of command 3's flags.

    `dtype` is `auto` (a recipe's output dtype, a checkpoint's own, or float32 where the device is slow in it) or a torch
    name. Skeletons are kept, since many
    recipes share one.
    """

    device: torch.device
    dtype: str
    settings: MergeSettings
    skeletons: dict[tuple[Path, torch.dtype], Decoder] = field(default_factory=dict, repr=False)
    _described: dict[str, Path] = field(default_factory=dict, repr=False)
    _planned: dict[str, PlannedMerge] = field(default_factory=dict, repr=False)
    _vocabularies: dict[Path, dict[str, int]] = field(default_factory=dict, repr=False)
    _shared: SharedPlans = field(default_factory=SharedPlans, repr=False)

    def model(self, candidate: Candidate) -> ReadyCandidate:
        """Make a model folder or hub id ready.

        Raises:
            UserError: it is missing, malformed, quantized, or has no language-model head.
        """
        checkpoint = open_checkpoint(candidate.model, candidate.revision)
        return self._ready(candidate, checkpoint)

    def recipe(self, candidate: Candidate, planned: PlannedMerge) -> ReadyCandidate | str:
        """Make a planned recipe ready, or say in a clause why its model has to be written first.

        Where it has layers or tokens of its own, its config and tokenizer are written into a temporary folder, no weights.
        """
        plan = planned.plan
        if any(not tensor.sources and not tensor.weight.optional for tensor in plan.tensors):
            return "transformers converts its tensors while loading"
        promised = _promised(planned)
        if changes_layers(candidate) or (plan.vocabulary.task is not None and not self._keeps_vocabulary(planned)):
            folder = self._small_files(candidate, planned)
            promised = replace(promised, folder=folder, config=read_model_config(folder, candidate.name))
        dtype = self._computed(promised)
        decoder = self._skeleton(promised, dtype)
        layout = _stored(decoder, promised)
        if layout.missing:
            return f"its tensors do not make {layout.missing[0]}"

        def prepared() -> MergedModel:
            return MergedModel(prepare(planned), layout, dtype)

        merging = arithmetic_bytes(plan, planned.division, shared=True)
        return ReadyCandidate(candidate, decoder, promised.folder, dtype, prepared, merging)

    def _small_files(self, candidate: Candidate, planned: PlannedMerge) -> Path:
        """A folder with all that command 3 would write but the weights; recipes of one form share it."""
        form = json.dumps([_without_parameters(candidate.merge_recipe().data), candidate.fused_experts], sort_keys=True)
        if form not in self._described:
            folder = tempfile.mkdtemp()
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            write_small_files(planned, Path(folder))
            self._described[form] = Path(folder)
        return self._described[form]

    def plan(self, candidate: Candidate) -> PlannedMerge:
        """Plan a recipe as command 3 would; a plan is kept for the next round of rows.

        Raises:
            UserError: anything command 3 would refuse before it reads weights.
        """
        if candidate.digest not in self._planned:
            while len(self._planned) >= _MOST_PLANS:
                self._planned.pop(next(iter(self._planned)))
            settings = replace(self.settings, fused_experts=candidate.fused_experts)
            self._planned[candidate.digest] = plan_recipe(
                settings, candidate.merge_recipe(), lambda line: None, self._shared
            )
        return self._planned[candidate.digest]

    @contextmanager
    def written(self, candidate: Candidate, planned: PlannedMerge, beside: Path | None) -> Iterator[ReadyCandidate]:
        """The model that command 3 would write, in a temporary folder for as long as the context lasts.

        Raises:
            UserError: the disk has no room for it; anything that command 3 would raise.
        """
        refuse_little_disk(planned.plan.nbytes, beside)  # again: others write, too
        with tempfile.TemporaryDirectory(prefix=_WRITTEN, suffix=_END, dir=beside) as text:
            folder = Path(text)
            run_merge(planned, folder)
            write_small_files(planned, folder)
            stored = Candidate(candidate.name, model=text, role=candidate.role)
            yield replace(self.model(stored), candidate=candidate)
            self.skeletons = {key: value for key, value in self.skeletons.items() if key[0] != folder}

    def _keeps_vocabulary(self, planned: PlannedMerge) -> bool:
        """Whether the tokenizer that a recipe builds has the donor's tokens at the donor's ids, one for each row.

        So it is where tokenizers differ in a chat template alone: then the donor's stands for it.
        """
        plan, donor = planned.plan, planned.plan.inputs.donor.checkpoint
        if donor.folder not in self._vocabularies:
            loaded = load_tokenizer(donor.folder, donor.name, self.settings.trust_remote_code)
            self._vocabularies[donor.folder] = loaded.get_vocab()
        rows = {tensor.shape[tensor.vocabulary_axis] for tensor in plan.tensors if tensor.vocabulary_axis is not None
                and tensor.shape is not None}  # fmt: skip
        before = set(plan.architecture.embedding_rows(donor.tensors).values())
        theirs = plan.vocabulary.info.tokenizer.get_vocab()
        return rows == before and theirs == self._vocabularies[donor.folder]

    def _ready(self, candidate: Candidate, checkpoint: Checkpoint) -> ReadyCandidate:
        dtype = self._computed(checkpoint)
        decoder = self._skeleton(checkpoint, dtype)
        layout = _stored(decoder, checkpoint)
        if layout.missing:
            raise UserError(
                f"model {checkpoint.name}: its checkpoint holds no {', '.join(layout.missing[:4])}; a loss needs the whole "
                "model, its language-model head included",
                "model-no-head",
            )
        return ReadyCandidate(
            candidate, decoder, checkpoint.folder, dtype, lambda: StreamedWeights(layout, self.device, dtype)
        )

    def _computed(self, checkpoint: Checkpoint) -> torch.dtype:
        return getattr(
            torch, computing_dtype(checkpoint.float_dtype, self.device) if self.dtype == "auto" else self.dtype
        )

    def _skeleton(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Decoder:
        key = checkpoint.folder, dtype
        if key not in self.skeletons:
            model = build_skeleton(checkpoint, dtype, self.settings.trust_remote_code)
            self.skeletons[key] = find_decoder(model, (), {}, f"model {checkpoint.name}")
        return self.skeletons[key]


def _stored(decoder: Decoder, checkpoint: Checkpoint) -> StoredLayout:
    """What the checkpoint's tensors are to the model.

    Raises:
        UserError: tensors that are no floating-point numbers: they are quantized.
    """
    layout = stored_layout(decoder.model, checkpoint)
    for name, _ in decoder.model.named_parameters():
        for header in layout.headers(name):
            if header.dtype not in FLOAT_DTYPES:
                raise UserError(
                    f"model {checkpoint.name}: tensor {header.name} is stored as {header.dtype}, not as floating-point "
                    "numbers; give the unquantized checkpoint",
                    "model-quantized",
                )
    return layout


def _without_parameters(node: Any) -> Any:
    """A recipe without its numbers: what decides the layers and the tokens of the result."""
    if isinstance(node, dict):
        return {key: _without_parameters(value) for key, value in node.items() if key != "parameters"}
    return [_without_parameters(value) for value in node] if isinstance(node, list) else node


def _promised(planned: PlannedMerge) -> Checkpoint:
    """The checkpoint that command 3 would write: names, dtypes and shapes, no files."""
    plan, donor = planned.plan, planned.plan.inputs.donor.checkpoint
    headers = {}
    for tensor in written_tensors(plan):
        sources = tensor.merged[0].sources
        if sources:  # an optional tensor that no input has is not written
            stored = next(iter(sources.values())).dtype
            code = FLOAT_CODES[tensor.dtype] if tensor.dtype else stored  # integers are copied
            headers[tensor.name] = TensorHeader(tensor.name, code, tensor.shape, donor.folder, 0, tensor.nbytes)
    return Checkpoint(planned.recipe.path.stem, None, donor.folder, donor.config, headers)

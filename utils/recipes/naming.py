"""How the measured tensors are called in the merge, and the filters that hit them: proven against what a merge writes."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from utils.errors import Problem, raise_collected
from utils.models.architecture import plan_architecture
from utils.models.checkpoints import Checkpoint
from utils.models.content_sample import content_sample
from utils.models.opening import open_without_download
from utils.models.planned_tensors import DEFINITION
from utils.pair.config import ModelEntry
from utils.recipes import filters
from utils.recipes.filters import Coverage, NamedTensor
from utils.recipes.group_filters import group_filters
from utils.recipes.saliency_vectors import SaliencyVectors

if TYPE_CHECKING:
    from utils.models.planned_tensors import ArchitecturePlan

NOT_HERE = "the base model is not on this machine"
RECORDED_EVIDENCE = f"{NOT_HERE}; proven only against each other, with the names recorded while measuring"


@dataclass(frozen=True)
class Naming:
    """Names, filters and sizes of the measured tensors, and how far they are proven.

    `names` is by what was measured: (layer, component), or the name in the checkpoint. `filters` and `params` are by
    name, in their order in the recipe; `group_filters` too, where tensors that share their weight share filters. `tied` are
    names that the merge may write beside (a head that is tied in the base), with the name whose weight they take. `before`
    are filters that stand before all of `filters`, of tensors that are none of these. `coverage` is None without a base
    checkpoint to prove against; `evidence` is a clause that says what the filters were proven against; `warnings` are
    sentences for the user.
    """

    names: Mapping[Any, str]
    filters: Mapping[str, str]
    params: Mapping[str, int]
    coverage: Coverage | None
    evidence: str
    warnings: tuple[str, ...] = ()
    group_filters: Mapping[str, str] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrittenTensors:
    """The tensors that a merge onto `base` writes, and mergekit's plan that says so."""

    base: Checkpoint
    plan: "ArchitecturePlan"
    tensors: tuple[NamedTensor, ...]

    @property
    def names(self) -> list[str]:
        """Every name that filters are matched on."""
        return [tensor.name for tensor in self.tensors]

    @property
    def where(self) -> str:
        """What to call the base in a message."""
        return f"base model {self.base.name}"

    @property
    def evidence(self) -> str:
        """The clause that says what filters were proven against, and by which of mergekit's ways."""
        why = "" if self.plan.origin == DEFINITION else f" ({self.plan.reason})"
        return f"each hits its own tensors and nothing else in {self.base.name}, by {self.plan.origin}{why}"


class LocalModels:
    """The models of a merge that lie on this machine; what the merge writes is planned when it is first asked for.

    Args:
        base: the base.
        experts: the experts to merge.
        trust_remote_code: let a checkpoint's config load code from its folder.

    Raises:
        UserError: a local folder is malformed. Nothing is downloaded.
    """

    def __init__(self, base: ModelEntry, experts: Sequence[ModelEntry], *, trust_remote_code: bool = False) -> None:
        opened = {entry.type: open_without_download(entry.name, entry.revision) for entry in (base, *experts)}
        self.base_type, self.trust_remote_code = base.type, trust_remote_code
        self.stored = {key: checkpoint for key, checkpoint in opened.items() if checkpoint is not None}

    @cached_property
    def samples(self) -> dict[str, str]:
        """By type, the hash of a sample of the weights as the files hold them."""
        return {key: content_sample(checkpoint) for key, checkpoint in self.stored.items()}

    @cached_property
    def checkpoints(self) -> dict[str, Checkpoint]:
        """The models by type, experts that are stored stacked each on their own.

        Raises:
            UserError: transformers cannot build a mixture.
        """
        from utils.models.experts_apart import with_experts_apart

        return {key: with_experts_apart(one, self.trust_remote_code) for key, one in self.stored.items()}

    @cached_property
    def written(self) -> WrittenTensors | None:
        """What the merge writes, None without the base.

        Raises:
            UserError: the models cannot be merged.
        """
        base = self.checkpoints.get(self.base_type)
        if base is None:
            return None
        others = [checkpoint for checkpoint in self.checkpoints.values() if checkpoint is not base]
        plan = plan_architecture(base, others, trust_remote_code=self.trust_remote_code)
        return WrittenTensors(base, plan, tuple(filters.planned_tensors(plan, base)))

    @cached_property
    def routers(self) -> tuple[str, ...]:
        """The routers' tensors of a mixture, as the merge writes them; none without the base.

        Raises:
            UserError: the models cannot be merged; routers cannot be told from other parts.
        """
        from utils.models.routers import routers_of

        if self.written is None:
            return ()
        stored = routers_of(self.written.base, self.trust_remote_code)
        spellings = self.written.plan.spellings
        return tuple(dict.fromkeys(spellings[name] for name in stored if name in spellings))

    @cached_property
    def vocabulary_apart(self) -> tuple[str, ...]:
        """The embeddings and heads, as the merge writes them, that have another number of rows in some expert than in the base:
        the merge aligns them by token. Raises as `written`."""
        if self.written is None:
            return ()
        plan = self.written.plan
        counts = [plan.embedding_rows(one.tensors) for one in self.checkpoints.values()]
        here = plan.embedding_rows(self.written.base.tensors)
        return tuple(name for name, rows in here.items() if any(one.get(name, rows) != rows for one in counts))


@dataclass(frozen=True)
class Recorded:
    """A tensor that command 1 measured, by its name in the checkpoint: its size, whether it may get a density of its own,
    and, where weights are given to groups, its group (tensors of one group are merged with one weight)."""

    params: int
    has_density: bool
    group: Hashable = None


def _refuse_lost(recorded: Mapping[str, Recorded], names: Mapping[str, str], written: WrittenTensors) -> None:
    """Refuse tables that hold a part of some layers and lack that of another layer, which the base has too."""
    kinds = {filters.name_template(names[name]) for name, one in recorded.items() if one.has_density}
    own = set(names.values())
    lost = [name for name in written.names if name not in own and filters.name_template(name) in kinds]
    raise_collected(
        (
            Problem(f"{name} was not measured, those of other layers were; measure again", "table-row-missing")
            for name in lost[:5]
        ),
        written.where,
    )


def name_recorded(recorded: Mapping[str, Recorded], written: WrittenTensors | None, *, grouped: bool) -> Naming:
    """Name tensors that were recorded one by one as mergekit will see them, and prove their filters.

    Args:
        recorded: what was recorded, by name in the base's checkpoint.
        written: what the merge writes; None: names are taken as they were recorded.
        grouped: whether groups get filters too.

    Raises:
        UserError: a tensor is not in the base, or a filter hits something else.
    """
    names, tied = {name: name for name in recorded}, {}
    where, evidence = NOT_HERE, RECORDED_EVIDENCE
    if written is not None:
        where, evidence = written.where, written.evidence
        names = filters.as_planned(names, written.plan, where)
        own, stored = set(names.values()), written.base.tensors
        _refuse_lost(recorded, names, written)
        tied = {
            planned.name: names[source]
            for planned in written.plan.tensors
            if planned.name not in own and (source := planned.stored_name(stored)) in names
        }
    all_names = list(names.values()) if written is None else written.names
    dense = [names[name] for name, one in recorded.items() if one.has_density]
    proof, before = filters.exact_filters(dense, all_names, where)
    shared = None
    if grouped:
        groups = {names[name]: one.group for name, one in recorded.items()}
        shared = group_filters(groups | {other: groups[name] for other, name in tied.items()}, all_names, where)
    covered = None
    if written is not None:
        covered = filters.coverage(shared or proof, written.tensors, () if shared else before)
    return Naming(
        names=names,
        filters=proof,
        params={names[name]: one.params for name, one in recorded.items()},
        coverage=covered,
        evidence=evidence,
        group_filters=shared,
        tied=tied,
        before=before,
    )


@dataclass(frozen=True)
class Unmeasured:
    """What no text can measure: the `filters` that hit it, and those that stand `before` them, of what was measured."""

    filters: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


def filters_without_vectors(
    written: WrittenTensors | None, files: Sequence[SaliencyVectors], aligned: Collection[str] = ()
) -> Unmeasured:
    """The filters of written tensors that some file of vectors lacks, buffers among them, or whose rows no file follows.

    Args:
        written: what the merge writes; None: nothing is known of it.
        files: of the experts.
        aligned: names of embeddings that are aligned by token, so that their rows are not those that were measured.

    Raises:
        UserError: a filter hits something else.
    """
    if written is None:
        return Unmeasured()
    spellings: dict[str, list[str]] = {}
    for spelled, planned in written.plan.spellings.items():
        spellings.setdefault(planned, []).append(spelled)
    left = []
    for tensor in {one.name: one for one in written.plan.tensors}.values():
        stored = tensor.stored_name(written.base.tensors)
        known = [tensor.name, *([stored] if stored else []), *spellings.get(tensor.name, ())]
        if tensor.name in aligned or not all(vectors.of_these(known) for vectors in files):
            left.append(tensor.name)
    absent = set(left)
    # a weight's filter hits its bias, too
    own = [name for name in left if not (name.endswith(".bias") and f"{name.removesuffix('bias')}weight" in absent)]
    found, before = filters.exact_filters(own, written.names, written.where)
    return Unmeasured(tuple(found.values()), before)

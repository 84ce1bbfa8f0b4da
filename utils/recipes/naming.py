"""How the measured places are called in the merge: as recorded, as in the checkpoint, or by assumption."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from utils.models.checkpoints import Checkpoint, open_without_download
from utils.pair.config import ModelEntry, PairConfig
from utils.recipes import filters
from utils.recipes.filters import Coverage, NamedTensor
from utils.recipes.group_filters import group_filters


@dataclass(frozen=True)
class Naming:
    """Names, filters and sizes of the measured tensors, and how far they are proven.

    `names` is by what was measured: (layer, component), or the name in the checkpoint. `filters` and `params` are by
    name; `group_filters` too, where tensors that share their weight share filters. `twins` are names that the merge may
    write beside (a head that is tied in the base), with the name whose weight they take. `coverage` is None without a
    base checkpoint to prove against; `evidence` is a clause that says what the filters were proven against; `warnings`
    are sentences for the user.
    """

    names: Mapping[Any, str]
    filters: Mapping[str, str]
    params: Mapping[str, int]
    coverage: Coverage | None
    evidence: str
    warnings: tuple[str, ...] = ()
    group_filters: Mapping[str, str] | None = None
    twins: Mapping[str, str] = field(default_factory=dict)


def open_local_models(config: PairConfig, experts: Sequence[ModelEntry]) -> dict[str, Checkpoint]:
    """The base and the experts that lie on this machine, by type; nothing is downloaded.

    Raises:
        UserError: a local folder is malformed.
    """
    opened = {entry.type: open_without_download(entry.name, entry.revision) for entry in (config.base, *experts)}
    return {model_type: checkpoint for model_type, checkpoint in opened.items() if checkpoint is not None}


@dataclass(frozen=True)
class Recorded:
    """A tensor that command 1 measured, by its name in the checkpoint: its size, whether it may get a density of its own,
    and, where weights are given to groups, its group (tensors of one group are merged with one weight)."""

    params: int
    has_density: bool
    group: Hashable = None


def name_recorded(
    config: PairConfig,
    recorded: Mapping[str, Recorded],
    local: Mapping[str, Checkpoint],
    *,
    grouped: bool,
    trust_remote_code: bool = False,
) -> Naming:
    """Name tensors that were recorded one by one as mergekit will see them, and prove their filters.

    Args:
        config: the pair config.
        recorded: what was recorded, by name in the base's checkpoint.
        local: the checkpoints on this machine, by type.
        grouped: whether groups get filters too.
        trust_remote_code: let a checkpoint's config load code from its folder.

    Raises:
        UserError: a tensor is not in the base, a filter hits something else, or the models cannot be merged.
    """
    base = local.get(config.base_model_type)
    if base is None:
        names = {name: name for name in recorded}
        return _with_filters(recorded, names, {}, list(names), NOT_HERE, RECORDED_EVIDENCE, None, grouped)

    from utils.models.architecture import DEFINITION, plan_architecture

    others = [checkpoint for checkpoint in local.values() if checkpoint is not base]
    plan = plan_architecture(base, others, trust_remote_code=trust_remote_code)
    where = f"base model {base.name}"
    tensors = filters.planned_tensors(plan, base)
    names = filters.as_planned({name: name for name in recorded}, plan, where)
    own = set(names.values())
    twins = {
        planned.name: names[stored]
        for planned in plan.tensors
        if planned.name not in own and (stored := planned.stored_name(base.tensors)) in names
    }
    why = "" if plan.origin == DEFINITION else f" ({plan.reason})"
    evidence = f"each hits its own tensors and nothing else in {base.name}, by {plan.origin}{why}"
    written = [tensor.name for tensor in tensors]
    return _with_filters(recorded, names, twins, written, where, evidence, tensors, grouped)


def _with_filters(
    recorded: Mapping[str, Recorded],
    names: Mapping[str, str],
    twins: Mapping[str, str],
    written: Sequence[str],
    where: str,
    evidence: str,
    tensors: Sequence[NamedTensor] | None,
    grouped: bool,
) -> Naming:
    dense = [names[name] for name, one in recorded.items() if one.has_density]
    proof = filters.exact_filters(dense, written, where)
    params = {names[name]: one.params for name, one in recorded.items()}
    shared = None
    if grouped:
        groups = {names[name]: one.group for name, one in recorded.items()}
        shared = group_filters(groups | {twin: groups[name] for twin, name in twins.items()}, written, where)
    covered = None if tensors is None else filters.coverage(shared or proof, tensors)
    return Naming(names, proof, params, covered, evidence, group_filters=shared, twins=twins)


NOT_HERE = "the base model is not on this machine"
RECORDED_EVIDENCE = f"{NOT_HERE}; proven only against each other, with the names recorded while measuring"

"""How the measured places are called in the merge: as recorded, as in the checkpoint, or by assumption."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils import filters
from utils.checkpoints import Checkpoint, open_without_download
from utils.filters import Coverage, Place
from utils.frames import Measurements
from utils.pair_config import ModelEntry, PairConfig


@dataclass(frozen=True)
class Naming:
    """Names, filters and sizes of the measured tensors, and how far they are proven.

    `tensors` is by (layer, component), `filters` and `params` are by tensor name. `coverage` is None without a base
    checkpoint to prove against; `evidence` is a clause that says what the filters were proven against; `warnings` are
    sentences for the user.
    """

    tensors: Mapping[Place, str]
    filters: Mapping[str, str]
    params: Mapping[str, int]
    coverage: Coverage | None
    evidence: str
    warnings: tuple[str, ...] = ()


def open_local_models(config: PairConfig, experts: Sequence[ModelEntry]) -> dict[str, Checkpoint]:
    """The base and the experts that lie on this machine, by type; nothing is downloaded.

    Raises:
        UserError: a local folder is malformed.
    """
    opened = {entry.type: open_without_download(entry.name, entry.revision) for entry in (config.base, *experts)}
    return {model_type: checkpoint for model_type, checkpoint in opened.items() if checkpoint is not None}


def name_tensors(
    config: PairConfig, measured: Measurements, local: Mapping[str, Checkpoint], *, trust_remote_code: bool = False
) -> Naming:
    """Name the measured tensors as mergekit will see them, and prove their filters as far as this machine allows.

    Names come from `norms.csv`, else from the base checkpoint, else they are assumed as the released code does. If the
    base checkpoint is here, the filters are proven against its names.

    Args:
        config: the pair config.
        measured: the dataframe folder.
        local: the checkpoints on this machine, by type.
        trust_remote_code: let a checkpoint's config load code from its folder.

    Raises:
        UserError: names are missing or ambiguous, a filter hits something else, or the models cannot be merged.
    """
    frame = next(iter(measured.deltas.values()))
    layers, components = len(frame), list(frame.columns)
    recorded, params = None, {}
    if measured.norms is not None:
        recorded, params = filters.measured_names(measured.norms, config.base_model_type, layers, components)
    base = local.get(config.base_model_type)
    if base is None:
        return _unproven(recorded or filters.assumed_names(layers, components, config.prefix_mapping), params)

    from utils.architecture import DEFINITION, plan_architecture

    others = [checkpoint for checkpoint in local.values() if checkpoint is not base]
    plan = plan_architecture(base, others, trust_remote_code=trust_remote_code)
    where = f"base model {base.name}"
    tensors = filters.planned_tensors(plan, base)
    if recorded:
        names = filters.as_planned(recorded, plan, where)
    else:
        names = filters.found_names(tensors, layers, components, config.prefix_mapping, where)
    proof = filters.exact_filters(list(names.values()), [tensor.name for tensor in tensors], where)
    why = "" if plan.origin == DEFINITION else f" ({plan.reason})"
    evidence = f"each hits its own tensor and nothing else in {base.name}, by {plan.origin}{why}"
    sizes = {tensor.name: tensor.params for tensor in tensors}
    return Naming(names, proof, sizes, filters.coverage(proof, tensors), evidence)


def _unproven(names: Mapping[Place, str], params: Mapping[str, int]) -> Naming:
    where = "the base model is not on this machine"
    proof = filters.exact_filters(list(names.values()), list(names.values()), where)
    if params:
        evidence = f"{where}; proven only against each other, with the names recorded while measuring"
        return Naming(names, proof, params, None, evidence)
    warning = (
        f"nothing could be proven: {where} and the dataframe folder records no tensor names, so the filters are "
        "model.layers.<layer>.<path>; one that matches nothing leaves its tensor at density 1"
    )
    return Naming(names, proof, {}, None, "assumed, not proven", (warning,))

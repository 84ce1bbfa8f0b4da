"""How mergekit sees a set of checkpoints: which tensors it plans, under which names, and what it would leave out.

mergekit reads an architecture either from a *definition* (a JSON file it ships, chosen by the class name in
`config.json`) or, where it ships none, by *inference* (it builds the model without weights through transformers).
Neither always fits what transformers saves today. Definitions ask for buffers that are no longer stored (GPT-NeoX) or
for an output head that is tied (Phi-3), and do not know biases that a config switches on (Llama); inference loses a
head that is stored under another name than the module's (GPT-NeoX again). Both hold every block to one template, so
that hybrids do not fit, and both name the experts of mixtures as transformers stacks them, where most releases store
each expert apart. So these are tried, the first that misses and drops nothing, and writes the names that the base
stores, wins:

1. the definition as shipped;
2. the definition, with the tensors made optional that the model class itself does not have, or ties;
3. inference;
4. the names stored in the base (`utils/models/stored_architecture.py`);
5. the first three in transformers' stacked form: where asked for, or where one checkpoint has stacked what another has
   apart.

Commands 2 and 3 both ask here, so that a filter is proven against the very names that the merge will plan:

    plan = plan_architecture(base, experts)        # open checkpoints (utils.models.checkpoints.Checkpoint)
    plan.tensors                                   # what will be merged, each with the name filters are matched on
    plan.origin, plan.reason                       # which of these, and why
    plan.info                                      # mergekit's own object, for its planner
"""

from collections.abc import Sequence
from typing import NoReturn

from utils.errors import UserError
from utils.models.checkpoints import Checkpoint
from utils.models.mergekit_inputs import quiet_mergekit, vocabulary_key
from utils.models.mergekit_plans import Candidate, MergekitInputs, mergekit_candidates, misfit
from utils.models.planned_tensors import STORED, ArchitecturePlan, PlannedTensor, some_of


def plan_architecture(
    base: Checkpoint,
    experts: Sequence[Checkpoint] = (),
    *,
    trust_remote_code: bool = False,
    allow_mixed: bool = False,
    fused_experts: bool = False,
) -> ArchitecturePlan:
    """Find out what mergekit will merge for these checkpoints. No weights are read; imports mergekit (seconds).

    Args:
        base: the base checkpoint; its `config.json` decides.
        experts: the others that will be merged; may be empty.
        trust_remote_code: let `config.json` load code from the model folder.
        allow_mixed: accept checkpoints of different architectures (mergekit's `--allow-crimes`).
        fused_experts: plan a mixture's experts stacked, as mergekit does, also where they are stored apart.

    Raises:
        UserError: a config cannot be read, the architectures differ, a required tensor is missing, or the merge would
            lose a tensor that the model has.
    """
    with quiet_mergekit():
        mixed = any(other.architecture != base.architecture for other in experts)
        if mixed and not allow_mixed:
            reason = "an expert is the language tower alone"
            plan = _by_stored_names(base, experts, trust_remote_code, reason)
            return plan or _refuse(base, [], None)
        if any(one.stacks for one in (base, *experts)):
            reason = "stacked experts are merged each on their own"
            plan = _by_stored_names(base, experts, trust_remote_code, reason)
            return plan or _refuse_stacks(base)
        candidates = []
        for candidate in mergekit_candidates(MergekitInputs(base, tuple(experts), trust_remote_code)):
            if candidate.fits and candidate.knows_tokens and (fused_experts or not candidate.converted):
                return candidate.plan
            candidates.append(candidate)
            if candidate.fits and candidate.converted and not fused_experts:
                break  # inference would convert the same; with thousands of experts it takes minutes
        refusal = None
        try:
            reason = candidates[-1].plan.reason or misfit(candidates[-1], base)
            plan = _by_stored_names(base, experts, trust_remote_code, reason)
        except UserError as error:
            plan, refusal = None, error
        if plan is not None and not fused_experts:
            return plan
        converted = next((candidate for candidate in candidates if candidate.fits), None)
        if converted is not None:
            return converted.plan
        if plan is not None:
            return plan
        return _refuse(base, candidates, refusal)


def _refuse_stacks(base: Checkpoint) -> NoReturn:
    raise UserError(
        f"the checkpoints store the experts of {base.architecture} stacked in some and apart in others, in parts that cannot "
        "be told apart; save them all with one version of transformers",
        "model-not-mergeable",
    )


def _refuse(base: Checkpoint, candidates: "Sequence[Candidate]", refusal: UserError | None) -> NoReturn:
    if refusal is not None:
        raise refusal
    complete = [candidate for candidate in candidates if not candidate.lacking]
    if candidates and not complete:
        name, absent = candidates[-1].lacking[0]
        raise UserError(
            f"model {name}: its weights lack {some_of(absent)}, which its architecture ({base.architecture}) needs for a "
            "merge; is the checkpoint complete?",
            "model-incomplete",
        )
    best = min(complete, key=lambda candidate: sum(map(len, candidate.plan.dropped.values())), default=None)
    for checkpoint, lost in best.lost if best is not None else ():
        raise UserError(
            f"model {checkpoint.name}: mergekit would leave {some_of(lost)} out of the merge, which the model "
            f"({base.architecture}) has; this architecture cannot be merged with this mergekit",
            "model-not-mergeable",
        )
    raise UserError(
        f"the checkpoints store {base.architecture} in different layouts, which neither can be brought into; save them all "
        "with one version of transformers",
        "model-not-mergeable",
    )


def _by_stored_names(
    base: Checkpoint, experts: Sequence[Checkpoint], trust_remote_code: bool, reason: str
) -> ArchitecturePlan | None:
    """The plan by stored names; None where one checkpoint stores in pieces what another one has whole."""
    from utils.models.stored_architecture import read_models, stored_architecture, stored_tensors

    models = read_models(base, experts, trust_remote_code)
    tensors = stored_tensors(models)
    if tensors is None:
        return None
    planned = tuple(
        PlannedTensor(one.name, not one.everywhere, one.spellings, one.tied, one.vocabulary_axis) for one in tensors
    )
    missing = {
        one.checkpoint.folder: tuple(
            tensor.name for tensor in planned if tensor.stored_name(one.checkpoint.tensors) is None
        )
        for one in models
    }
    spellings = {name: tensor.name for tensor in planned for name in (*tensor.aliases, tensor.name)}
    for parameter, header in models[0].layout.direct.items():
        spellings.setdefault(parameter, spellings[header.name])
    names = {name for tensor in planned for name in (tensor.name, *tensor.aliases, *tensor.tied_names)}
    dropped = {one.checkpoint.folder: tuple(name for name in one.layout.unread if name not in names) for one in models}
    info = stored_architecture(models, tensors).model_copy(
        update={"vocab_size_config_key": vocabulary_key(models[0].model.config)}
    )
    return ArchitecturePlan(STORED, reason, planned, missing, dropped, spellings, info)

"""How mergekit sees a set of checkpoints: which tensors it plans, under which names, and what it would leave out.

mergekit reads an architecture either from a *definition* (a JSON file it ships, chosen by the class name in
`config.json`) or, where it ships none, by *inference* (it builds the model without weights through transformers).
Neither always fits what transformers saves today. Definitions ask for buffers that are no longer stored (GPT-NeoX) or
for an output head that is tied (Phi-3), and do not know biases that a config switches on (Llama); inference loses a
head that is stored under another name than the module's (GPT-NeoX again). Both hold every block to one template, so that hybrids do not fit, and both name the experts of
mixtures as transformers stacks them, where most releases store each expert apart. So these are tried, the first that
misses and drops nothing, and writes the names that the base stores, wins:

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

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from utils.errors import UserError, brief
from utils.models.checkpoints import Checkpoint

if TYPE_CHECKING:
    from utils.mergekit_api import ModelArchitecture, ModelReference

DEFINITION = "mergekit's definition"
ADJUSTED = "mergekit's definition, adjusted"
INFERENCE = "mergekit's inference"
STORED = "the names that the base stores"
_SHOWN = 4


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor that mergekit will merge and write.

    `name` is what filters are matched on and what the output is called. A checkpoint may store it under `name`, under
    one of `aliases`, or, if it is tied, under one of `tied_names`; mergekit tries them in this order.
    """

    name: str
    optional: bool = False
    aliases: tuple[str, ...] = ()
    tied_names: tuple[str, ...] = ()
    vocabulary_axis: int | None = None

    def stored_name(self, tensors: Mapping[str, object]) -> str | None:
        """The name under which a checkpoint's `tensors` hold this one, or None."""
        return next((name for name in (self.name, *self.aliases, *self.tied_names) if name in tensors), None)

    def is_stored(self, tensors: Mapping[str, object]) -> bool:
        """Whether the tensor itself, not one it is tied to, is in a checkpoint's `tensors`."""
        return any(name in tensors for name in (self.name, *self.aliases))


@dataclass(frozen=True)
class ArchitecturePlan:
    """What mergekit will merge for a set of checkpoints.

    Attributes:
        origin: `DEFINITION`, `ADJUSTED`, `INFERENCE` or `STORED`.
        reason: why it is not the definition as shipped, as a clause ("" if it is).
        tensors: every tensor that will be merged and written, in the order of planning. Optional ones that no
            checkpoint stores (a tied head) are not in it.
        missing: per checkpoint folder, planned optional tensors that it can supply neither directly nor through a
            tied one or a conversion, though another checkpoint does. (A missing required one is a `UserError`.)
        dropped: per checkpoint folder, stored tensors that the merge leaves out. The model class reads none of them:
            they are buffers that older versions saved, or extra heads. (Losing one that it reads is a `UserError`.)
        spellings: planned name by every name that a tensor of the base goes by: stored, alias, module parameter.
        info: mergekit's `ModelArchitecture`, to hand to its planner.
    """

    origin: str
    reason: str
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    missing: Mapping[Path, tuple[str, ...]]
    dropped: Mapping[Path, tuple[str, ...]]
    spellings: Mapping[str, str] = field(repr=False)
    info: "ModelArchitecture" = field(repr=False)


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
        candidates = []
        for candidate in _candidates(_Inputs(base, tuple(experts), trust_remote_code)):
            if candidate.fits and (fused_experts or not candidate.converted):
                return candidate.plan
            candidates.append(candidate)
        refusal = None
        try:
            plan = _by_stored_names(base, experts, trust_remote_code, candidates[-1].plan.reason)
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


def _refuse(base: Checkpoint, candidates: "Sequence[_Candidate]", refusal: UserError | None) -> NoReturn:
    if refusal is not None:
        raise refusal
    complete = [candidate for candidate in candidates if not candidate.lacking]
    if candidates and not complete:
        name, absent = candidates[-1].lacking[0]
        raise UserError(
            f"model {name}: its weights lack {_some(absent)}, which its architecture ({base.architecture}) needs for a "
            "merge; is the checkpoint complete?",
            "model-incomplete",
        )
    best = min(complete, key=lambda candidate: sum(map(len, candidate.plan.dropped.values())), default=None)
    for checkpoint, lost in best.lost if best is not None else ():
        raise UserError(
            f"model {checkpoint.name}: mergekit would leave {_some(lost)} out of the merge, which the model "
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


def vocabulary_key(config: Any) -> str:
    """Where a config says how many tokens there are; a model with a vision tower says it of its language tower."""
    nested = config.get_text_config(decoder=True)
    return next((f"{key}.vocab_size" for key, value in vars(config).items() if value is nested), "vocab_size")


def model_reference(checkpoint: Checkpoint) -> "ModelReference":
    """mergekit's reference to a checkpoint's folder; safe for paths that hold '+' or '@'."""
    from utils.mergekit_api import ModelPath, ModelReference

    return ModelReference(model=ModelPath(path=str(checkpoint.folder)))


@contextlib.contextmanager
def quiet_mergekit() -> Iterator[None]:
    """Silence the warnings that mergekit and transformers log while an architecture is resolved."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


class _Inputs:
    """The checkpoints with what mergekit and transformers know about them, looked up once and only when needed."""

    def __init__(self, base: Checkpoint, experts: tuple[Checkpoint, ...], trust_remote_code: bool) -> None:
        from utils.mergekit_api import MergeOptions

        self.base, self.checkpoints = base, (base, *experts)
        self.options = MergeOptions(trust_remote_code=trust_remote_code)
        self.configs = [load_config(checkpoint, trust_remote_code) for checkpoint in self.checkpoints]
        self.references = [model_reference(checkpoint) for checkpoint in self.checkpoints]
        self._module: tuple[frozenset[str], tuple[str, ...]] | None = None
        self._transforms: list[Any] | None = None

    def module_names(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Parameter and buffer names of the base's model class, and patterns of the tied ones; empty if unknown."""
        if self._module is None:
            from utils.mergekit_api import get_transformers_info

            _, tied, _, names = get_transformers_info(self.references[0], self.options)
            self._module = frozenset(names or ()), tuple(tied or ())
        return self._module

    def is_tied(self, name: str) -> bool:
        """Whether the model class shares this parameter with another one."""
        return any(re.search(pattern, name) for pattern in self.module_names()[1])

    def is_own(self, stored: str) -> bool:
        """Whether the model class loads a stored tensor (under its name, a converted one, or below its own prefix)."""
        targets = self.conversion_targets(stored)
        return any(name in targets or name.partition(".")[2] in targets for name in self.module_names()[0])

    def conversion_targets(self, stored: str) -> set[str]:
        """The names that transformers' own loading may turn a stored name into, itself included."""
        if self._transforms is None:
            from utils.mergekit_api import get_checkpoint_conversion_mapping

            keys = (self.base.architecture, self.configs[0].model_type)
            self._transforms = [rule for key in keys for rule in get_checkpoint_conversion_mapping(key) or ()]
        names = {stored}
        for transform in self._transforms:
            for name in tuple(names):
                renamed, pattern = transform.rename_source_key(name)
                if pattern is not None:
                    first, *others = transform.target_patterns
                    names.update([renamed, *(renamed.replace(first, other) for other in others)])
        return names


@dataclass(frozen=True)
class _Candidate:
    plan: ArchitecturePlan
    lacking: list[tuple[str, tuple[str, ...]]]  # model name, required tensors it cannot supply
    lost: list[tuple[Checkpoint, tuple[str, ...]]]  # dropped tensors that the model class reads
    converted: bool  # whether tensors are planned that a checkpoint stores in another form

    @property
    def fits(self) -> bool:
        """Whether nothing is missed and nothing left out."""
        return not self.lacking and not any(self.plan.dropped.values())


def _candidates(inputs: _Inputs) -> Iterator[_Candidate]:
    from utils.mergekit_api import arch_info_for_config, infer_architecture_info

    base = inputs.base
    infos = [arch_info_for_config(config) for config in inputs.configs]
    reason = f"mergekit ships no definition of {base.architecture}"
    shipped = None
    if all(info is not None for info in infos):
        try:
            shipped = _candidate(inputs, infos[0], DEFINITION, "")
        except RuntimeError as error:  # the config has moved what the definition looks for
            reason = f"its definition of {base.architecture} does not fit this config.json: {brief(error)}"
    if shipped is not None:
        yield shipped
        reason = _misfit(shipped, base)
        adjusted = _adjust(inputs, infos[0], {name for _, names in shipped.lacking for name in names})
        if adjusted is not None:
            yield _candidate(inputs, adjusted, ADJUSTED, reason)
    inferred = infer_architecture_info(tuple(inputs.references), inputs.references[0], inputs.options)
    inferred = inferred.model_copy(update={"vocab_size_config_key": vocabulary_key(inputs.configs[0])})
    yield _candidate(inputs, inferred, INFERENCE, reason)


def _misfit(shipped: _Candidate, base: Checkpoint) -> str:
    if shipped.lacking:
        return f"its definition of {base.architecture} asks for {_some(shipped.lacking[0][1])}, not stored here"
    unread = [name for names in shipped.plan.dropped.values() for name in names]
    return f"its definition of {base.architecture} would leave out {_some(unread)}"


def _candidate(inputs: _Inputs, info: "ModelArchitecture", origin: str, reason: str) -> _Candidate:
    weights = [
        PlannedTensor(w.name, w.optional, tuple(w.aliases or ()), tuple(w.tied_names or ()), w.vocabulary_axis)
        for w in info.all_weights(inputs.configs[0])
    ]
    if origin == INFERENCE:
        # It takes whatever a checkpoint lacks for optional, and collects names in sets: call optional only what is
        # tied, and put the rest into an order that does not change between runs.
        weights = [replace(weight, optional=weight.optional and inputs.is_tied(weight.name)) for weight in weights]
        weights.sort(key=lambda weight: _natural(weight.name))
    planned = tuple(w for w in weights if not w.optional or any(w.is_stored(c.tensors) for c in inputs.checkpoints))
    missing, dropped, lacking, lost, converted = {}, {}, [], [], False
    for checkpoint, config in zip(inputs.checkpoints, inputs.configs, strict=True):
        absent, unread, changed = _compare(inputs, planned, checkpoint, config.model_type)
        converted = converted or changed
        missing[checkpoint.folder] = tuple(tensor.name for tensor in absent if tensor.optional)
        dropped[checkpoint.folder] = tuple(sorted(unread, key=_natural))
        if required := tuple(tensor.name for tensor in absent if not tensor.optional):
            lacking.append((checkpoint.name, required))
        if read := tuple(name for name in dropped[checkpoint.folder] if inputs.is_own(name)):
            lost.append((checkpoint, read))
    plan = ArchitecturePlan(origin, reason, planned, missing, dropped, _spellings(inputs, planned), info)
    return _Candidate(plan, lacking, lost, converted)


def _spellings(inputs: _Inputs, planned: Sequence[PlannedTensor]) -> dict[str, str]:
    own = {name: tensor.name for tensor in planned for name in (*tensor.aliases, tensor.name)}
    found = dict(own)
    for stored in inputs.base.tensors:
        names = inputs.conversion_targets(stored)
        target = own.get(stored) or next((own[name] for name in sorted(names) if name in own), None)
        if target is not None:
            found |= {name: target for name in names if name not in own}
    return found


def _compare(
    inputs: _Inputs, planned: Sequence[PlannedTensor], checkpoint: Checkpoint, model_type: str
) -> tuple[list[PlannedTensor], list[str], bool]:
    """The planned tensors that a checkpoint cannot supply, the stored names that none of them reads, and whether some
    are stored in another form."""
    absent = [tensor for tensor in planned if tensor.stored_name(checkpoint.tensors) is None]
    read = {tensor.stored_name(checkpoint.tensors) for tensor in planned}
    unread = [name for name in checkpoint.tensors if name not in read]
    if absent and unread:  # stored in an older layout that mergekit converts while it loads?
        from utils.mergekit_api import can_convert_checkpoint_keys

        keys = set(checkpoint.tensors)
        converted = {t.name for t in absent if can_convert_checkpoint_keys(model_type, keys, t.name)}
        absent = [tensor for tensor in absent if tensor.name not in converted]
        unread = [name for name in unread if not converted & inputs.conversion_targets(name)]
        return absent, unread, bool(converted)
    return absent, unread, False


def _adjust(inputs: _Inputs, info: "ModelArchitecture", lacking: set[str]) -> "ModelArchitecture | None":
    """`info` with the lacking tensors optional that the model class does not have or ties; None if there are none."""
    from utils.models.definition_adjustment import with_optional

    names, _ = inputs.module_names()
    stored = {name for checkpoint in inputs.checkpoints for name in checkpoint.tensors}
    spare = {name for name in lacking - stored if names and (name not in names or inputs.is_tied(name))}
    return with_optional(info, inputs.configs[0], spare) if spare else None


def load_config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """A checkpoint's config as transformers reads it, with the one architecture that mergekit takes.

    Raises:
        UserError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a malformed config makes transformers raise
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "" if trust_remote_code else "; if the model needs its own code, give --trust_remote_code"
        raise UserError(
            f"model {checkpoint.name}: config.json cannot be loaded: {first}{hint}", "model-config-unreadable"
        ) from error
    config.architectures = [checkpoint.architecture]  # mergekit takes exactly one
    return config


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _some(names: Sequence[str]) -> str:
    unique = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(unique[:_SHOWN]) + more

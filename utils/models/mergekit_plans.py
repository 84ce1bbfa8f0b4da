"""What mergekit's own descriptions of an architecture make of a set of checkpoints.

These are its definition, with or without adjustments, and its inference.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from utils.errors import brief
from utils.models.checkpoints import Checkpoint
from utils.models.definition_adjustment import with_optional
from utils.models.mergekit_inputs import load_config, model_reference, vocabulary_key
from utils.models.planned_tensors import (
    ADJUSTED,
    DEFINITION,
    INFERENCE,
    ArchitecturePlan,
    PlannedTensor,
    natural_order,
    some_of,
)

if TYPE_CHECKING:
    from utils.mergekit_api import ModelArchitecture


class MergekitInputs:
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
class Candidate:
    plan: ArchitecturePlan
    lacking: list[tuple[str, tuple[str, ...]]]  # model name, required tensors it cannot supply
    lost: list[tuple[Checkpoint, tuple[str, ...]]]  # dropped tensors that the model class reads
    converted: bool  # whether tensors are planned that a checkpoint stores in another form

    @property
    def fits(self) -> bool:
        """Whether nothing is missed and nothing left out."""
        return not self.lacking and not any(self.plan.dropped.values())

    @property
    def knows_tokens(self) -> bool:
        """Whether some tensor has an axis of tokens; without transformers' class mergekit knows names alone."""
        return any(tensor.vocabulary_axis is not None for tensor in self.plan.tensors)


def mergekit_candidates(inputs: MergekitInputs) -> Iterator[Candidate]:
    from utils.mergekit_api import arch_info_for_config, infer_architecture_info

    base = inputs.base
    infos = [arch_info_for_config(config) for config in inputs.configs]
    reason = f"mergekit ships no definition of {base.architecture}"
    shipped = None
    if all(info is not None for info in infos):
        if "." in (key := vocabulary_key(inputs.configs[0])):  # definitions know it where it stood in older configs
            infos[0] = infos[0].model_copy(update={"vocab_size_config_key": key})
        try:
            shipped = _candidate(inputs, infos[0], DEFINITION, "")
        except RuntimeError as error:  # the config has moved what the definition looks for
            reason = f"its definition of {base.architecture} does not fit this config.json: {brief(error)}"
    if shipped is not None:
        yield shipped
        reason = misfit(shipped, base)
        adjusted = _adjust(inputs, infos[0], {name for _, names in shipped.lacking for name in names})
        if adjusted is not None:
            yield _candidate(inputs, adjusted, ADJUSTED, reason)
    inferred = infer_architecture_info(tuple(inputs.references), inputs.references[0], inputs.options)
    inferred = inferred.model_copy(update={"vocab_size_config_key": vocabulary_key(inputs.configs[0])})
    yield _candidate(inputs, inferred, INFERENCE, reason)


def misfit(shipped: Candidate, base: Checkpoint) -> str:
    """Why mergekit's definition is not taken as it is, as a clause."""
    if shipped.lacking:
        return f"its definition of {base.architecture} asks for {some_of(shipped.lacking[0][1])}, not stored here"
    unread = [name for names in shipped.plan.dropped.values() for name in names]
    if not unread:
        return f"its definition of {base.architecture} has tensors in another form than they are stored in, such as stacked"
    return f"its definition of {base.architecture} would leave out {some_of(unread)}"


def _candidate(inputs: MergekitInputs, info: "ModelArchitecture", origin: str, reason: str) -> Candidate:
    weights = [
        PlannedTensor(w.name, w.optional, tuple(w.aliases or ()), tuple(w.tied_names or ()), w.vocabulary_axis)
        for w in info.all_weights(inputs.configs[0])
    ]
    if origin == INFERENCE:
        # It takes whatever a checkpoint lacks for optional, and collects names in sets: call optional only what is
        # tied, and put the rest into an order that does not change between runs.
        weights = [replace(weight, optional=weight.optional and inputs.is_tied(weight.name)) for weight in weights]
        weights.sort(key=lambda weight: natural_order(weight.name))
    planned = tuple(w for w in weights if not w.optional or any(w.is_stored(c.tensors) for c in inputs.checkpoints))
    missing, dropped, lacking, lost, converted = {}, {}, [], [], False
    for checkpoint, config in zip(inputs.checkpoints, inputs.configs, strict=True):
        absent, unread, changed = _compare(inputs, planned, checkpoint, config.model_type)
        converted = converted or changed
        missing[checkpoint.folder] = tuple(tensor.name for tensor in absent if tensor.optional)
        dropped[checkpoint.folder] = tuple(sorted(unread, key=natural_order))
        if required := tuple(tensor.name for tensor in absent if not tensor.optional):
            lacking.append((checkpoint.name, required))
        if read := tuple(name for name in dropped[checkpoint.folder] if inputs.is_own(name)):
            lost.append((checkpoint, read))
    plan = ArchitecturePlan(origin, reason, planned, missing, dropped, _spellings(inputs, planned), info)
    return Candidate(plan, lacking, lost, converted)


def _spellings(inputs: MergekitInputs, planned: Sequence[PlannedTensor]) -> dict[str, str]:
    own = {name: tensor.name for tensor in planned for name in (*tensor.aliases, tensor.name)}
    found = dict(own)
    for stored in inputs.base.tensors:
        names = inputs.conversion_targets(stored)
        target = own.get(stored) or next((own[name] for name in sorted(names) if name in own), None)
        if target is not None:
            found |= {name: target for name in names if name not in own}
    return found


def _compare(
    inputs: MergekitInputs, planned: Sequence[PlannedTensor], checkpoint: Checkpoint, model_type: str
) -> tuple[list[PlannedTensor], list[str], bool]:
    """The planned tensors that a checkpoint cannot supply, the stored names that none of them reads, and whether some
    are stored in another form."""
    absent = [tensor for tensor in planned if tensor.stored_name(checkpoint.tensors) is None]
    read = {tensor.stored_name(checkpoint.tensors) for tensor in planned}
    unread = [name for name in checkpoint.tensors if name not in read]
    if absent and unread:  # stored in an older layout that mergekit converts while it loads?
        from utils.mergekit_api import can_convert_checkpoint_keys

        # mergekit goes through all names it is given for every tensor that is asked for; a mixture has tens of thousands.
        targets = {name: inputs.conversion_targets(name) for name in checkpoint.tensors}
        sources: dict[str, set[str]] = {}
        for name, found in targets.items():
            for target in found:
                sources.setdefault(target, set()).add(name)
        converted = {
            t.name
            for t in absent
            if t.name in sources and can_convert_checkpoint_keys(model_type, sources[t.name], t.name)
        }
        absent = [tensor for tensor in absent if tensor.name not in converted]
        unread = [name for name in unread if not converted & targets[name]]
        return absent, unread, bool(converted)
    return absent, unread, False


def _adjust(inputs: MergekitInputs, info: "ModelArchitecture", lacking: set[str]) -> "ModelArchitecture | None":
    """`info` with the lacking tensors optional that the model class does not have or ties; None if there are none."""
    names, _ = inputs.module_names()
    stored = {name for checkpoint in inputs.checkpoints for name in checkpoint.tensors}
    spare = {name for name in lacking - stored if names and (name not in names or inputs.is_tied(name))}
    return with_optional(info, inputs.configs[0], spare) if spare else None

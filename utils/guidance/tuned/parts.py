"""What each expert adds to a merge, written once; and the weights of the sum of such parts, each times a coefficient."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.guidance.tuned.start import Start
from utils.merging.merged_tensors import MergeWork, merged_tensors, prepare
from utils.merging.planning import plan_recipe
from utils.merging.settings import MergeSettings
from utils.models.decoder import Decoder
from utils.models.headers import INDEX, TensorHeader, read_headers
from utils.models.shard_files import ShardFiles, TensorSpec
from utils.models.stored_layout import StoredLayout
from utils.models.tensor_files import as_bytes
from utils.models.weight_source import StreamedWeights, WeightSource
from utils.pair.config import ModelEntry
from utils.passes.block_runner import block_tensor_names
from utils.passes.experts_in_parts import stack_names
from utils.passes.subjects import Subject
from utils.publishing.manifest import to_json


@dataclass(frozen=True)
class Parts:
    """Where parts are: by expert type, the header of each parameter's, by the parameter's name in the model (float32)."""

    headers: Mapping[str, Mapping[str, TensorHeader]] = field(repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, in the model's order."""
        return tuple(next(iter(self.headers.values())))


def plan_parts(
    start: Start, base: Subject, experts: Sequence[ModelEntry], settings: MergeSettings
) -> dict[str, MergeWork]:
    """Plan, for each expert, the merge that adds its part alone. No weights are read.

    Raises:
        UserError: what command 3 would refuse; a merge whose tensors are not the base's.
    """
    works = {}
    for entry in experts:
        planned = plan_recipe(settings, start.part_recipe(base.entry, experts, entry.type), lambda line: None)
        shapes = {tensor.name: tensor.shape for tensor in planned.plan.tensors}
        for header in (header for name in parameters_of(base) for header in base.layout.headers(name)):
            if shapes.get(header.name) != header.shape:
                got = list(shapes.get(header.name) or ())
                raise UserError(
                    f"{header.name}: the merge makes it {got}, the base has {list(header.shape)}; coefficients can be "
                    "tuned where a merge has the base's tensors and vocabulary",
                    "tuned-shapes",
                )
        works[entry.type] = prepare(planned)
    return works


def write_parts(works: Mapping[str, MergeWork], base: Subject, folder: Path) -> Parts:
    """Write the parts, a block of all experts at a time, outside the blocks a tensor, and where the base's experts come one
    at a time one of a block's: folders of safetensors for each expert of the pair, float32.

    Args:
        works: the merges of single experts, by type.
        base: the base.
        folder: where to write; it must not exist.
    """
    parameters, layout = parameters_of(base), base.layout
    weights = StreamedWeights(layout, torch.device("cpu"), torch.float32)
    placed: dict[str, dict[str, str]] = {type_: {} for type_ in works}
    headers: dict[str, dict[str, TensorHeader]] = {type_: {} for type_ in works}
    stacks = [
        stack_names(base.decoder, layer, layout) if base.experts_apart else ()
        for layer in range(len(base.decoder.blocks))
    ]
    others = [name for name in parameters if not any(name in own for own in stacks)]
    try:
        for layer, names in enumerate(stacks):
            targets = {type_: folder / type_ / f"experts-{layer:05d}" for type_ in works if names}
            for type_, found in _write_experts(works, base, weights, names, targets).items():
                headers[type_] |= found
        for number, names in enumerate(groups_of(base.decoder, others)):
            before = weights.fetch(names)
            stored = list(dict.fromkeys(one for name in names for one in layout.stored_names(name)))
            merged = merged_tensors(list(works.values()), stored)
            for type_, own in zip(works, merged, strict=True):
                found = {name: _parameter(layout, name, own).float().cpu().sub_(before[name]) for name in names}
                target = folder / type_ / f"part-{number:05d}.safetensors"
                target.parent.mkdir(parents=True, exist_ok=True)
                save_file({name: part.contiguous() for name, part in found.items()}, target)
                placed[type_] |= dict.fromkeys(names, target.name)
                own.clear()
                del found
    finally:
        weights.close()
    for type_, files in placed.items():
        (folder / type_ / INDEX).write_bytes(to_json({"weight_map": files}))
        there = headers[type_] | read_headers(folder / type_, type_)
        headers[type_] = {name: there[name] for name in parameters}
    return Parts(headers)


def _write_experts(
    works: Mapping[str, MergeWork],
    base: Subject,
    weights: StreamedWeights,
    names: Sequence[str],
    targets: Mapping[str, Path],
) -> dict[str, dict[str, TensorHeader]]:
    """Write the parts of a block's stacks, one expert of each at a time; their headers."""
    shapes = {name: tuple(base.decoder.model.get_parameter(name).shape) for name in names}
    specs = [TensorSpec(name, "float32", shape) for name, shape in shapes.items()]
    with ExitStack() as stack:
        files = {}
        for type_, target in targets.items():
            target.mkdir(parents=True)
            files[type_] = stack.enter_context(ShardFiles(target, specs, 0))
        for name, (experts, *_) in shapes.items():
            for expert in range(experts):
                stored = [header.name for header in base.layout.expert_headers(name, expert)]
                before = weights.fetch_expert(name, expert)
                for type_, own in zip(works, merged_tensors(list(works.values()), stored), strict=True):
                    matrix = base.layout.expert_matrix(name, expert, {one: own[one] for one in stored})
                    part = matrix.float().cpu().sub_(before).flatten()
                    files[type_].write(name, expert * part.nbytes, as_bytes(part))
    return {type_: read_headers(target, type_) for type_, target in targets.items()}


def parameters_of(base: Subject) -> list[str]:
    """The names in the model of the stored parameters; tied ones once."""
    return [name for name, _ in base.decoder.model.named_parameters() if name in base.layout]


def _parameter(layout: StoredLayout, name: str, stored: Mapping[str, Tensor]) -> Tensor:
    """A parameter from tensors by stored name."""
    conversion = layout.conversions.get(name)
    if conversion is None:
        return stored[layout.direct[name].name]
    return conversion.convert({header.name: stored[header.name] for header in conversion.sources})[name]


def _layout(headers: Mapping[str, TensorHeader]) -> StoredLayout:
    """Tensors that are stored as they are."""
    return StoredLayout(headers, (), (), ())


def groups_of(decoder: Decoder, names: Sequence[str]) -> list[list[str]]:
    """Each parameter outside the blocks by itself, since embeddings are large, and those of each block together."""
    in_blocks = block_tensor_names(decoder)
    groups: dict[str, list[str]] = {}
    for name in names:
        rest = name.removeprefix(f"{decoder.blocks_path}.")
        groups.setdefault(rest.split(".")[0] if name in in_blocks else name, []).append(name)
    return list(groups.values())


class SummedWeights:
    """Base plus parts, each times a coefficient: a weight source like those of `utils/models/weight_source.py`."""

    def __init__(
        self, base: WeightSource, parts: Parts, coefficients: Mapping[str, Mapping[str, float]], device: torch.device
    ) -> None:
        """Sum up `base`, a source in the dtype to compute in, and the parts by `coefficients` of type and parameter."""
        self.base, self.coefficients = base, coefficients
        self.layout, self.experts_apart = base.layout, base.experts_apart
        self.parts = {
            type_: StreamedWeights(_layout(own), device, torch.float32) for type_, own in parts.headers.items()
        }

    def fetch(self, names: list[str]) -> dict[str, Tensor]:
        """The sums, rounded once, in the dtype of the base's source; other tensors as they are there."""
        found = self.base.fetch(names)
        for name in found.keys() & next(iter(self.coefficients.values())).keys():
            total = found[name].float()
            for type_ in self.parts:  # one part of one tensor in memory
                total += self.part(type_, name).mul_(self.coefficients[type_][name])
            found[name] = total.to(found[name].dtype)
        return found

    def fetch_expert(self, name: str, expert: int) -> Tensor:
        """The same of one expert's matrix of a stack."""
        found = self.base.fetch_expert(name, expert)
        total = found.float()
        for type_ in self.parts:
            total += self.part_of_expert(type_, name, expert).mul_(self.coefficients[type_][name])
        return total.to(found.dtype)

    def part_of_expert(self, type_: str, name: str, expert: int) -> Tensor:
        """One expert's matrix of a part."""
        return self.parts[type_].fetch_expert(name, expert)

    def part(self, type_: str, name: str) -> Tensor:
        """One part, float32 on the device."""
        return self.parts[type_].fetch([name])[name]

    def read_ahead(self, names: list[str]) -> None:
        """Ask the system for the pages of all that is summed up."""
        for source in (self.base, *self.parts.values()):
            source.read_ahead(names)

    def close(self) -> None:
        """Close the files."""
        for source in (self.base, *self.parts.values()):
            source.close()

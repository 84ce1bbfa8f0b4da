"""The tensors of a merge without a model written: what command 3 would write, some tensors at a time, in memory.

    work = [prepare(planned) for planned in recipes]       # planned: utils.merging.planning
    for names in blocks:                                   # output names, e.g. of one block
        for tensors in merged_tensors(work, names): ...    # one dict for each recipe

The functions are those that command 3 merges with: pieces where they give mergekit's bits, else mergekit's executor. So
every tensor has the bits that the written model has (with the same settings, on the same kind of device).
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from utils.merging.draws import generator_states
from utils.merging.fast_sparsifiers import selecting_exactly
from utils.merging.pieces.by_mergekit import merge_by_mergekit
from utils.merging.pieces.choice import DirectTensor
from utils.merging.pieces.cuts import KnownCuts
from utils.merging.pieces.run import merge_directly
from utils.merging.plan import MergePlan, OutputTensor, set_up_loading
from utils.merging.planning import PlannedMerge
from utils.merging.stacked_outputs import WrittenTensor, written_tensors


@dataclass(frozen=True)
class MergeWork:
    """A planned merge with how each of its tensors is merged.

    `direct` are the tensors merged in pieces, `left` those that mergekit's executor merges, by name. `states` are
    those of torch's generator before each tensor, for methods that draw. `by_counting` replaces mergekit's sorting.
    `stacks` are the tensors of the result that are merged in slices, by name.
    """

    plan: MergePlan
    direct: Mapping[str, DirectTensor] = field(repr=False)
    left: Mapping[str, OutputTensor] = field(repr=False)
    states: Mapping[str, Tensor] = field(repr=False)
    by_counting: bool
    stacks: Mapping[str, WrittenTensor] = field(repr=False)


def prepare(planned: PlannedMerge) -> MergeWork:
    """Find out how the tensors of a planned merge are merged; for methods that draw, also where their numbers begin.

    The latter draws every number of the merge once (some 10 ns each on a CPU).

    Raises:
        UserError: tensors of this method cannot be merged one by one (code `merge-draws`).
    """
    plan, division = planned.plan, planned.division
    direct = {tensor.name: tensor for tensor in division.direct}
    left = {tensor.name: tensor for tensor, _ in division.left}
    states = generator_states(plan, planned.settings.random_seed)
    stacks = {one.name: one for one in written_tensors(plan) if one.name != one.merged[0].name}
    return MergeWork(plan, direct, left, states, division.by_counting, stacks)


def merged_tensors(
    works: Sequence[MergeWork],
    names: Sequence[str],
    known: KnownCuts | None = None,
    placed: Sequence[torch.dtype] | None = None,
) -> list[dict[str, Tensor]]:
    """Merge the tensors of some names by one or several plans.

    Inputs that several plans have in common are read once: tensors of one name are merged together, piece by piece or by
    mergekit's executor. Every plan's tensors of these names are in memory at the end, so ask for a block at a time.

    Args:
        works: the plans, prepared.
        names: names of tensors of the result (`utils/merging/stacked_outputs.py`) that every plan has.
        known: cuts by magnitude that were found in these inputs before, which are most of a merge's work; those found
            now are added.
        placed: for each plan the dtype that its tensors are wanted in, once they have been rounded to the plan's output
            dtype; None for that.

    Returns:
        For each plan its tensors by name, contiguous, in that dtype, on its device. An optional tensor
        that the method skips is not among them.

    Raises:
        KeyError: a plan has no tensor of that name.
        UserError: a merged tensor is not finite, or an input cannot be read.
    """
    merged: list[dict[str, Tensor]] = [{} for _ in works]
    pieces, drawn, others = [], [], []
    for name, place, work in _planned(works, names):
        if name in work.direct:
            dtype = None if placed is None else placed[place]
            pieces.append((work.direct[name], _Held(merged[place], work.direct[name], dtype)))
        else:
            (drawn if work.states else others).append((place, work.left[name]))
    if pieces:
        merge_directly(pieces, torch.get_num_threads(), lambda name, nbytes: None, known)
    for by_counting in (False, True):
        alike = [one for one in others if works[one[0]].by_counting == by_counting]
        _by_mergekit(works, alike, merged)
    for one in drawn:
        with _numbers_from(works[one[0]], one[1].name):
            _by_mergekit(works, [one], merged)
    for tensors, dtype in zip(merged, placed or (), strict=placed is not None):
        for name in [name for name, value in tensors.items() if value.is_floating_point()]:
            tensors[name] = tensors[name].to(dtype)  # those of mergekit's; the others are in it
    for work, own in zip(works, merged, strict=True):
        for name in dict.fromkeys(names):
            if name in work.stacks:
                slices = [own.pop(one.name, None) for one in work.stacks[name].merged]
                if all(one is not None for one in slices):  # else the written model has no such stack either
                    own[name] = torch.cat([one.view(-1) for one in slices]).view(work.stacks[name].shape)
    return merged


def _planned(works: Sequence[MergeWork], names: Sequence[str]) -> Iterator[tuple[str, int, MergeWork]]:
    """The planned tensors of the result's, each with a plan and its place; a tensor of all plans together."""
    for name in dict.fromkeys(names):
        own = [[one.name for one in work.stacks[name].merged] if name in work.stacks else [name] for work in works]
        for number in range(max(map(len, own), default=0)):
            for place, work in enumerate(works):
                if number < len(own[place]):
                    yield own[place][number], place, work


class _Held:
    """Takes one merged tensor, piece by piece, into memory, in the dtype that it is wanted in."""

    def __init__(self, into: dict[str, Tensor], tensor: DirectTensor, dtype: torch.dtype | None) -> None:
        into[tensor.name] = torch.empty(tensor.headers[0].shape, dtype=dtype or tensor.out_dtype)
        self._entries, self._dtype = into[tensor.name].view(-1), tensor.out_dtype

    @torch.inference_mode()  # which is of a thread: the caller's does not hold here
    def write(self, name: str, start: int, content: memoryview) -> None:
        piece = torch.frombuffer(content, dtype=self._dtype)
        first = start // self._dtype.itemsize
        self._entries[first : first + piece.numel()].copy_(piece)


def _by_mergekit(
    works: Sequence[MergeWork], tensors: Sequence[tuple[int, OutputTensor]], merged: Sequence[dict[str, Tensor]]
) -> None:
    """Merge tensors, each given with the place of its plan, by one run of mergekit's executor."""
    if not tensors:
        return
    first = works[tensors[0][0]]
    for place, _ in tensors:
        set_up_loading(works[place].plan.options, works[place].plan.inputs)
    with selecting_exactly(first.by_counting):
        planned = [(works[place].plan, tensor) for place, tensor in tensors]
        for number, value in merge_by_mergekit(planned, first.plan.options.device):
            place, tensor = tensors[number]
            merged[place][tensor.name] = value


@contextlib.contextmanager
def _numbers_from(work: MergeWork, name: str) -> Iterator[None]:
    """Let torch draw as it does in the whole merge; its own numbers go on afterwards where they were."""
    device = torch.device(work.plan.options.device)
    on_gpu = device.type != "cpu"
    with torch.random.fork_rng([device] if on_gpu else []):
        if on_gpu:
            torch.cuda.set_rng_state(work.states[name], device)
        else:
            torch.set_rng_state(work.states[name])
        yield

"""Random numbers of a merge: one stream runs through all tensors, in mergekit's order; where each tensor's own begin.

A tensor that is merged alone gets the numbers that it gets in the whole merge if the generator is put where the
tensors before it leave it. To find that, as many numbers are drawn as they draw, and thrown away: neither the
probabilities nor the tensors' values change how many that are.
"""

import math

import torch
from torch import Tensor

from utils.errors import UserError
from utils.mergekit_api import ExecuteMergeMethodTask, Executor, MergeMethod, SparsificationMethod
from utils.merging.plan import MergePlan, OutputTensor
from utils.models.headers import FLOAT_DTYPES

_BY_CHANCE = (SparsificationMethod.random, SparsificationMethod.della_magprune)
_AT_ONCE = 2**22  # numbers
_SAMPLING = ("arcee_fusion",)  # draws a sample of the entries of large tensors


def draws_numbers(method: MergeMethod) -> bool:
    """Whether a merge method leaves entries out by chance."""
    return getattr(method, "sparsification_method", None) in _BY_CHANCE


def generator_states(plan: MergePlan, seed: int) -> dict[str, Tensor]:
    """The state of torch's generator before each tensor of a merge that is begun with `seed`, by tensor.

    Empty for methods that draw nothing. The states are those of the plan's device.

    Raises:
        UserError: the method draws numbers in a way that is not known here, or a tensor's shape is not known.
    """
    method = plan.method
    name = method.spec.name
    if name in _SAMPLING:
        raise UserError(f"{name} samples entries at random, so its tensors cannot be merged one by one", "merge-draws")
    if not draws_numbers(method):
        return {}
    device = torch.device(plan.options.device)
    generator = torch.Generator(device).manual_seed(seed)
    states = {}
    for tensor in _in_order(plan):
        if tensor.shape is None:
            raise UserError(
                f"{name} drops entries at random, so tensors that transformers converts while loading "
                f"({tensor.name}) cannot be merged one by one",
                "merge-draws",
            )
        states[tensor.name] = generator.get_state()
        for _ in range(_masks(tensor, method)):
            _pass_over(generator, tensor.shape)
    return states


def _in_order(plan: MergePlan) -> list[OutputTensor]:
    """The tensors in the order in which mergekit's executor merges them all."""
    by_task = {tensor.task: tensor for tensor in plan.tensors}
    schedule = Executor(list(by_task)).schedule.tasks
    tasks = (handle.task() for handle in schedule)
    return [by_task[task] for task in tasks if isinstance(task, ExecuteMergeMethodTask)]


def _masks(tensor: OutputTensor, method: MergeMethod) -> int:
    """How many changes that go into a tensor are cut by chance; a cut draws one number for each entry."""
    task = tensor.task
    headers = [tensor.sources[model] for model in task.model_order if model in tensor.sources]
    changed = [model for model in task.model_order if model in tensor.sources and model != task.base_model]
    if task.base_model not in tensor.sources or any(header.dtype not in FLOAT_DTYPES for header in headers):
        return 0  # copied, or left out
    densities = [task.input_parameters[model]["density"] for model in changed]
    # of a density of 0 dare draws nothing but zeros, and della draws nothing
    least = 0 if method.sparsification_method == SparsificationMethod.random else math.ulp(0)
    return sum(least <= density < 1 for density in densities)


def _pass_over(generator: torch.Generator, shape: tuple[int, ...]) -> None:
    """Draw, and throw away, as many numbers as torch.bernoulli does for one tensor in any dtype but float64."""
    if generator.device.type != "cpu":  # where how many are drawn depends on the kernel
        torch.bernoulli(torch.full(shape, 0.5, device=generator.device), generator=generator)
        return
    left = math.prod(shape)
    numbers = torch.empty(min(left, _AT_ONCE), dtype=torch.uint8)
    while left:
        left -= numbers[:left].random_(generator=generator).numel()

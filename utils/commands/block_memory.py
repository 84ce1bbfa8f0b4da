"""Whether the blocks of the models fit into memory, decided once, before weights are read: whole, or with the experts of
mixtures one at a time; refused where neither."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from utils.errors import UserError
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import GuidanceMethod, guidance_methods
from utils.passes.experts_in_parts import parts_bytes
from utils.passes.experts_trial import come_one_at_a_time
from utils.passes.subjects import Subject, activation_estimate
from utils.runtime import available_bytes, device_name, gigabytes


def placed_in_memory(job: MeasureJob, method: GuidanceMethod) -> MeasureJob:
    """The job with it decided for each model whether the experts of its blocks are fetched one at a time.

    They are where the largest block does not fit whole, beside what lies outside the blocks and what the text takes, of as
    many models as the method has in memory at a time.

    Raises:
        UserError: what lies outside a model's blocks and its largest block (of a mixture only that of it which cannot come one
            expert at a time, where the architecture allows that) do not fit together.
    """
    return replace(
        job, subjects=tuple(_placed(subject, job.devices[0], method, len(job.experts)) for subject in job.subjects)
    )


def parts_lines(job: MeasureJob) -> Iterator[str]:
    """Lines that say of which models experts are fetched one at a time."""
    for subject in job.subjects:
        if subject.experts_apart:
            free = gigabytes(available_bytes(job.devices[0]))
            yield (
                f"{subject.entry.type}: blocks do not fit into {free} whole, so the matrices of its experts are fetched one at a "
                "time, on every pass of a micro-batch or sample through it"
            )


def _placed(subject: Subject, device: torch.device, method: GuidanceMethod, experts: int) -> Subject:
    whole, apart, _ = parts_bytes(subject.decoder, subject.layout)
    needs = BlockNeeds(whole, apart, subject.dtype, available_bytes(device), is_gpu=device.type != "cpu")
    if method.models_at_once(experts) * needs.in_dtype(method, whole) + activation_estimate(subject) <= needs.free:
        return replace(subject, experts_apart=False)
    if apart < whole and not come_one_at_a_time(subject):
        needs = replace(needs, apart=whole, together=True)
    if needs.of(method) > needs.free:
        raise UserError(
            f"model {subject.entry.name}: its largest block and what lies outside its blocks are {gigabytes(needs.of(method))} "
            f"in {str(needs.dtype_of(method)).removeprefix('torch.')}, and {device_name(device)} has {gigabytes(needs.free)} "
            f"free{needs.why}; use {needs.remedies(method, experts)}",
            "memory-block-too-large",
        )
    return replace(subject, experts_apart=needs.apart < whole)


@dataclass(frozen=True)
class BlockNeeds:
    """What lies outside a model's blocks with the largest one, `whole` or with its experts `apart`: bytes in `dtype`; what is
    `free`; and whether the architecture takes all experts of a block `together`, so that they cannot come apart."""

    whole: int
    apart: int
    dtype: torch.dtype
    free: int
    is_gpu: bool
    together: bool = False

    def dtype_of(self, method: GuidanceMethod) -> torch.dtype:
        """What the method computes in."""
        return torch.float32 if method.in_float32 else self.dtype

    def in_dtype(self, method: GuidanceMethod, nbytes: int) -> int:
        """So many bytes in `dtype`, in what the method computes in."""
        return nbytes * self.dtype_of(method).itemsize // self.dtype.itemsize

    def of(self, method: GuidanceMethod) -> int:
        """The bytes that the method needs at least."""
        return self.in_dtype(method, self.apart)

    @property
    def why(self) -> str:
        """What makes it so much, as a clause; "" where nothing is to be said."""
        if self.together:
            return "; its architecture computes all experts of a block at once, so that they cannot be fetched one at a time"
        if self.apart == self.whole:
            return ""
        return ", even with the experts of a block one at a time"

    def would_do(self, method: GuidanceMethod, experts: int) -> bool:
        """Whether another method can measure so many experts in what is free."""
        return experts >= method.fewest_experts and self.of(method) <= self.free

    def remedies(self, method: GuidanceMethod, experts: int) -> str:
        """What would do for so many experts, as far as the numbers say."""
        found = []
        if not method.in_float32 and self.of(method) * torch.bfloat16.itemsize // self.dtype.itemsize <= self.free:
            found.append("--dtype bfloat16")
        if others := [one.name for one in guidance_methods().values() if one != method and self.would_do(one, experts)]:
            *first, last = others
            named = f"{', '.join(first)} or {last}" if first else last
            how = " (one expert of a block at a time)" if self.apart < self.whole else ""
            found.append(f"--guidance {named}{how}")
        if self.is_gpu:
            found.append("--device cpu")
        return ", or ".join([*found, "a machine with more memory"])

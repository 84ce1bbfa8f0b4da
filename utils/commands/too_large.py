"""A model of which not even one block fits into memory, refused before anything is computed."""

from dataclasses import dataclass

import torch

from utils.errors import UserError
from utils.guidance.measure_job import MeasureJob
from utils.guidance.method import GuidanceMethod
from utils.passes.experts_in_parts import parts_bytes
from utils.runtime import available_bytes, device_name, gigabytes


def refuse_too_large(job: MeasureJob, method: GuidanceMethod) -> None:
    """Compare what every pass holds at least, whatever the text, with what is free on the device.

    Raises:
        UserError: what lies outside a model's blocks and its largest block (of a mixture only that of it which cannot come one
            expert at a time, where the method allows that) do not fit together.
    """
    device = job.devices[0]
    free = available_bytes(device)
    for subject in job.subjects:
        whole, apart, _ = parts_bytes(subject.decoder, subject.layout)
        needs = BlockNeeds(whole, apart, subject.dtype, free, is_gpu=device.type != "cpu")
        if needs.of(method) <= free:
            continue
        raise UserError(
            f"model {subject.entry.name}: its largest block and what lies outside its blocks are {gigabytes(needs.of(method))} "
            f"in {str(needs.dtype_of(method)).removeprefix('torch.')}, and {device_name(device)} has {gigabytes(free)} free"
            f"{needs.why(method)}; use {needs.remedies(method)}",
            "memory-block-too-large",
        )


@dataclass(frozen=True)
class BlockNeeds:
    """What lies outside a model's blocks with the largest one, `whole` or with its experts `apart`: bytes in `dtype`; and
    what is `free`."""

    whole: int
    apart: int
    dtype: torch.dtype
    free: int
    is_gpu: bool

    def dtype_of(self, method: GuidanceMethod) -> torch.dtype:
        """What the method computes in."""
        return torch.float32 if method.in_float32 else self.dtype

    def of(self, method: GuidanceMethod) -> int:
        """The bytes that the method needs at least."""
        needed = self.apart if method.experts_in_parts else self.whole
        return needed * self.dtype_of(method).itemsize // self.dtype.itemsize

    def why(self, method: GuidanceMethod) -> str:
        """What makes it so much, as a clause; "" where nothing is to be said."""
        if self.apart == self.whole:
            return ""
        if method.experts_in_parts:
            return ", even with the experts of a block one at a time"
        return f"; --guidance {method.name} needs a block whole"

    def remedies(self, method: GuidanceMethod) -> str:
        """What would do, as far as the numbers say."""
        found = []
        if not method.in_float32 and self.of(method) * torch.bfloat16.itemsize // self.dtype.itemsize <= self.free:
            found.append("--dtype bfloat16")
        if not method.experts_in_parts and self.apart <= self.free:
            how = " (which takes the experts of a block one at a time)" if self.apart < self.whole else ""
            found.append(f"--guidance lewis{how}")
        if self.is_gpu:
            found.append("--device cpu")
        return ", or ".join([*found, "a machine with more memory"])

"""A model of which not even one block fits into memory, refused before anything is computed."""

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
        needed = apart if method.experts_in_parts else whole
        if needed <= free:
            continue
        where = "" if device.type == "cpu" else ", --device cpu"
        why = f"--guidance {method.name} needs a block whole"
        if apart <= free:
            remedy = (
                f"--guidance lewis (which takes the experts of a block one at a time){where}, or a machine with more"
            )
        else:
            remedy = f"--dtype bfloat16{where}, or a machine with more"
        raise UserError(
            f"model {subject.entry.name}: its largest block and what lies outside its blocks are {gigabytes(needed)} in "
            f"{str(subject.dtype).removeprefix('torch.')}, and {device_name(device)} has {gigabytes(free)} free; {why}; use "
            f"{remedy}",
            "memory-block-too-large",
        )

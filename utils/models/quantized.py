"""Quantized weights, told by the dtypes in the files' headers: refused before anything is read, with what to do instead.

A config.json that says so is refused earlier (`utils/models/checkpoints.py`). Where it lacks the note, loading such files
takes the stored numbers for the weights and leaves their scales out, without an error.
"""

from collections.abc import Iterable

from utils.errors import UserError
from utils.models.headers import TensorHeader

_FLOATS = ("F8_", "F6_", "F4")  # dtypes of 8 bits and less
_PACKED = {"I8", "U8", "I16", "U16", "I32", "U32"}
_MUCH = 0.2  # share of the bytes from which on integers are weights; masks that old versions saved are less
_SAVE = "then model.save_pretrained(FOLDER)"


def refuse_quantized(headers: Iterable[TensorHeader], name: str) -> None:
    """Refuse tensors that hold quantized weights.

    Args:
        headers: all tensors of the model.
        name: what to call the model.

    Raises:
        UserError: some are floating-point numbers of 8 bits or less, or integers that are a good part of the model.
    """
    headers = list(headers)
    small = next((one for one in headers if one.dtype.startswith(_FLOATS)), None)
    if small is not None:
        stem = small.name.removesuffix("weight")
        scale = next(
            (one.name for one in headers if one is not small and one.name.startswith(f"{stem}weight_scale")), ""
        )
        raise UserError(
            f"model {name} is quantized: tensor {small.name} is stored as {small.dtype}; {_conversion(scale)}",
            "model-quantized",
        )
    packed = [one for one in headers if one.dtype in _PACKED and len(one.shape) > 1 and one.shape[0] > 1]
    total = sum(one.nbytes for one in headers)
    if packed and sum(one.nbytes for one in packed) > _MUCH * total:
        raise UserError(
            f"model {name} is quantized: {packed[0].name} and {len(packed) - 1} more are stored as {packed[0].dtype}; give "
            "the checkpoint that it was made from, or the publisher's in bfloat16",
            "model-quantized",
        )


def _conversion(scale: str) -> str:
    if not scale:
        return (
            "give the checkpoint it was made from, or turn the numbers into bfloat16: model = "
            f"AutoModelForCausalLM.from_pretrained(THIS, dtype='bfloat16'), {_SAVE}"
        )
    return (
        f"it has scales ({scale}): give the checkpoint it was made from, or, with the publisher's quantization_config in "
        "config.json, model = AutoModelForCausalLM.from_pretrained(THIS, dtype='bfloat16', "
        f"quantization_config=FineGrainedFP8Config(dequantize=True)), {_SAVE}"
    )

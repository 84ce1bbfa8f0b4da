"""The flag of methods that take what they measured on few tokens of an expert towards the mean of its layer."""

from collections.abc import Mapping
from typing import Any

from utils.flags import whole_number
from utils.guidance.method import MethodFlag

EXPERT_TOKENS = "expert_tokens"
USUAL = 32
EXPERT_TOKENS_FLAG = MethodFlag(
    EXPERT_TOKENS,
    "an expert of a mixture with fewer tokens of the text than this is taken towards the mean of its layer; 0: never",
    type=whole_number(0, 2**20),
    default=USUAL,
)


def fewest_tokens(options: Mapping[str, Any]) -> int:
    """The number of tokens below which an expert is taken there, of the options of a measurement."""
    return options.get(EXPERT_TOKENS, USUAL)

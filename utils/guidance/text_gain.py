"""What an expert gains over the base on its own text, and whether that is sure: the first thing to ask of guidance by text.

With text of another task every guided merge is worse than none, and then an expert gains nothing on "its" text, so it can
be seen before anything is merged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from utils.errors import UserError
from utils.guidance.method import MethodFlag

CONFIDENCE = 0.95
ACCEPT = "accept_useless_text"
GOES_BY_IT, EQUAL_WEIGHTS = "the merge goes by what was measured all the same", "all experts have equal weights then"
ACCEPT_FLAG = MethodFlag(
    ACCEPT,
    "measure experts that gain nothing over the base on their own text, too; gram_mean then gives all of them equal weights, "
    "other methods go by what was measured",
    switch=True,
    default=False,
)


@dataclass(frozen=True)
class TextGain:
    """Losses of base and expert on the expert's text, nats per predicted token, and the interval of their difference.

    `low` and `high` are infinite where one sample says nothing of how samples differ.
    """

    base: float
    expert: float
    low: float
    high: float
    samples: int

    @property
    def gain(self) -> float:
        """How much lower the expert's loss is."""
        return self.base - self.expert

    @property
    def is_sure(self) -> bool:
        """Whether the expert is better than the base, and the interval (if there is one) says so."""
        return self.gain > 0 and (self.low > 0 or self.samples == 1)


def text_gain(tokens: Sequence[int], base: Sequence[float], expert: Sequence[float]) -> TextGain:
    """The gain over all tokens and its interval over samples (Student's, of a ratio of sums).

    Args:
        tokens: predicted tokens of each sample.
        base, expert: each sample's mean loss.
    """
    total = sum(tokens)
    means = [math.fsum(n * loss for n, loss in zip(tokens, losses, strict=True)) / total for losses in (base, expert)]
    gain, count = means[0] - means[1], len(tokens)
    if count == 1:
        return TextGain(*means, -math.inf, math.inf, 1)
    from scipy.stats import t

    apart = [n * (before - after - gain) for n, before, after in zip(tokens, base, expert, strict=True)]
    spread = math.sqrt(count / (count - 1) * math.fsum(miss**2 for miss in apart)) / total
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread
    return TextGain(*means, gain - half, gain + half, count)


def refuse_useless_text(found: Mapping[str, TextGain], flag: str, then: str = GOES_BY_IT) -> None:
    """Raise one `UserError` over all experts, by name, that are not surely better than the base on their text; `flag` would
    accept that, and `then` says what comes of it, as a clause."""
    useless = [f"{name}: {_doubt(gain)}" for name, gain in found.items() if not gain.is_sure]
    if useless:
        raise UserError(
            f"{'; '.join(useless)}. Guidance by text of another task ruins a merge: give each expert the text it was trained "
            "for under calibration in the pair config, or more samples (nsamples); "
            f"--{flag} accepts it, and {then}",
            "text-without-gain",
        )


def _doubt(found: TextGain) -> str:
    said = (
        "it is no better there than the base"
        if found.gain <= 0
        else f"which the {found.samples} samples do not prove (95 % interval of the gain {found.low:.4f} to {found.high:.4f})"
    )
    return f"its loss on its own text is {found.expert:.4f}, the base's {found.base:.4f} (nats per token): {said}"

"""What may be kept of a fine-tune goes where its entries matter most to the loss.

    F_ij     = sum over samples of (dL/dW_ij)^2         on the expert's own text, at base, expert, or both added up
    saliency = delta_ij^2 F_ij^p                        delta = expert - base
    density(tensor) = share of its entries above a threshold, one for all measured tensors of an expert, so that the
                      mean density is the budget

With p = 1, saliency is, up to a factor, the second-order estimate of what the loss loses with an entry of the change
(optimal brain damage, with squared gradients for the curvature); p = 0.5 keeps more of the skill (the default, measured
by benchmarks/quality.py). `measure.py` stores histograms of it per tensor, so that any budget can be solved later,
and F of every parameter as one vector per axis; `decide.py` solves the budget. Inside a tensor the plain recipe
keeps the entries of largest magnitude, as every `ties` does; with `--mask saliency` the recipe names the vectors and
this project's merge method `guided_ties`, which keeps those of largest saliency.

The vectors also serve `--merge_method guided_mean`, which needs no budget: each entry of the merged change is the mean
of the experts', weighed by F^0.5 of each (Fisher-weighted averaging, arXiv 2111.09832).
"""

from collections.abc import Mapping
from typing import Any

from utils.errors import UserError
from utils.flags import number
from utils.guidance.few_tokens import EXPERT_TOKENS_FLAG
from utils.guidance.method import GuidanceMethod, MethodFlag
from utils.guidance.text_gain import ACCEPT_FLAG
from utils.recipes.method_rules import GUIDED_MEAN, GUIDED_TIES, DeltaMethod

TENSORS = "saliency_budget_tensors.csv"
HISTOGRAM = "saliency_budget_histogram.csv"
POINTS = {"base": (True, False), "expert": (False, True), "both": (True, True)}  # gradients at base and expert
MASKS = ("magnitude", "saliency")


def vector_file(model_type: str) -> str:
    """The name of an expert's file of vectors."""
    return f"{model_type}_saliency.safetensors"


def merge_rule(asked: DeltaMethod, options: Mapping[str, Any]) -> DeltaMethod:
    """`guided_ties` in place of `ties` where entries are chosen by saliency, else the merge method asked for.

    Raises:
        UserError: `--mask saliency` with a merge method for which it does nothing.
    """
    if options["mask"] != "saliency":
        return asked
    if asked.name == GUIDED_MEAN.name:
        raise UserError(
            f"--mask saliency does nothing for --merge_method {asked.name}, which keeps the entries of largest "
            "saliency wherever --mean_density is given; leave it out",
            "flag-no-effect",
        )
    if asked.name != "ties":
        raise UserError(
            f"--mask saliency cannot be used with --merge_method {asked.name}: only {GUIDED_TIES.name}, this "
            "project's ties, selects entries by saliency; give --merge_method ties, or leave out --mask",
            "flag-no-effect",
        )
    return GUIDED_TIES


METHOD = GuidanceMethod(
    name="saliency_budget",
    package=__package__,
    summary="densities that spend a budget on the entries whose change matters most to the loss, delta^2 F",
    gives="densities",
    tasks="one for each expert: saliencies are no sums over samples, they need all squared gradients of a tensor",
    merge_method="ties",
    own_merge_methods=(GUIDED_MEAN.name,),
    merge_rule=merge_rule,
    several=GUIDED_MEAN.name,
    tables=(TENSORS, HISTOGRAM),
    expert_file=vector_file,
    measure_flags=(
        ACCEPT_FLAG,
        EXPERT_TOKENS_FLAG,
        MethodFlag(
            "gradient_at",
            "the weights at which gradients are taken: the base's, each expert's, or both, added up",
            choices=tuple(POINTS),
            default="both",
        ),
        MethodFlag(
            "saliency_power",
            "exponent p of the squared gradients in the saliency delta^2 F^p, above 0, at most 1",
            type=number(0, 1, low_open=True),
            default=0.5,
        ),
    ),
    decide_flags=(
        MethodFlag(
            "mask",
            "which entries of a tensor are kept: those of largest magnitude (a recipe for any mergekit), or of largest "
            "saliency (needs --merge_method ties and this project's utils/merger.py; guided_mean does so anyway)",
            choices=MASKS,
            default="magnitude",
        ),
    ),
    text_per_task=True,
    models_at_once=lambda experts: 2,
    config_keys=("components",),
)

"""How much of what each expert adds to a merge, tensor by tensor, found by gradient on calibration text.

    merged(a) = base + sum over experts t of a(t, tensor) part_t(tensor)
    dL/da(t, tensor) = < dL/dW(tensor), part_t(tensor) >
    minimize over a    mean over tasks of L_t(a) / (L_t(base) - L_t(expert))  +  pull / 2 times the mean of (a - 1)^2

A recipe to start from says what the parts are: plain changes (`task_arithmetic`), or what this project's `guided_mean` and
`gram_mean` make of them, which are sums of such parts too. One way forward and back through the merged model, a block
in memory at a time, gives the gradient of every coefficient. Adam takes some steps from the recipe's own answer, a = 1;
the steps are judged on samples of their own, and the best of them is kept.

The result is the recipe with the coefficients in it: plain changes stay a recipe for any mergekit.
"""

from pathlib import Path

from utils.errors import UserError
from utils.flags import number, whole_number
from utils.guidance.method import GuidanceMethod, MethodFlag
from utils.guidance.start import START_FLAG
from utils.guidance.text_gain import ACCEPT_FLAG
from utils.recipes.method_rules import GRAM_MEAN, GUIDED_MEAN, TASK_ARITHMETIC
from utils.safe_yaml import read_yaml_mapping

COEFFICIENTS = "tuned_coefficients.csv"
STEPS = "tuned_steps.csv"
STARTED_FROM = "tuned_start.yaml"
LEVEL = "tune_level"  # a flag
LEVELS = ("tensor", "part", "block", "expert")
AIMS = ("mean", "worst")
METHODS = (TASK_ARITHMETIC.name, GUIDED_MEAN.name, GRAM_MEAN.name)  # whose merges are sums of what single experts add


def start_method(folder: Path) -> str:
    """The merge method of the recipe that was started from. Raises a `UserError` if the folder does not say it."""
    found = read_yaml_mapping(folder / STARTED_FROM, "tuned recipe's start").get("merge_method")
    if found not in METHODS:
        raise UserError(
            f"{folder / STARTED_FROM} is not as tuning writes it (merge_method {found!r}); measure again",
            "tuned-start-damaged",
        )
    return found


METHOD = GuidanceMethod(
    name="tuned",
    package=__package__,
    summary="coefficients by gradient on calibration text, from a recipe's own answer",
    gives="weights",
    tasks="one for all: each step needs every expert",
    merge_method=TASK_ARITHMETIC.name,
    own_merge_methods=(GUIDED_MEAN.name, GRAM_MEAN.name),
    tables=(COEFFICIENTS, STEPS, STARTED_FROM),
    measure_flags=(
        MethodFlag(
            "start_recipe",
            "a recipe of this pair to start from (task_arithmetic, guided_mean or gram_mean, one weight for each expert); "
            "without it the plain mean of the changes",
        ),
        START_FLAG,
        MethodFlag("tune_steps", "steps of Adam at most", type=whole_number(1), default=10),
        MethodFlag("tune_rate", "step size of a coefficient", type=number(0, low_open=True), default=0.05),
        MethodFlag("tune_pull", "pull of the coefficients to the recipe's own answer", type=number(0), default=0.0),
        MethodFlag(LEVEL, "what has one coefficient for each expert", choices=LEVELS, default="tensor"),
        MethodFlag("tune_for", "the mean over tasks, or mostly the worst one", choices=AIMS, default="mean"),
        ACCEPT_FLAG,
    ),
    fewest_experts=1,
    text_per_task=True,
    config_keys=("components",),
    file_flags=("start_recipe",),
    refines=(GRAM_MEAN.name,),
    searched=False,
    measured_for=start_method,
)

"""Each part of a model merged where the experts' own outputs agree best, on each expert's own text.

| part | what is measured of each expert on its own text, at base and expert | how it is merged |
|---|---|---|
| linear layers | C_t, mean over tokens of x x' of their inputs x | sum_t w_t D_t C_t (sum_t w_t C_t)^-1 (RegMean, arXiv 2212.09849) |
| embeddings, head | rows' squared gradients b_t, R_t = sum of g g' over rows g of gradients | row by row, in the metric b_tv R_t |
| norms, biases | squared gradients, one vector per axis | guided mean (`utils/merging/guided/mean.py`) |

D_t is what expert t changes, w_t ~ 1 / (loss of the base - loss of the expert): a task counts by what it has to lose, in
units of what its expert gained. An expert without a sure gain on its text is refused.

What command 1 measures has to travel to command 3. C_t goes to disk, not the solution: a triangle in float32 takes 2 n^2
bytes, so that those of an 8 B model (n = 4096, 14336; q, k, v share one, gate and up another) are 16 GB an expert, as
much as its weights in bfloat16, and weights, ridge and experts may be chosen anew without measuring. Solving while
measuring would take all experts in lock-step through one process and leave one merged model that no recipe can vary. The
recipe names the file where it lies; command 3 has one layer's matrices in memory at a time. In fewer bits C_t would need
a ridge above its rounding (float16: 1e-3 of the diagonal), in which the directions that tell the experts apart drown.

With fewer tokens than a layer has channels C_t is singular: directions that no text has inputs in are the guided mean's,
by the ridge. The experts of a mixture each have the C_t of the tokens routed to them, summed up and divided by all tokens of the
text, so that a text counts for an expert as much as it uses it. Below 15 samples the rows of embeddings are the guided mean's,
too: then it is as good.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from utils.flags import whole_number
from utils.guidance.few_tokens import EXPERT_TOKENS_FLAG
from utils.guidance.method import GuidanceMethod, MethodFlag
from utils.guidance.text_gain import ACCEPT_FLAG
from utils.recipes.method_rules import GRAM_MEAN, DeltaMethod

TENSORS = "gram_mean_tensors.csv"
LOSSES = "gram_mean_losses.csv"
BETWEEN_ROUNDS = "between_rounds"  # of the manifest
ROUNDS = "rounds"  # flags
EXPERT_INPUTS = "expert_inputs"
FORM = "form"
FORMS = SPARSE, LOW_RANK = "sparse", "low_rank"


def gram_file(model_type: str) -> str:
    """The name of an expert's file of vectors and Gram matrices."""
    return f"{model_type}_grams.safetensors"


def _rule(asked: DeltaMethod, options: Mapping[str, Any]) -> DeltaMethod:
    return replace(asked, keeps="two factors of low rank") if options[FORM] == LOW_RANK else asked


METHOD = GuidanceMethod(
    name=GRAM_MEAN.name,
    package=__package__,
    summary="each part merged where the experts' outputs agree best, by Gram matrices of their inputs and gradients",
    gives="weights",
    tasks="one for each expert: matrices of a part of the samples would be as large as those of all",
    merge_method=GRAM_MEAN.name,
    own_merge_methods=(GRAM_MEAN.name,),
    tables=(TENSORS, LOSSES),
    expert_file=gram_file,
    measure_flags=(
        ACCEPT_FLAG,
        EXPERT_TOKENS_FLAG,
        MethodFlag(
            ROUNDS,
            "how often inputs are taken: those of base and experts, then, again and again, those of what was merged by the "
            "round before, which lies in --out_dir meanwhile",
            type=whole_number(1),
            default=1,
        ),
        MethodFlag(
            EXPERT_INPUTS,
            "take the inputs of each expert of a mixture, too, of the tokens routed to it: matrices of as many numbers as half "
            "its own; without, experts are merged by the guided mean",
            switch=True,
            default=True,
        ),
    ),
    decide_flags=(
        MethodFlag(
            FORM,
            "what --mean_density leaves of a linear layer's change: single entries, fitted anew (sparse), or two factors of "
            "as many numbers (low_rank), which utils/merger.py --adapter writes as an adapter for peft",
            choices=FORMS,
            default=FORMS[0],
        ),
    ),
    fewest_experts=1,
    merge_rule=_rule,
    density_alone=0.1,  # the sparse refit leads there (benchmarks/quality.py)
    text_per_task=True,
    models_at_once=lambda experts: 2,
    config_keys=("components",),
)

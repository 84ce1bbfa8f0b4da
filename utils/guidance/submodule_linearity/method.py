"""Submodule linearity (arXiv 2504.10902): merging weights in closed form for each part of the network.

A part (a block; attention, MLP and norms; or each tensor) is nearly linear in its parameters where a whole model is not,
so that what a merge changes about its output is nearly the weighted sum of what the experts change:

    Delta_s(x) = f(x; theta_s) - f(x; theta_0)                inputs x: the base's own, on the text of task t
    G^t[m,s]   = mean over tokens x of < Delta_m(x), Delta_s(x) >
    A a = b,   A = sum_t w_t G^t,   b_m = sum_t w_t G^t[m,t]   the weights a of least sum_t w_t E|sum_s a_s Delta_s - Delta_t|^2
    merged     = theta_0 + sum_s a_s delta_s                  part by part

`measure.py` records G for the parts of every level, how non-linear the larger ones and the whole model are, and how each
level's weights do on samples they have not seen; `decide.py` solves.
"""

from utils.flags import number
from utils.guidance.method import GuidanceMethod, MethodFlag
from utils.guidance.text_gain import ACCEPT_FLAG

NAME = "submodule_linearity"
GRAM, TENSORS, SCORES, FOLD_GRAMS, MISSED = (
    f"{NAME}_{end}.csv" for end in ("gram", "tensors", "nonlinearity", "folds", "levels")
)
BLOCK, ATTENTION_MLP, TENSOR = LEVELS = ("block", "attention_mlp", "tensor")
AUTO = "auto"  # each block at the level whose weights do best on text they have not seen
WHOLE = "model"  # the level and the part of a whole model's score
WEIGHTINGS = ("equal", "raw")
RIDGE = 0.1  # kept a little more of two small experts than none did (validation text, two seeds); from 0.3 on, less

METHOD = GuidanceMethod(
    name=NAME,
    package=__package__,
    summary="weights per part in closed form, from what each expert changes about its output (arXiv 2504.10902)",
    gives="weights",
    tasks="one in all: every expert's change of a part is compared with every other's, token by token",
    merge_method="task_arithmetic",
    tables=(GRAM, TENSORS, SCORES, FOLD_GRAMS, MISSED),
    in_float32=True,
    models_at_once=lambda experts: 1 + experts,
    measure_flags=(
        ACCEPT_FLAG,
        MethodFlag(
            "nonlinearity",
            "also measure how non-linear each part and the whole model are, and which level fits each block best",
            switch=True,
            default=True,
        ),
    ),
    decide_flags=(
        MethodFlag(
            "level",
            "what gets a weight of its own inside the blocks; auto: in each block the level whose weights miss least on "
            "samples they were not solved from",
            choices=(*LEVELS, AUTO),
            default=ATTENTION_MLP,
        ),
        MethodFlag(
            "task_weighting",
            "equal: each expert's task counts alike; raw: by how much its expert changes",
            choices=WEIGHTINGS,
            default="equal",
        ),
        MethodFlag(
            "ridge", "pull towards equal shares, relative to the mean square of the changes", number(0), default=RIDGE
        ),
        MethodFlag("clip", "clip weights to [0, this], at least 0 (not clipped if left out)", number(0)),
    ),
    text_per_task=True,
    authors_samples=30,
)

"""LEWIS (arXiv 2503.03874): how much a fine-tune changed each layer's activation-weighted norm decides its density.

    I(l,c)  = || |W| o sqrt(s) ||_F                         norm of the Wanda metric, s_j the second moment of input j
    D(l,c)  = | I_expert(l,c) - I_base(l,c) |
    d(l,c)  = D(l,c) / sum over layers of D(.,c)            the delta table: layer x component
    density = gamma + (epsilon - gamma) * (d - min d) / (max d - min d)      over the whole table of one expert

`measure.py` turns models into norms and norms into delta tables, `decide.py` turns delta tables into densities.
"""

from utils.flags import number
from utils.guidance.few_tokens import EXPERT_TOKENS_FLAG
from utils.guidance.method import GuidanceMethod, MethodFlag
from utils.guidance.text_gain import ACCEPT_FLAG

NORMS = "norms.csv"
NOISE = "lewis_noise.csv"
DELTA_SUFFIX = "_delta.csv"
BOUNDS = ("minmax", "clip")


def delta_file(model_type: str) -> str:
    """The file name of an expert's delta table."""
    return f"{model_type}{DELTA_SUFFIX}"


METHOD = GuidanceMethod(
    name="lewis",
    package=__package__,
    summary="densities from the change of each layer's activation-weighted norm (arXiv 2503.03874)",
    gives="densities",
    merge_method="ties",
    tables=(NORMS, NOISE),
    expert_file=delta_file,
    measure_flags=(EXPERT_TOKENS_FLAG, ACCEPT_FLAG),
    decide_flags=(
        MethodFlag("gamma", "density of what changed least, 0 to 1", type=number(0, 1), default=0.3),
        MethodFlag(
            "epsilon", "density of what changed most, gamma to 1", type=number(0, 1, low_open=True), default=0.8
        ),
        MethodFlag("apply_lewis_to_weights", "use the densities as merging weights too", switch=True, default=False),
        MethodFlag(
            "bound",
            "how deltas become densities; minmax: scaled from gamma to epsilon; clip: relative to the largest, clipped",
            choices=BOUNDS,
            default="minmax",
        ),
    ),
    config_keys=("sparsity_ratio", "parity", "components"),
    authors_samples=15,
)

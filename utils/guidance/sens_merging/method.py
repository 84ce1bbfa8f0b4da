"""Sens-Merging (arXiv 2502.12420): weights per layer, from what each expert's own task is sensitive to.

    S_t(l) = mean over samples of sum over parameters p of block l of | p * dL/dp |      expert t on its own text
    g(t,u) = mean over tokens x of u's text of || logits_t(x) - logits_u(x) ||_2
    weight = T * softmax over experts of ( tau_t alpha_t(l) / temperature )

`measure.py` takes S from gradients sample by sample and block by block, and g from every expert's final hidden
states on every expert's text. `decide.py` weighs the experts against each other in every block. The formula says nothing
of parameters outside the blocks: they get the uniform weight 1, or are layers of their own (as in the public
implementation).
"""

from utils.flags import number
from utils.guidance.method import GuidanceMethod, MethodFlag
from utils.guidance.text_gain import ACCEPT_FLAG

SENSITIVITY = "sens_merging_sensitivity.csv"
DISTANCES = "sens_merging_distances.csv"
TENSORS = "sens_merging_tensors.csv"
LOSSES = "sens_merging_losses.csv"
OUTSIDE = "sens_merging_outside.csv"
ALIGNMENTS = ("distance", "similarity")
BOTH, SENSITIVITY_ALONE, SCALING_ALONE = FACTORS = ("both", "sensitivity", "scaling")
# kept most on validation text (benchmarks/results/sens_ablation.md); at 1, as published, weights are next to uniform
TEMPERATURE = 0.1
UNIFORM, LAYERS = OUTSIDES = ("uniform", "layers")

METHOD = GuidanceMethod(
    name="sens_merging",
    package=__package__,
    summary="weights per layer from gradient sensitivity and logit distances (arXiv 2502.12420)",
    gives="weights",
    tasks="one for each expert, then one for the distances between them",
    merge_method="task_arithmetic",
    tables=(SENSITIVITY, DISTANCES, TENSORS, LOSSES, OUTSIDE),
    measure_flags=(ACCEPT_FLAG,),
    decide_flags=(
        MethodFlag(
            "temperature",
            "of the softmax over experts; the larger, the closer the weights are to uniform",
            type=number(0, low_open=True),
            default=TEMPERATURE,
        ),
        MethodFlag(
            "alignment",
            "which expert is favored: distance, the one whose logits differ most (as published); similarity, the one "
            "whose logits agree most with the others'",
            choices=ALIGNMENTS,
            default="distance",
        ),
        MethodFlag(
            "factors",
            "what weighs: both; sensitivity: how sensitive a layer is, all experts alike (tau 1/T); scaling: how experts "
            "differ, all layers alike",
            choices=FACTORS,
            default=BOTH,
        ),
        MethodFlag(
            "outside",
            "embeddings, final norm and head: uniform, weight 1; layers, weighed as layers of their own",
            choices=OUTSIDES,
            default=UNIFORM,
        ),
    ),
    fewest_experts=2,
    text_per_task=True,
    config_keys=("components",),
    authors_samples=100,
)

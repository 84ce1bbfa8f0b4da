"""Sens-Merging's weights (arXiv 2502.12420) from sensitivities and logit distances. Float64 arrays in and out.

alpha_t(l) = S_t(l) / || S_t(.) ||_2                                over the layers of one expert
tau_t      = sum_u g(t,u) / sum_t sum_u g(t,u)                      over the other experts u
             (for an ablation: alpha 1 / sqrt(layers) everywhere, or tau 1 / T for all)
sigma_t(l) = softmax over t of ( tau_t alpha_t(l) / temperature )
weight     = T sigma_t(l)                                           the mean over the T experts is 1
"""

import numpy as np

from utils.guidance.sens_merging.method import ALIGNMENTS, FACTORS, SCALING_ALONE, SENSITIVITY_ALONE


def normalized_sensitivities(sensitivities: np.ndarray) -> np.ndarray:
    """alpha: each expert's sensitivities [experts, layers] divided by their Euclidean norm; zeros stay zeros."""
    largest = sensitivities.max(axis=1, keepdims=True)
    scaled = sensitivities / np.where(largest > 0, largest, 1.0)  # first, so that squares neither over- nor underflow
    norms = np.linalg.norm(scaled, axis=1, keepdims=True)
    return scaled / np.where(norms > 0, norms, 1.0)


def alignment_factors(distances: np.ndarray, alignment: str = "distance") -> np.ndarray:
    """tau: one factor per expert, not negative, summing to 1.

    `distance` is the published formula, which favors the expert that differs most from the others:
    d_t = sum over u of g(t,u), tau_t = d_t / sum d. `similarity` mirrors it, so that the expert that agrees most with the
    others gets the largest factor: tau_t = (1 - d_t / sum d) / (T - 1); two experts just swap their factors. Where all
    distances are 0, all factors are 1 / T.

    Args:
        distances: g(t,u), [experts, experts], what is on the diagonal is ignored; at least two experts.
        alignment: one of `ALIGNMENTS`.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment {alignment!r} is not one of {ALIGNMENTS}")
    count = len(distances)
    largest = np.where(np.eye(count, dtype=bool), 0.0, distances).max()
    if largest == 0:
        return np.full(count, 1 / count)
    sums = np.where(np.eye(count, dtype=bool), 0.0, distances / largest).sum(axis=1)
    shares = sums / sums.sum()
    return shares if alignment == "distance" else (1 - shares) / (count - 1)


def weighing(
    sensitivities: np.ndarray, distances: np.ndarray, alignment: str, factors: str
) -> tuple[np.ndarray, np.ndarray]:
    """alpha [experts, layers] and tau [experts], either of them replaced by one value for all.

    Args:
        sensitivities: S_t(l), [experts, layers].
        distances: g(t,u), [experts, experts].
        alignment: one of `ALIGNMENTS`.
        factors: one of `FACTORS`: what is to weigh.
    """
    if factors not in FACTORS:
        raise ValueError(f"factors {factors!r} is not one of {FACTORS}")
    experts, layers = sensitivities.shape
    alphas, tau = normalized_sensitivities(sensitivities), alignment_factors(distances, alignment)
    if factors == SCALING_ALONE:
        alphas = np.full((experts, layers), 1 / np.sqrt(layers))
    if factors == SENSITIVITY_ALONE:
        tau = np.full(experts, 1 / experts)
    return alphas, tau


def layer_weights(alphas: np.ndarray, factors: np.ndarray, temperature: float) -> np.ndarray:
    """T sigma: the weight of each expert in each layer; over the experts, weights of a layer have a mean of 1.

    Args:
        alphas: [experts, layers].
        factors: tau, [experts].
        temperature: above 0; the larger, the closer all weights are to 1.

    Returns:
        [experts, layers]; exactly 1 everywhere where the experts do not differ.
    """
    scores = factors[:, None] * alphas
    with np.errstate(over="ignore"):  # a difference over a tiny temperature may be -inf, whose exponential is 0
        powers = np.exp((scores - scores.max(axis=0)) / temperature)
    return powers * len(alphas) / powers.sum(axis=0)

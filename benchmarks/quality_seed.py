"""One seed of the quality benchmark: train or find its models, merge them in every way, judge them."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.quality_contenders import BUDGETS, EVERYTHING, Choice, Variant, one_expert, two_experts
from benchmarks.quality_joint import CEILING, joint_training
from benchmarks.quality_losses import share_kept
from benchmarks.quality_merges import TEST, VALIDATION, Judge
from benchmarks.quality_models import Trained, Training, train_or_find
from benchmarks.quality_pairs import Pair, lay_out
from benchmarks.quality_peer_models import peers_of_one, peers_of_two
from benchmarks.quality_report import ONE, THREE, TWO, Figure
from benchmarks.quality_texts import Texts, TextSizes, assert_disjoint, texts_of_seed
from benchmarks.quality_third import texts_with_third, three_experts, train_or_find_third


def prepare(
    training: Training, seed: int, data: Path | None, work: Path, device: str, until: float | None = None
) -> tuple[Pair, Texts]:
    """The pair of a seed, trained if it is not cached, and its texts, whose splits are proven disjoint.

    Raises:
        OutOfTimeError: it is not cached, and the time `until` which work is begun is over.
    """
    texts = texts_of_seed(data, TextSizes(), seed)
    assert_disjoint(texts)
    trained: Trained = train_or_find(training, texts, seed, work / "models", device, until)
    # Named by the models' folder, which is named by what made them: what was judged of others is not taken for theirs.
    return lay_out(trained, texts, work / "pairs" / trained.base.parent.name, until), texts


def judge_seed(
    size: str,
    training: Training,
    seed: int,
    data: Path | None,
    work: Path,
    device: str,
    rows: Mapping[str, int],
    choice: Choice = EVERYTHING,
    until: float | None = None,
) -> tuple[list[Figure], float]:
    """All figures of a seed, and the seconds that all work for them took, in this run or in earlier ones.

    Args:
        size: its name in the figures.
        training: what the models are made by.
        seed: of training, and of the choice of training and calibration text.
        data: folder of the published data sets, or None.
        work: folder for models, recipes and what was judged.
        device: where to train, measure, merge and judge.
        rows: how many rows of each split are read per task.
        choice: which contenders and budgets.
        until: no work is begun after this time (seconds since the epoch).

    Raises:
        OutOfTimeError: that time is over; what was done is remembered, and the next call goes on.
    """
    from utils.merging.guided.methods import register_methods

    register_methods()
    pair, texts = prepare(training, seed, data, work, device, until)
    judge = Judge(pair, texts, rows, device)
    run = _Run(size, seed, device, choice, _Progress(f"{size}, seed {seed}"))
    figures, seconds = [], 0.0
    if 2 in choice.experts:
        joint = joint_training(training, texts, seed, until)
        figures += _several(run, judge, TWO, two_experts() | peers_of_two() | {CEILING: [joint]})
    if 3 in choice.experts:
        texts = texts_with_third(texts, TextSizes(), seed)
        assert_disjoint(texts)
        trained = train_or_find_third(pair.trained, training, texts, seed, device, until)
        third = lay_out(trained, texts, pair.folder / "three", until)
        figures += _several(run, Judge(third, texts, rows, device), THREE, three_experts())
        seconds += third.clock.total
    if 1 in choice.experts:
        figures += _alone(run, judge)
    return figures, seconds + pair.clock.total + pair.trained.seconds


def _several(run: "_Run", judge: Judge, experiment: str, contenders: Mapping[str, Sequence[Variant]]) -> list[Figure]:
    """Figures of merges of several experts, each in the setting that is best on validation."""
    figures = []
    for contender, variants in run.choice.of(contenders).items():
        run.say(f"{experiment}, {contender}")
        best = chosen_variant(judge, judge.pair, variants, run.device)
        losses = judge.recipe_losses(best.recipe(judge.pair, run.device), TEST)
        figures += [
            _figure(judge, experiment, run.size, run.seed, contender, None, task, losses, best.setting)
            for task in judge.pair.trained.experts
        ]
    return figures


def _alone(run: "_Run", judge: Judge) -> list[Figure]:
    """Figures of what is kept of each expert at each budget."""
    figures = []
    for task, budget in product(judge.pair.trained.experts, run.choice.budgets or BUDGETS):
        for contender, variant in run.choice.of(one_expert(task, budget) | peers_of_one(task, budget)).items():
            run.say(f"{task} {budget} {contender}")
            losses = judge.recipe_losses(variant.recipe(judge.pair, run.device), TEST)
            figures.append(_figure(judge, ONE, run.size, run.seed, contender, budget, task, losses, variant.setting))
    return figures


class _Progress:
    """Says on stderr what is being done."""

    def __init__(self, label: str) -> None:
        self.label = label

    def __call__(self, what: str) -> None:
        print(f"{self.label}: {what}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Run:
    """A seed of a size, where it is judged, and what of it."""

    size: str
    seed: int
    device: str
    choice: Choice
    say: _Progress


def chosen_variant(judge: Judge, pair: Pair, variants: Sequence[Variant], device: str) -> Variant:
    """The variant with the largest mean share kept on validation; the test split is not looked at."""
    if len(variants) == 1:
        return variants[0]

    def kept(variant: Variant) -> float:
        losses = judge.recipe_losses(variant.recipe(pair, device), VALIDATION)
        return sum(shares_kept(judge, losses, VALIDATION).values()) / len(losses)

    return max(variants, key=kept)


def shares_kept(judge: Judge, losses: Mapping[str, float], split: str) -> dict[str, float]:
    """The share of each task's gain that a merge keeps, given its losses."""
    trained = judge.pair.trained
    base = judge.model_losses(trained.base, split)
    return {
        task: share_kept(base[task], losses[task], judge.model_losses(expert, split)[task])
        for task, expert in trained.experts.items()
    }


def _figure(
    judge: Judge,
    experiment: str,
    size: str,
    seed: int,
    contender: str,
    budget: float | None,
    task: str,
    losses: Mapping[str, float],
    setting: str,
) -> Figure:
    others = [loss for name, loss in losses.items() if name != task]
    return Figure(
        experiment=experiment,
        size=size,
        seed=seed,
        contender=contender,
        budget=budget,
        task=task,
        kept=shares_kept(judge, losses, TEST)[task],
        own_loss=losses[task],
        other_loss=sum(others) / len(others) if others else None,
        setting=setting,
    )

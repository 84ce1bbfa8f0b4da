"""One seed of the quality benchmark: train or find its models, merge them in every way, judge them."""

import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

from benchmarks.quality_clock import OutOfTimeError
from benchmarks.quality_contenders import BUDGETS, EVERYTHING, UNIFORM_TWO, Choice, Variant, one_expert, two_experts
from benchmarks.quality_joint import CEILING, joint_training
from benchmarks.quality_losses import share_kept
from benchmarks.quality_merges import TEST, VALIDATION, Judge
from benchmarks.quality_models import Trained, Training, train_or_find
from benchmarks.quality_pairs import Pair, lay_out
from benchmarks.quality_peer_models import peers_of_one, peers_of_two
from benchmarks.quality_report import ONE, THREE, TWO, Figure
from benchmarks.quality_texts import Texts, TextSizes, assert_disjoint, texts_of_seed
from benchmarks.quality_third import texts_with_third, three_experts, train_or_find_third

NAMES = {1: ONE, 2: TWO, 3: THREE}
# What decides is judged first: a run that is cut has it.
FIRST = (
    UNIFORM_TWO,
    "gram mean, second round",
    "Fisher average",
    "gram mean, second round, tuned",
    "gram mean",
    "K-FAC mean",
    CEILING,
    "saliency mean",
    "RegMean++ with guided rest",
    "RegMean with guided rest",
    "tuned coefficients",
)


@dataclass(frozen=True, eq=False)
class Piece:
    """One seed of a size, how many experts its merges have, and where all of that is done.

    Attributes:
        size: its name in the figures.
        training: what the models are made by.
        seed: of training, and of the choice of training and calibration text.
        experts: of a merge, 1 to 3 (with a third task).
        data: folder of the published data sets, or None.
        work: folder for models, recipes and what was judged.
        device: where to train, measure, merge and judge.
        rows: how many rows of each split are read per task.
        choice: which contenders and budgets.
        until: no work is begun after this time (seconds since the epoch).
    """

    size: str
    training: Training
    seed: int
    experts: int
    data: Path | None
    work: Path
    device: str
    rows: Mapping[str, int]
    choice: Choice = EVERYTHING
    until: float | None = None

    @property
    def label(self) -> str:
        """What it is called on the terminal."""
        return f"{self.size}, seed {self.seed}, {NAMES[self.experts]}"


@dataclass
class Judged:
    """What was judged of a piece, the seconds that all work for it took, now or earlier, and what is missing."""

    figures: list[Figure]
    seconds: float = 0.0
    stopped_before: str | None = None
    failed: list[str] = field(default_factory=list)


def train(piece: Piece) -> None:
    """Train the base and the two experts of a seed, if they are not cached.

    Raises:
        OutOfTimeError: the time is over; the same call goes on later.
    """
    _trained(piece)


def prepare(
    training: Training,
    seed: int,
    data: Path | None,
    work: Path,
    device: str,
    until: float | None = None,
) -> tuple[Pair, Texts]:
    """The pair of a seed, trained if it is not cached, and its texts, whose splits are proven disjoint.

    Raises:
        OutOfTimeError: it is not cached, and the time `until` which work is begun is over.
    """
    return _pair(Piece("", training, seed, 2, data, work, device, {}, until=until))


def judge_piece(piece: Piece) -> Judged:
    """All figures of a piece, in the order of `FIRST`. A contender that fails is named, and the others go on.

    What was done is remembered, and the next call goes on.
    """
    from utils.merging.guided.methods import register_methods

    register_methods()
    found = Judged([])
    try:
        pair, texts = _pair(piece)
    except OutOfTimeError as error:
        found.stopped_before = str(error)
        return found
    judge = Judge(pair, texts, piece.rows, piece.device)
    for name, figures in _contenders(piece, judge, texts):
        print(f"{piece.label}: {name}", file=sys.stderr, flush=True)
        try:
            found.figures += figures()
        except OutOfTimeError as error:
            found.stopped_before = str(error)
            break
        except Exception:  # one peer that fails must not cost the figures of all others; the run ends with a failure
            traceback.print_exc()
            found.failed.append(name)
    # The base and its experts are trained for all pieces of a seed at once: their seconds count with the first.
    found.seconds = pair.clock.total + pair.trained.seconds * (piece.experts == 1)
    return found


def _trained(piece: Piece) -> tuple[Trained, Texts]:
    texts = texts_of_seed(piece.data, TextSizes(), piece.seed)
    assert_disjoint(texts)
    return (
        train_or_find(piece.training, texts, piece.seed, piece.work / "models", piece.device, piece.until),
        texts,
    )


def models_and_texts(piece: Piece) -> tuple[Trained, Texts]:
    """The models of a piece, trained if they are not cached, and its texts, both with a third task where it merges three.

    Raises:
        OutOfTimeError: the time is over; the same call goes on later.
    """
    trained, texts = _trained(piece)
    if piece.experts == 3:
        texts = texts_with_third(texts, TextSizes(), piece.seed)
        assert_disjoint(texts)
        trained = train_or_find_third(trained, piece.training, texts, piece.seed, piece.device, piece.until)
    return trained, texts


def pair_folder(piece: Piece, trained: Trained) -> Path:
    """Where everything lies that is made of a piece's models.

    Named by the models' folder, which is named by what made them: what was judged of others is not taken for theirs. A
    folder for each number of experts: they are judged by processes side by side.
    """
    return piece.work / "pairs" / trained.base.parent.name / f"{piece.experts}"


def _pair(piece: Piece) -> tuple[Pair, Texts]:
    trained, texts = models_and_texts(piece)
    return lay_out(trained, texts, pair_folder(piece, trained), piece.until), texts


def _contenders(piece: Piece, judge: Judge, texts: Texts) -> Iterator[tuple[str, Callable[[], list[Figure]]]]:
    """Every contender of a piece, with what gives its figures."""
    if piece.experts == 1:
        for task, budget in product(judge.pair.trained.experts, piece.choice.budgets or BUDGETS):
            for name, variant in piece.choice.of(one_expert(task, budget) | peers_of_one(task, budget)).items():
                yield f"{task} {budget:g} {name}", partial(_alone, piece, judge, name, variant, task, budget)
        return
    joint = joint_training(piece.training, texts, piece.seed, piece.until)
    named = (two_experts() | peers_of_two() if piece.experts == 2 else three_experts()) | {CEILING: [joint]}
    named = {name: named[name] for name in (*FIRST, *named) if name in named}
    for name, variants in piece.choice.of(named).items():
        yield name, partial(_several, piece, judge, name, variants)


def _several(piece: Piece, judge: Judge, name: str, variants: Sequence[Variant]) -> list[Figure]:
    """Figures of a merge of several experts, in the setting that is best on validation."""
    best = chosen_variant(judge, judge.pair, variants, piece.device)
    losses = judge.recipe_losses(best.recipe(judge.pair, piece.device), TEST)
    return [
        _figure(judge, NAMES[piece.experts], piece.size, piece.seed, name, None, task, losses, best.setting)
        for task in judge.pair.trained.experts
    ]


def _alone(piece: Piece, judge: Judge, name: str, variant: Variant, task: str, budget: float) -> list[Figure]:
    """What is kept of one expert at one budget."""
    losses = judge.recipe_losses(variant.recipe(judge.pair, piece.device), TEST)
    return [_figure(judge, ONE, piece.size, piece.seed, name, budget, task, losses, variant.setting)]


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

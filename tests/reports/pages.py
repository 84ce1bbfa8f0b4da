"""Pages to test with: a full one of any size with made-up but consistent numbers, and an empty one."""

import math
import random

from utils.reports.values import (
    Answer,
    Contender,
    Estimate,
    Front,
    FrontPoint,
    Heatmap,
    History,
    Importance,
    ModelRecord,
    Page,
    Recipe,
    Role,
    Run,
    Sample,
    Score,
    Standing,
    TaskScores,
    TextRecord,
    Trial,
    TrialState,
)
from utils.reports.verdict import judge

COMPONENTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def full_page(candidates: int = 5, tasks: int = 2, trials: int = 40, layers: int = 24, seed: int = 1) -> Page:
    """A page with every section; the numbers follow one hidden quality per contender."""
    draw = random.Random(seed)
    experts = [Contender(f"expert-{index}", Role.EXPERT, "fine-tune") for index in range(tasks)]
    controls = [
        Contender("task arithmetic 0.4", Role.CONTROL, "uniform, λ 0.4"),
        Contender("uniform TIES", Role.CONTROL, "density 0.5, λ 1"),
    ]
    found = [
        Contender(f"guided_mean power {index / 4:.2f}", Role.CANDIDATE, f"saliency_budget, trial {index + 7}")
        for index in range(candidates)
    ]
    contenders = (Contender("base", Role.BASE, "before fine-tuning"), *experts, *controls, *found)
    kept = {"base": 0.0, "task arithmetic 0.4": 0.35, "uniform TIES": -0.2}
    kept |= {one.name: 0.56 - 0.9 * index / max(candidates, 8) for index, one in enumerate(found)}
    gains = [
        {name: share + draw.uniform(-0.06, 0.06) * (name != "base") for name, share in kept.items()}
        | {expert.name: 1.0 if at == task else draw.uniform(-0.3, 0.2) for at, expert in enumerate(experts)}
        for task in range(tasks)
    ]
    names = ["math", "code", "medicine", "law", "chess", "poetry"]
    recipe = Recipe(
        (
            ("merge method", "guided_mean"),
            ("guidance", "saliency_budget"),
            ("λ", "0.62"),
            ("power", "0.25"),
            ("floor", "0.05"),
        ),
        tuple(_heatmap(expert.name, layers, draw) for expert in experts[:2]),
        "merge_method: guided_mean\nbase_model: base\nparameters:\n  lambda: 0.62\n",
    )
    standings = tuple(_standing(one.name, gains, names, draw) for one in contenders)
    return Page(
        title="Merges of math and code into small-base",
        verdict=judge(found[0].name, "task arithmetic 0.4", standings) if found else None,
        contenders=contenders,
        reference="task arithmetic 0.4",
        winner=found[0].name if found else "",
        tasks=tuple(_task(names[task], gains[task], draw) for task in range(tasks)),
        standings=standings,
        recipe=recipe,
        history=_history(trials, draw),
        importance=Importance("fANOVA", (("λ", 0.52), ("merge method", 0.31), ("power", 0.11), ("mean density", 0.06))),
        fronts=(_front(contenders, gains, names),) if tasks > 1 else (),
        samples=tuple(_sample(index, found) for index in range(3)),
        run=Run(
            commands=(
                "python3 utils/searcher.py --config configs/my_pair.yaml --out_dir output/my_pair/search --trials 64",
            ),
            versions={
                "python": "3.11.2",
                "torch": "2.13.0",
                "transformers": "5.23.1",
                "mergekit": "0.1.5",
                "optuna": "5.0.0",
            },
            models=(
                ModelRecord("org/small-base", "base", "sha256 " + 16 * "9f3c", "apache-2.0"),
                ModelRecord("org/small-math", "expert", "revision " + 10 * "a1b2", ""),
            ),
            texts=(
                TextRecord("math", "data/math.jsonl", "validation", 200, 16 * "77aa"),
                TextRecord("math", "data/math.jsonl", "test", 400, 16 * "01bc"),
            ),
            seeds=(("search", 0), ("rows", 42)),
            device="cpu, 2 threads, float32",
            seconds=4321.0,
            memory=3_100_000_000,
            disk=210_000_000,
            created="2026-11-25T16:00:00+00:00",
            facts=(("rows scored", "38 400"),),
        ),
        notes=(
            "An interval says how far the figure would move with other text of the same kind. It says nothing about "
            "how another training run of the experts would turn out.",
        ),
        warnings=("expert-1 differs from the base by 0.4 of its norm in lm_head, more than fine-tunes do.",),
        next_command="python3 utils/merger.py --merge_config output/my_pair/search/best.yaml --output_path output/my_pair/merged",
    )


def _task(name: str, gains: dict[str, float], draw: random.Random) -> TaskScores:
    base, span = draw.uniform(1.8, 2.6), draw.uniform(0.3, 0.8)
    losses = {who: base - span * gain for who, gain in gains.items()}
    reference = losses["task arithmetic 0.4"]
    scores = []
    for who, loss in losses.items():
        half = draw.uniform(0.01, 0.05)
        ours = who != "task arithmetic 0.4"
        difference = Estimate(loss - reference, loss - reference - half, loss - reference + half) if ours else None
        scores.append(
            Score(who, Estimate(loss), difference, draw.random() * 0.1 if ours else None, gains[who], math.exp(loss))
        )
    return TaskScores(name, "loss, nats per token", False, tuple(scores), 400)


def _standing(who: str, gains: list[dict[str, float]], names: list[str], draw: random.Random) -> Standing:
    mean = sum(task[who] for task in gains) / len(gains)
    reference = sum(task["task arithmetic 0.4"] for task in gains) / len(gains)
    worst = min(range(len(gains)), key=lambda index: gains[index][who])
    ahead = mean - reference
    difference = None if who == "task arithmetic 0.4" else Estimate(ahead, ahead - 0.04, ahead + 0.04)
    change = 0.0 if who == "base" else draw.uniform(-0.01, 0.12)
    forgetting = Estimate(change) if who == "base" else Estimate(change, change - 0.015, change + 0.015)
    return Standing(who, Estimate(mean), difference, None, gains[worst][who], names[worst], forgetting)


def _heatmap(name: str, layers: int, draw: random.Random) -> Heatmap:
    cells = tuple(
        tuple(round(min(1.0, 0.3 + 0.5 * layer / layers + draw.uniform(-0.1, 0.1)), 3) for _ in COMPONENTS)
        for layer in range(layers)
    )
    return Heatmap(name, "density", tuple(map(str, range(layers))), COMPONENTS, cells)


def _history(trials: int, draw: random.Random) -> History:
    rows = []
    for number in range(trials):
        known = number < min(8, trials // 4)
        value = draw.gauss(0.2, 0.15) if known else draw.gauss(0.2 + 0.3 * number / trials, 0.12)
        state = TrialState.COMPLETE if known else draw.choices(list(TrialState), (6, 3, 0.4))[0]
        shown = None if state is TrialState.FAILED else min(value, 0.6)
        what = f"task arithmetic, λ {number / 10:.1f}" if known else f"guided_mean, λ {draw.random():.2f}, power 0.5"
        rows.append(Trial(number, shown, state, what, draw.choice((25, 50, 100, 200)), known))
    return History("mean gain kept", tuple(rows), True, True, 0.35, "task arithmetic 0.4")


def _front(contenders: tuple[Contender, ...], gains: list[dict[str, float]], names: list[str]) -> Front:
    places = {one.name: (gains[0][one.name], gains[1][one.name]) for one in contenders if one.role != Role.EXPERT}
    points = []
    for one in contenders:
        if one.name not in places:
            continue
        chosen = one.role is Role.CANDIDATE and one.name.endswith("0.00")
        label = one.name if one.role is Role.CONTROL or chosen else ""
        points.append(FrontPoint(one.name, *places[one.name], chosen, one.role, label))
    return Front(names[0], names[1], tuple(points))


def _sample(index: int, found: list[Contender]) -> Sample:
    wrong = "The answer is 12.\n\nQuestion: Tom has 4 boxes with 6 pens each."
    right = "Each box holds 6 pens, so 3 boxes hold 3 x 6 = 18 pens. The answer is 18."
    answers = [Answer("base", wrong), Answer("expert-0", right), Answer("task arithmetic 0.4", wrong)]
    answers += [Answer(one.name, right) for one in found[:1]]
    prompt = f"Question {index}: Ana has 3 boxes with 6 pens each. How many pens are there?\nAnswer:"
    return Sample(prompt, tuple(answers), "math", "18")

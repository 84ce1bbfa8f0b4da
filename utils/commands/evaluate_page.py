"""An evaluation as the plain values that `utils/reports` shows."""

import datetime
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.commands.evaluate_accuracy import accuracy_scores
from utils.commands.evaluated import Evaluated, Generated
from utils.commands.report_recipe import planned_recipe
from utils.evaluation.scoring import Scorer
from utils.evaluation.statistics import DRAWS, Interval
from utils.models.checkpoints import weight_file_record
from utils.models.license import stated_license
from utils.reports.values import (
    Answer,
    Contender,
    Estimate,
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
    Verdict,
)
from utils.reports.verdict import judge
from utils.runtime import peak_host_bytes


def evaluation_page(
    scorer: Scorer,
    evaluated: Evaluated,
    request: Mapping[str, Any],
    warnings: Sequence[str],
    next_command: str,
    generated: Generated,
) -> Page:
    """The report of an evaluation; candidates are listed by their mean gain, the best first."""
    standings = tuple(_standing(evaluated, one.name) for one in evaluated.candidates)
    ordered = sorted(evaluated.candidates, key=lambda one: _rank(evaluated.figures[one.name].gain.value))
    return Page(
        title=f"Evaluation of {scorer.config.path.stem}",
        verdict=_verdict(evaluated, standings),
        contenders=tuple(Contender(one.name, Role(one.role), _note(one)) for one in ordered),
        reference=evaluated.reference or "",
        winner=evaluated.winner or "",
        tasks=(
            *(_task_scores(scorer, evaluated, task) for task in scorer.tasks),
            *accuracy_scores(evaluated, generated),
        ),
        standings=standings,
        recipe=_recipe(scorer, evaluated),
        samples=tuple(_sample(*answered) for answered in generated.answers),
        run=_run(scorer, evaluated, request),
        notes=(*_notes(scorer, evaluated), *generated.notes),
        warnings=(*warnings, *_failures(evaluated)),
        next_command=next_command,
    )


def _sample(task: str, prompt: str, expected: str, answers: Mapping[str, str]) -> Sample:
    return Sample(prompt, tuple(Answer(name, text) for name, text in answers.items()), task, expected)


def _rank(gain: float) -> float:
    return -gain if math.isfinite(gain) else math.inf


def _note(one: Any) -> str:
    if one.recipe is not None:
        place = f", {one.source.resolve().parent.name}/{one.source.name}" if one.source else ""
        return f"{one.recipe['merge_method']} recipe{place}"
    return "model" if one.role == "candidate" else str(one.model)


def _verdict(evaluated: Evaluated, standings: Sequence[Standing]) -> Verdict | None:
    if evaluated.winner is None:
        return Verdict("No candidate could be scored.") if evaluated.compared else None
    if not any(math.isfinite(one.gain.value) for one in evaluated.figures.values()):
        return Verdict(
            "No expert is better than the base on its text, so there is no gain to keep; compare the losses."
        )
    return judge(evaluated.winner, evaluated.reference or "", standings, evaluated.reference_is)


def _standing(evaluated: Evaluated, name: str) -> Standing:
    figures = evaluated.figures[name]
    return Standing(
        name,
        estimate(figures.gain),
        estimate(figures.difference) if figures.difference else None,
        figures.p,
        figures.worst.value if math.isfinite(figures.worst.value) else None,
        figures.worst_task,
        estimate(figures.forgetting) if figures.forgetting else None,
    )


def _task_scores(scorer: Scorer, evaluated: Evaluated, task: Any) -> TaskScores:
    scores = []
    for one in evaluated.candidates:
        found = evaluated.figures[one.name].tasks[task.name]
        gain = found.gain.value if math.isfinite(found.gain.value) else None
        difference = estimate(found.loss_difference) if found.loss_difference else None
        p = found.loss_difference.p if found.loss_difference else None
        perplexity = found.perplexity if math.isfinite(found.perplexity) else None
        scores.append(Score(one.name, estimate(found.loss), difference, p, gain, perplexity))
    measure = "loss, nats per token"
    return TaskScores(task.name, measure, False, tuple(scores), len(task.part("test")), note=task.summary)


def estimate(interval: Interval) -> Estimate:
    """An interval as the page takes it: what is not finite is not known."""
    known = [value if math.isfinite(value) else None for value in (interval.value, interval.low, interval.high)]
    return Estimate(*known)


def _recipe(scorer: Scorer, evaluated: Evaluated) -> Recipe | None:
    """What the winner's recipe comes to, layer by layer; None where a model won."""
    winner = next((one for one in evaluated.candidates if one.name == evaluated.winner), None)
    if winner is None or winner.recipe is None:
        return None
    return planned_recipe(scorer.planned(winner), model_types(scorer))


def model_records(scorer: Scorer) -> list[dict[str, Any]]:
    """What a manifest says of the pair's models."""
    return [
        {"type": name, **weight_file_record(checkpoint), "sample_sha256": scorer.weights_sample(checkpoint)}
        for name, checkpoint in scorer.inputs.items()
    ]


def model_types(scorer: Scorer) -> dict[Path, str]:
    """What the pair config calls its models, by their folders."""
    return {checkpoint.folder: name for name, checkpoint in scorer.inputs.items()}


def _notes(scorer: Scorer, evaluated: Evaluated) -> Iterator[str]:
    yield (
        f"Intervals are 95% paired bootstrap intervals over rows ({DRAWS} resamples, the same for everybody): they hold "
        "the noise of the text, so what other rows of this kind would give, not that of training the experts again."
    )
    p_values = [evaluated.figures[name].p for name in evaluated.compared]
    several = sum(p is not None and math.isfinite(p) for p in p_values)
    if several > 1:
        yield f"p values are corrected for {several} candidates (Holm), each measure of each task by itself."
    controls = [one for one in evaluated.candidates if one.role == "control"]
    if controls:
        yield (
            "The settings of the uniform merges, and who is recommended, were chosen on validation rows; all figures are "
            "of test rows, which nothing was chosen on."
        )
    for task in scorer.tasks:
        base = scorer.config.base.type
        if task.measures_gain and not math.isfinite(evaluated.figures[base].tasks[task.name].gain.value):
            yield f"On {task.name} no expert is better than the base, so it has no share in the mean."


def _failures(evaluated: Evaluated) -> Iterator[str]:
    for one in evaluated.candidates:
        losses = [each.loss.value for each in evaluated.figures[one.name].tasks.values()]
        if not all(map(math.isfinite, losses)):
            yield f"{one.name} has no losses: its merge, or what it computes, is not finite."


def _run(scorer: Scorer, evaluated: Evaluated, request: Mapping[str, Any]) -> Run:
    models = tuple(
        ModelRecord(
            checkpoint.name,
            "base" if name == scorer.config.base.type else "expert",
            request_model["revision"] or request_model["sample_sha256"][:12],
            stated_license(checkpoint.folder),
        )
        for (name, checkpoint), request_model in zip(scorer.inputs.items(), request["models"], strict=True)
    )
    texts = tuple(
        TextRecord(task.name, task.summary, part, len(task.part(part)), task.digest[:12])
        for task in scorer.tasks
        for part in ("validation", "test")
    )
    settings = scorer.settings.record()
    return Run(
        commands=(shlex.join(["python3", *sys.argv]),),
        versions=dict(request["versions"]),
        models=models,
        texts=texts,
        seeds=(("merge", settings["random_seed"]),),
        device=settings["device"],
        seconds=evaluated.seconds,
        memory=peak_host_bytes(),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        facts=(
            ("dtype", settings["dtype"]),
            ("tokens at a time", str(settings["batch_tokens"])),
            *evaluated.facts,
        ),
    )

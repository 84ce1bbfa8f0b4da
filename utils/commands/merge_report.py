"""What a merge says beside its weights: licenses and figures for the model card, and the page of its folder."""

import dataclasses
import datetime
import shlex
import sys

from utils.commands.evaluation_folder import Measured
from utils.commands.report_recipe import merge_page, model_records
from utils.merging.model_card import CardAddition
from utils.merging.planning import PlannedMerge
from utils.named_paths import without_folders
from utils.reports.card_table import evaluation_section, inputs_section, model_index
from utils.reports.page import render
from utils.reports.values import Contender, Run, Verdict
from utils.reports.verdict import judge
from utils.runtime import peak_host_bytes, versions


def card_addition(ready: PlannedMerge, measured: Measured | None) -> CardAddition:
    """The inputs with the licenses they state, and the figures of an evaluation of this recipe, if there is one."""
    sections = {"Inputs": inputs_section(model_records(ready))}
    if measured is None:
        return CardAddition(sections=sections)
    index = model_index(measured.page, measured.name, ready.settings.output_path.resolve().name)
    figures = evaluation_section(measured.page, measured.name)
    return CardAddition({"model-index": index} if index else {}, {"Evaluation": figures, **sections})


def report_html(ready: PlannedMerge, measured: Measured | None, seconds: float) -> str:
    """The page of a merged folder; with an evaluation of its recipe, that one's figures on it."""
    found = versions()
    run = Run(
        commands=(shlex.join(["python3", *map(_published, sys.argv)]),),
        versions={name: found[name] for name in ("python", "torch", "transformers", "mergekit") if name in found},
        seeds=(("merge", ready.settings.random_seed),),
        device=ready.device,
        seconds=seconds,
        memory=peak_host_bytes(),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    page = merge_page(ready, run)
    if measured is None:
        return render(page)
    scored = measured.page
    return render(
        dataclasses.replace(
            page,
            verdict=_verdict(measured) or page.verdict,
            contenders=_marked(measured),
            reference=scored.reference,
            winner=scored.winner,
            tasks=scored.tasks,
            standings=scored.standings,
            notes=scored.notes,
        )
    )


def _verdict(measured: Measured) -> Verdict | None:
    """The verdict on what was merged, and who came first where that is another; None where it has no figures."""
    scored, name, evaluation = measured.page, measured.name, measured.evaluation
    if not any(one.contender == name and one.gain.known for one in evaluation.judged):
        return None
    first = scored.winner in ("", name)
    named = {"gain": evaluation.gain} if evaluation.gain else {}
    found = judge(
        name,
        scored.reference,
        evaluation.judged,
        evaluation.reference_is,
        recommended=scored.winner == name,
        **named,
    )
    said = () if first else (f"The best on validation rows was {scored.winner}.",)
    return dataclasses.replace(found, details=(*said, *found.details))


def _marked(measured: Measured) -> tuple[Contender, ...]:
    """All contenders, what was merged first, so that it is not among the rows that are folded away."""
    merged = [one for one in measured.page.contenders if one.name == measured.name]
    others = [one for one in measured.page.contenders if one.name != measured.name]
    return (*(dataclasses.replace(one, note="merged here") for one in merged), *others)


def _published(word: str) -> str:
    """A word of the command line with the last part alone of an absolute path: the folder may be published."""
    flag, separator, value = word.rpartition("=")
    return f"{flag}{separator}{without_folders(value)}"

"""Losses of many candidates on the same rows, in as few passes over the inputs as memory allows.

    scorer = Scorer(config, evaluation_rows(config), ScoreSettings(device=torch.device("cpu")))
    losses = scorer.score(candidates, {"math": [0, 1, 2]})

A recipe's losses are, to the bit, those of the model that command 3 writes from it, scored here with the same rows,
settings and number of threads.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from utils.evaluation.candidates import Candidate, models_of_pair, refuse_other_models, vector_files
from utils.evaluation.encoding import EncodedRow, ScoredBatch, encode_task, scored_batches, without_cut_rows
from utils.evaluation.entries import Preparing, ReadyCandidate, refuse_little_disk
from utils.evaluation.pass_memory import Rider, pass_bytes, passes_line, refuse_too_large, share_passes
from utils.evaluation.score_settings import ScoreSettings
from utils.evaluation.side_by_side import Entry, Seconds, run_side_by_side
from utils.evaluation.tasks import Task
from utils.evaluation.weights import CandidateWeights, models_at_once
from utils.merging.inputs import token_donors
from utils.merging.pieces.cuts import KnownCuts
from utils.merging.planning import PlannedMerge
from utils.models.checkpoints import Checkpoint, read_model_config
from utils.models.content_sample import content_sample
from utils.models.opening import open_checkpoint
from utils.models.settings_digest import settings_digest
from utils.models.tokenizer import load_tokenizer, tokenizer_digest
from utils.pair.config import PairConfig
from utils.passes.preparation import check_tokens, pad_token
from utils.publishing.manifest import file_sha256, sha256_of
from utils.runtime import available_bytes, versions

COLUMNS = ("candidate", "task", "row", "nll", "tokens")
_SHARE = 0.5  # of the free memory, for hidden states


@dataclass
class Scorer:
    """Scores candidates of one pair; knows the tasks' rows in every tokenizer it has met.

    Rows without a token to score in some tokenizer of the pair are left out of `tasks`; `warnings` say how many.

    Args:
        config: the pair; recipes must merge its models.
        tasks: what to score on; rows are known by their numbers there, when the scorer is made.
        settings: how to compute.
        say: takes sentences about what is done (a model that is written, how many candidates go side by side).
        on_step: told how many of how many steps (blocks of passes) are done.

    Raises:
        UserError: a model of the pair is missing or malformed, or its tokenizer cannot encode a row.
    """

    config: PairConfig
    tasks: Sequence[Task]
    settings: ScoreSettings = field(default_factory=ScoreSettings)
    say: Callable[[str], None] = lambda line: None
    on_step: Callable[[int, int], None] = lambda done, steps: None
    seconds: Seconds = field(default_factory=Seconds)

    def __post_init__(self) -> None:
        self._preparing = Preparing(self.settings.device, self.settings.dtype, self.settings.merge)
        self._cuts = KnownCuts()  # of the pair's changes: the next round of rows merges the same recipes again
        self._encoded: dict[str, tuple[Any, dict[str, list[EncodedRow]]]] = {}
        self._places: dict[Path, str] = {}
        self._samples: dict[tuple[Any, ...], str] = {}
        self.inputs: dict[str, Checkpoint] = {
            one.name: open_checkpoint(one.model, one.revision) for one in models_of_pair(self.config)
        }
        for checkpoint in self.inputs.values():
            self.encoded(checkpoint.folder, checkpoint.name)
        cut = [without_cut_rows(task, [rows[task.name] for _, rows in self._encoded.values()]) for task in self.tasks]
        self.tasks = [task for task, _ in cut]
        self.warnings = [warning for _, warning in cut if warning]
        if self.warnings:
            self._encoded.clear()  # the rows have other numbers now

    def check(self, candidate: Candidate) -> list[str]:
        """Refuse what can be refused of a candidate before weights are read.

        Returns:
            Command 3's warnings about a recipe.

        Raises:
            UserError: a recipe of other models than the pair's, or anything that command 3 would refuse; a model that
                is missing, malformed or quantized, or whose tokenizer does not belong to it.
        """
        refuse_other_models(candidate, self.config)
        if candidate.recipe is None:
            self._checked(self._preparing.model(candidate))
            return []
        planned = self._preparing.plan(candidate)
        ready = self._preparing.recipe(candidate, planned)
        if not isinstance(ready, str):
            self._checked(ready)
        return list(planned.warnings)

    def make_ready(self, candidates: Sequence[Candidate]) -> set[str]:
        """Build the skeletons that candidates need, so that `score` builds none; headers alone are read.

        Returns:
            The names of candidates whose model has to be written first, and is built then.
        """
        written = set()
        for candidate in candidates:
            if candidate.recipe is None:
                self._preparing.model(candidate)
            elif isinstance(self._preparing.recipe(candidate, self._preparing.plan(candidate)), str):
                written.add(candidate.name)
        return written

    def written_bytes(self, candidates: Sequence[Candidate]) -> int:
        """Bytes of the largest model that scoring these writes for a while (one at a time), 0 where none is written first;
        headers alone are read."""
        recipes = [one for one in candidates if one.recipe is not None]
        plans = [(one, self._preparing.plan(one)) for one in recipes]
        return max(
            (planned.plan.nbytes for one, planned in plans if isinstance(self._preparing.recipe(one, planned), str)),
            default=0,
        )

    def refuse_little_disk(self, candidates: Sequence[Candidate], at_once: int = 1) -> int:
        """Refuse candidates whose models have to be written first, so many at a time, and have no room; headers alone are
        read.

        Returns:
            Bytes that lie on the disk for a while.

        Raises:
            UserError: there is not as much free (`disk-full`).
        """
        needed = self.written_bytes(candidates) * at_once
        refuse_little_disk(needed, self.settings.scratch)
        return needed

    def memory(self, candidate: Candidate, count: int, rows: Mapping[str, Sequence[int]]) -> int:
        """Bytes that scoring so many candidates like this one takes at its peak beside the runtime, about; 0 where the model
        has to be written first."""
        if candidate.recipe is None:
            ready = self._preparing.model(candidate)
        else:
            ready = self._preparing.recipe(candidate, self._preparing.plan(candidate))
        return 0 if isinstance(ready, str) else self._passes([self._rider(ready, rows)] * count)[1]

    def planned(self, candidate: Candidate) -> PlannedMerge:
        """A recipe's merge, planned as command 3 would; headers alone are read."""
        return self._preparing.plan(candidate)

    def encoded(self, folder: Path, name: str) -> tuple[Any, dict[str, list[EncodedRow]]]:
        """The tokenizer in a model's folder, and every task's rows in its tokens."""
        key = self._tokenizer_of(folder, name)
        if key not in self._encoded:
            tokenizer = load_tokenizer(folder, name, self.settings.merge.trust_remote_code)
            rows = {task.name: encode_task(task, tokenizer, f"model {name}") for task in self.tasks}
            self._encoded[key] = tokenizer, rows
        return self._encoded[key]

    def _tokenizer_of(self, folder: Path, name: str) -> str:
        """What tells the tokenizer in a model's folder from others."""
        if folder not in self._places:
            self._places[folder] = tokenizer_digest(folder, read_model_config(folder, name))
        return self._places[folder]

    @property
    def preparing(self) -> Preparing:
        """How candidates are made ready here, for whoever needs their whole models."""
        return self._preparing

    def fingerprint(self, candidate: Candidate) -> str:
        """SHA-256 of everything that decides what a candidate makes of a text: recipe, models, files of vectors, versions."""
        if candidate.recipe is None:
            parts = [self.model_mark(open_checkpoint(candidate.model, candidate.revision))]
        else:
            recipe = candidate.merge_recipe().data
            vectors = [file_sha256(path) for path in vector_files(recipe)]
            donors = token_donors(candidate.merge_recipe())
            tokens = [self._tokenizer_of(folder, name) for name, folder in donors.items()]
            parts = [recipe, vectors, [self.model_mark(one) for one in self.inputs.values()], tokens]
        return sha256_of([versions(), *parts])

    def model_mark(self, checkpoint: Checkpoint) -> list[str]:
        """What tells a checkpoint from others, wherever it lies: its weights as sampled, its settings, its tokenizer."""
        return [
            self.weights_sample(checkpoint),
            settings_digest(checkpoint),
            self._tokenizer_of(checkpoint.folder, checkpoint.name),
        ]

    def weights_sample(self, checkpoint: Checkpoint) -> str:
        """What tells a checkpoint's weights from others, wherever it lies (`content_sample`); read again once files change.

        Sizes, times and headers do not tell: they are the same of two fine-tunes that came with fixed times.
        """
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in checkpoint.files]
        key = (checkpoint.place, tuple(checkpoint.files), tuple(stamps))
        if key not in self._samples:
            self._samples[key] = content_sample(checkpoint)
        return self._samples[key]

    def score(
        self,
        candidates: Sequence[Candidate],
        rows: Mapping[str, Sequence[int]],
        keep: Callable[[pd.DataFrame], None] = lambda losses: None,
    ) -> pd.DataFrame:
        """Losses of candidates on some rows.

        Args:
            candidates: of distinct names.
            rows: by task, the numbers of its rows.
            keep: takes the losses of each pass's candidates as soon as they are there.

        Returns:
            One row for each candidate, task and row, in that order: `candidate`, `task`, `row`, `nll` (float64: the
            negative log-likelihood of the scored tokens, summed, in nats) and `tokens` (how many these are). `nll` is
            NaN for all rows of a candidate whose merge is not finite, and where its logits are not.

        Raises:
            UserError: anything that could be known before, or an input that cannot be read.
        """
        if len({one.name for one in candidates}) < len(candidates):
            raise ValueError("candidates need distinct names")
        ready, to_write = [], []
        for candidate in candidates:
            if candidate.recipe is None:
                ready.append(self._preparing.model(candidate))
                continue
            planned = self._preparing.plan(candidate)
            found = self._preparing.recipe(candidate, planned)
            if isinstance(found, str):
                to_write.append((candidate, planned, found))
            else:
                ready.append(found)
        frames: dict[str, pd.DataFrame] = {}
        groups = self._groups(ready, rows)
        steps = sum(len(group[0].decoder.blocks) for group in groups) + len(to_write)
        done = 0
        for group in groups:
            start = done
            scored = self._pass(group, rows, lambda layer, start=start: self.on_step(start + layer + 1, steps))
            keep(pd.concat(scored.values(), ignore_index=True))
            frames |= scored
            done += len(group[0].decoder.blocks)
        for candidate, planned, why in to_write:
            self.say(f"{candidate.name} is merged into a temporary folder and scored there: {why}")
            with self._preparing.written(candidate, planned, self.settings.scratch) as one:
                scored = self._pass([one], rows, lambda layer: None)
            keep(scored[candidate.name])
            frames |= scored
            done += 1
            self.on_step(done, steps)
        return pd.concat([frames[one.name] for one in candidates], ignore_index=True)

    def _pass(
        self, group: Sequence[ReadyCandidate], rows: Mapping[str, Sequence[int]], on_block: Callable[[int], None]
    ) -> dict[str, pd.DataFrame]:
        """One pass over the inputs for a group of candidates; their losses by name."""
        entries = [Entry(one.decoder, self._batches(one, rows)) for one in group]
        with ExitStack() as stack:
            weights = CandidateWeights([one.open_weights() for one in group], self.settings.device, self._cuts)
            stack.callback(weights.close)
            seconds = run_side_by_side(entries, weights, self.settings.device, on_block)
        self.seconds.weights += seconds.weights
        self.seconds.forward += seconds.forward
        for one, entry in zip(group, entries, strict=True):
            if entry.failure is not None:
                self.say(f"{one.candidate.name} has no losses: {entry.failure}")
        return {one.candidate.name: self._frame(one, entry, rows) for one, entry in zip(group, entries, strict=True)}

    def _frame(self, one: ReadyCandidate, entry: Entry, rows: Mapping[str, Sequence[int]]) -> pd.DataFrame:
        _, encoded = self.encoded(one.folder, one.candidate.name)
        found = {}
        for scored, losses in zip(entry.batches, entry.losses, strict=entry.failure is None):
            found |= dict(zip(scored.rows, losses, strict=True))
        table = []
        for task, numbers in rows.items():
            for number in numbers:
                nll = found.get((task, number), math.nan)
                nll = nll if math.isfinite(nll) else math.nan
                table.append((one.candidate.name, task, number, nll, encoded[task][number].tokens))
        return pd.DataFrame(table, columns=list(COLUMNS)).astype({"nll": "float64"})

    def _batches(self, one: ReadyCandidate, rows: Mapping[str, Sequence[int]]) -> list[ScoredBatch]:
        tokenizer, encoded = self.encoded(one.folder, one.candidate.name)
        width = one.decoder.model.get_input_embeddings().weight.shape[0]
        return scored_batches(encoded, rows, self.settings.batch_tokens, pad_token(tokenizer, width))

    def _groups(self, ready: Sequence[ReadyCandidate], rows: Mapping[str, Sequence[int]]) -> list[list[ReadyCandidate]]:
        """Candidates that go side by side: as many as the memory that is free holds the hidden states of; this is said."""
        for one in ready:
            self._checked(one)
        together, needed = self._passes([self._rider(one, rows) for one in ready])
        if together:
            self.say(passes_line(together, needed, available_bytes(self.settings.device)))
        return [[ready[place] for place in group] for group in together]

    def _passes(self, riders: Sequence[Rider]) -> tuple[list[list[int]], int]:
        """Candidates by place, those of a pass together; and what the largest pass takes."""
        device = self.settings.device
        together = share_passes(riders, int(_SHARE * available_bytes(device)), self.settings.most_at_once)
        at_once = models_at_once(device)
        return together, max((pass_bytes([riders[place] for place in group], at_once) for group in together), default=0)

    def _rider(self, one: ReadyCandidate, rows: Mapping[str, Sequence[int]]) -> Rider:
        return Rider(one.decoder, self._batches(one, rows), one.dtype, one.merging)

    def _checked(self, one: ReadyCandidate) -> None:
        _, encoded = self.encoded(one.folder, one.candidate.name)
        ids = [row.ids for rows in encoded.values() for row in rows]
        where = f"candidate {one.candidate.name}"
        check_tokens(one.decoder.model, max(map(len, ids)), max(map(max, ids)), where)
        refuse_too_large(one.decoder, one.dtype, self.settings.device, where)

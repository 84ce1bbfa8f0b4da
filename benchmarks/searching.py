"""What a search costs, against merging each candidate with stock mergekit-yaml, loading it and scoring it by plain transformers.

    python3 benchmarks/searching.py --shape llama-365m --candidates 32 --one_by_one 4
    python3 benchmarks/searching.py --shape llama-78m --candidates 32 --rows 32 --one_by_one 0 --seeds 0,1,2,3,4 --read_all
    python3 benchmarks/searching.py --models output/quality/models/192x8_seed* --data DATA --width 6 --depth 3

The same uniform merges (task arithmetic over lambda, TIES over density and lambda) are tried both ways on the same rows.
One by one: each candidate is merged into a folder by `mergekit-yaml` in a process of its own, loaded, and reads every row.
Searched: all race over the rows in passes over the inputs (`utils/searching/rounds.py`); no merged model is written. The
models of a `--shape` are random but for their heads, which know how often each token of their text comes. Those of `--models`
have been trained (folders of `benchmarks/quality_models.py`, one for each seed) and are made as large as wanted without a
change to what they say (`benchmarks/widened.py`); they read `NAME/test.jsonl` in `--data`, which their training did not.

Kept in `benchmarks/results/searching.csv`: seconds by the clock and of the processors, split into merging (and reading),
loading and forward passes; peak memory. `--one_by_one` says how many candidates (spread over the list) go the slow way, the
others are counted as their mean; they are computed in float32, and one of them again in the dtype as stored, which is what
transformers takes unasked. `--read_all` has every candidate read every row, and says whether the race's winner is the one
chosen then, or tied with it. What is measured is not measured again: killed and typed again it goes on.
"""

import argparse
import csv
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.contenders import machine
from benchmarks.search_pairs import Case, random_cases, trained_cases
from benchmarks.shapes import ROOT, SHAPES, parameter_count
from utils.publishing.files import publish_files
from utils.searching.knowns import Known
from utils.searching.points import DENSITY, LAMBDA, UNIFORM, Point

if TYPE_CHECKING:
    from utils.commands.search_setup import Prepared
    from utils.evaluation.scoring import Scorer
    from utils.searching.recipes import Made

RESULTS = ROOT / "benchmarks" / "results" / "searching.csv"
SEARCHED, ONE_BY_ONE, AS_STORED, READ_ALL = "searched", "one by one", "one by one, dtype as stored", "all read all rows"


@dataclass(frozen=True)
class Measured:
    """One line of the results: seconds by the clock, and of all processors together (`cpu_`), of a way or of one candidate.

    `note` is the winner of a race and how many losses it took, or what reading all rows says of it.
    """

    shape: str
    parameters: int
    rows: int
    seed: int
    way: str
    candidates: int
    candidate: str = ""
    merging: float = 0.0
    loading: float = 0.0
    forward: float = 0.0
    total: float = 0.0
    cpu_merging: float = 0.0
    cpu_total: float = 0.0
    peak_gb: float = 0.0
    note: str = ""

    @property
    def place(self) -> tuple[str, ...]:
        """What it is the measurement of."""
        return tuple(map(str, (self.shape, self.rows, self.seed, self.way, self.candidates, self.candidate)))


def processor_seconds() -> float:
    """Seconds of all processors that this process and its ended children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_bytes() -> int:
    """The most memory that this process has had in use, pages of mapped files included."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds of the context to `name`, and those of the processors to `cpu_` and the name."""
    clock, cpu = time.perf_counter(), processor_seconds()
    yield
    into[name] = into.get(name, 0.0) + time.perf_counter() - clock
    into[f"cpu_{name}"] = into.get(f"cpu_{name}", 0.0) + processor_seconds() - cpu


def read_results() -> dict[tuple[str, ...], dict[str, str]]:
    """The results on file, by what they are the measurement of."""
    if not RESULTS.exists():
        return {}
    with open(RESULTS, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    keys = ("shape", "rows", "seed", "way", "candidates", "candidate")
    return {tuple(line[key] for key in keys): line for line in lines}


def keep(result: Measured) -> None:
    """Put a result on file, in the place of an earlier one of the same thing."""
    found = read_results()
    values = {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(result).items()}
    found[result.place] = {key: str(value) for key, value in values.items()}
    with open(RESULTS, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measured)])
        writer.writeheader()
        writer.writerows(found.values())
    print(", ".join(f"{key} {value}" for key, value in values.items() if value not in ("", 0.0)), flush=True)


def points(count: int) -> list[Known]:
    """Uniform merges: half of them task arithmetic, half TIES, over grids of lambda and density."""
    first = count // 2
    found = [
        Point("task_arithmetic", UNIFORM, {LAMBDA: round(0.1 + 1.4 * i / max(1, first - 1), 3)}) for i in range(first)
    ]
    for i in range(count - first):
        density, scale = (0.2, 0.4, 0.6, 0.8)[i % 4], round(0.3 + 0.2 * (i // 4), 3)
        found.append(Point("ties", UNIFORM, {LAMBDA: scale, DENSITY: density}))
    return [Known(point.sentence(), point) for point in found]


@dataclass
class Benchmark:
    """One shape and seed, made ready: what is tried, and everything a search holds."""

    shape: str
    seed: int
    work: Path
    known: Sequence[Known]
    scorer: "Scorer"
    ready: "Prepared"

    def line(self, way: str, candidate: str = "", note: str = "", **numbers: float) -> Measured:
        """A line of results."""
        own = {key: value for key, value in numbers.items() if key in {field.name for field in fields(Measured)}}
        parameters = parameter_count(self.work / "models" / "base")
        rows = self.ready.yardstick.all_rows
        return Measured(self.shape, parameters, rows, self.seed, way, len(self.known), candidate, note=note, **own)

    def is_done(self, way: str, candidate: str = "") -> bool:
        """Whether a result is on file."""
        return self.line(way, candidate).place in read_results()

    def race(self) -> None:
        """All candidates in one race; one that was measured is raced again from its losses."""
        seconds, spent, done = self.scorer.seconds, {}, self.is_done(SEARCHED)
        seconds.weights = seconds.forward = 0.0  # the pair's own losses are needed by both ways
        Path("/proc/self/clear_refs").write_text("5")  # from here on the peak counts
        with timed(spent, "total"):
            self.ready.search.run_batch(0, len(self.known))
        if not done:
            numbers = {**spent, "merging": seconds.weights, "forward": seconds.forward, "peak_gb": peak_bytes() / 1e9}
            read = f"{self.read()} of {len(self.known) * self.ready.yardstick.all_rows} losses read"
            keep(self.line(SEARCHED, note=f"{self.winner()}; {read}", **numbers))

    def read(self) -> int:
        """How many losses of candidates are known by now."""
        digests = {self.ready.maker.make(one.point).digest for one in self.known}
        return sum(digest in digests for digest, _, _ in self.ready.losses.nll)

    def winner(self) -> str:
        """The name of the race's best candidate."""
        finished = self.ready.study.finished(self.ready.yardstick.all_rows)
        return max(finished, key=lambda one: sum(one.gains.values())).known

    def one_by_one(self, one: Known, dtype: str, way: str) -> None:
        """A candidate merged by stock mergekit, loaded and scored."""
        recipe, merged, spent = self.work / "candidate.yaml", self.work / "merged", {}
        shutil.rmtree(merged, ignore_errors=True)
        data = yaml.safe_dump(dict(self.ready.maker.make(one.point).data)).encode()
        publish_files(self.work, {recipe.name: data}, overwrite=True)
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(recipe), str(merged)]
        with timed(spent, "total"):
            with timed(spent, "merging"):
                subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            losses = self._scored(merged, dtype, spent)
        shutil.rmtree(merged, ignore_errors=True)
        keep(self.line(way, one.name, self._apart(one, losses), **spent))

    def _scored(self, folder: Path, dtype: str, spent: dict[str, float]) -> dict[tuple[str, int], float]:
        """The losses of a folder's model on all validation rows, by transformers in batches."""
        import torch
        from transformers import AutoModelForCausalLM

        with timed(spent, "loading"):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        _, encoded = self.scorer.encoded(folder, str(folder))
        found = {}
        with timed(spent, "forward"), torch.inference_mode():
            for task, numbers in self.ready.yardstick.rows.items():
                for at in range(0, len(numbers), 16):
                    chosen = numbers[at : at + 16]
                    ids = [torch.tensor(encoded[task][number].ids) for number in chosen]
                    batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
                    mask = torch.arange(batch.shape[1]) < torch.tensor([len(own) for own in ids])[:, None]
                    logits = model(input_ids=batch, attention_mask=mask.long(), use_cache=False).logits[:, :-1].float()
                    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
                    for place, number in enumerate(chosen):
                        row = encoded[task][number]
                        found[task, number] = float(nll[place, row.first - 1 : len(row.ids) - 1].double().sum())
        return found

    def _apart(self, one: Known, losses: Mapping[tuple[str, int], float]) -> str:
        """How far these losses are from those of the search, where it has them."""
        digest = self.ready.maker.make(one.point).digest
        known = self.ready.losses.nll
        both = [(value, known[digest, *row]) for row, value in losses.items() if (digest, *row) in known]
        largest = max((abs(mine - theirs) / theirs for mine, theirs in both), default=0.0)
        return f"{len(both)} losses that the race read, too, are {largest:.1e} apart at most"

    def read_all(self) -> None:
        """Have every candidate read every row, and keep what that says of the race's winner."""
        from utils.evaluation.candidates import Candidate
        from utils.searching.losses import Entrant

        made = [self.ready.maker.make(one.point) for one in self.known]
        entrants = [Entrant(one.digest, Candidate(one.digest[:16], recipe=one.data)) for one in made]
        spent: dict[str, float] = {}
        with timed(spent, "total"):
            for seen in self.ready.search.schedule():
                self.ready.losses.require(entrants, self.ready.yardstick.first(seen))
        keep(self.line(READ_ALL, note=self._verdict(made), **spent))

    def _verdict(self, made: "Sequence[Made]") -> str:
        """Whether the race's winner is the best of all rows, or how far it is behind and whether a paired test sees that."""
        from benchmarks.race_rules import Table

        objective = self.ready.yardstick.objective
        table = Table.of_search(self.ready, made)
        figure, winner = table.figure(objective), [one.name for one in self.known].index(self.winner())
        behind = 100 * float(figure.max() - figure[winner])
        if not behind:
            return "the same winner"
        verdict = "tied (paired test, 5 %)" if table.tied(winner, objective) else "beaten"
        return f"another winner, {behind:.2f} points behind: {verdict}"


def prepared(case: Case, candidates: int, rows: int, work: Path) -> Benchmark:
    """The pair built, and a search over it made ready; a race on file is raced again from its losses."""
    (work / "search").mkdir(parents=True, exist_ok=True)
    known = points(candidates)
    scorer, ready = search_over(case.make(work, rows), work / "search", known, rows)
    return Benchmark(case.shape, case.seed, work, known, scorer, ready)


def search_over(pair: Path, folder: Path, known: Sequence[Known], rows: int) -> "tuple[Scorer, Prepared]":
    """A search of a pair config over some candidates, ready to race on so many rows a task, and who scores for it."""
    from utils.commands.search_options import SearchOptions
    from utils.commands.search_scoring import prepare_scoring
    from utils.commands.search_setup import prepare_search
    from utils.pair.config import read_pair_config

    options = SearchOptions(
        read_pair_config(pair),
        folder,
        trials=len(known),
        validation_rows=rows,
        test_rows=2,
        device="cpu",
        quiet=True,
    )
    scoring = prepare_scoring(options, lambda line: None)
    return scoring.scorers[0], prepare_search(options, lambda line: None, scoring, known)


def report(shape: str, candidates: int) -> None:
    """Print what the results on file come to, for every seed of a shape that has both ways."""
    lines = [line for line in read_results().values() if line["shape"] == shape]
    lines = [line for line in lines if int(line["candidates"]) == candidates]
    for race in (line for line in lines if line["way"] == SEARCHED):
        for way in (ONE_BY_ONE, AS_STORED):
            own = [one for one in lines if one["way"] == way and one["rows"] == race["rows"]]
            if not own:
                continue
            mean = {key: sum(float(one[key]) for one in own) / len(own) for key in ("total", "cpu_total", "forward")}
            said = [
                f"{what} {candidates * mean[key] / float(race[key]):.1f}"
                for what, key in (("by the clock", "total"), ("of the processors", "cpu_total"), ("forward", "forward"))
            ]
            print(f"{shape}, seed {race['seed']}, {way} ({len(own)} measured): times less time: {', '.join(said)}")


def main() -> None:
    """Measure what is not on file yet, for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-78m", choices=SHAPES)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="validation rows a task")
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--models", type=Path, nargs="*", default=[], help="folders of trained pairs, in place of a shape"
    )
    parser.add_argument("--data", type=Path, help="a folder with NAME/test.jsonl of each expert's text")
    parser.add_argument("--width", type=int, default=6, help="times the width of trained pairs")
    parser.add_argument("--depth", type=int, default=3, help="times their blocks")
    parser.add_argument("--one_by_one", type=int, default=2, help="candidates that are merged, loaded and scored")
    parser.add_argument("--read_all", action="store_true", help="judge the race's winner on all rows of all")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "bench_search")
    args = parser.parse_args()

    from utils.runtime import let_waiting_threads_sleep

    let_waiting_threads_sleep()

    from utils.runtime import quiet_libraries

    quiet_libraries()
    print(f"machine: {machine()}")
    cases = random_cases(args.shape, list(map(int, args.seeds.split(","))))
    if args.models:
        cases = trained_cases(args.models, args.data, args.width, args.depth)
    for case in cases:
        work = (args.work / f"{case.shape.split()[0]}_{case.seed}").resolve()
        places = (case.shape, 2 * args.rows, case.seed, SEARCHED, args.candidates, "")
        if tuple(map(str, places)) not in read_results():
            shutil.rmtree(work / "search", ignore_errors=True)  # of a race that was killed
        bench = prepared(case, args.candidates, args.rows, work)
        bench.race()
        step = max(1, len(bench.known) // max(1, args.one_by_one))
        slow = bench.known[step // 2 :: step][: args.one_by_one]
        for one in slow:
            if not bench.is_done(ONE_BY_ONE, one.name):
                bench.one_by_one(one, "float32", ONE_BY_ONE)
        for one in slow[:1]:
            if not bench.is_done(AS_STORED, one.name):
                bench.one_by_one(one, "auto", AS_STORED)
        if args.read_all and not bench.is_done(READ_ALL):
            bench.read_all()
        bench.ready.study.close()
    for shape in dict.fromkeys(case.shape for case in cases):
        report(shape, args.candidates)


if __name__ == "__main__":
    main()

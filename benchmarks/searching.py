"""What a search costs, against merging each candidate with stock mergekit-yaml, loading it and scoring it by plain transformers.

    python3 benchmarks/searching.py --shape llama-78m --candidates 32
    python3 benchmarks/searching.py --shape llama-365m --candidates 32 --seeds 0,1,2,3,4

The same uniform merges (task arithmetic over lambda, TIES over density and lambda) are tried both ways on the same rows.
One by one: each candidate is merged into a folder by `mergekit-yaml` in a process of its own, loaded, and reads every row.
Searched: all race over the rows in passes over the inputs (`utils/searching/rounds.py`); no merged model is written. The
models are random but for their heads, which know how often each token of their text comes: experts gain, as real ones do,
and candidates differ. Printed are both times, split into merging and reading, loading, and the models' forward passes; the
ratio; peak memory of the race; and whether the race's winner is the one that reading all rows would choose, or tied with it.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.contenders import machine
from benchmarks.shapes import ROOT, SHAPES, build_pair, parameter_count, rows_files
from utils.publish import publish_files
from utils.searching.knowns import Known
from utils.searching.space import DENSITY, LAMBDA, UNIFORM, Point

if TYPE_CHECKING:
    from utils.evaluation.scoring import Scorer
    from utils.pair.config import PairConfig

TASKS = ("one", "two")
FIRST_ROWS = 8


@dataclass(frozen=True)
class Costs:
    """Seconds of one way: merging (and reading the inputs), loading what was written, forward passes; losses by name."""

    merging: float
    loading: float
    forward: float
    total: float

    def line(self, name: str) -> str:
        """For the table."""
        return (
            f"{name:<12}{self.total:>9.1f} s   merging and reading {self.merging:.1f}, loading {self.loading:.1f}, "
            f"forward {self.forward:.1f}"
        )


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


def make_pair(shape: str, folder: Path, rows: int, seed: int) -> Path:
    """The models of a shape, heads that know their text's tokens, texts and a pair config; made once per seed."""
    places = build_pair(shape, folder / "models", None)
    source = [json.loads(line) for line in next(iter(rows_files(None).values())).read_text().splitlines()]
    words = [word for row in source for word in str(next(iter(row.values()))).split()]
    for place, task in enumerate(TASKS):
        own = words[place :: len(TASKS)]
        lines = [" ".join(own[(7 * i + j + 31 * seed) % len(own)] for j in range(24)) + f" {i}" for i in range(rows)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        _teach_head(places[task], lines[: rows // 2])
    texts = {
        task: {"path": str(folder / f"{task}.jsonl"), "text": "{text}", "seqlen": 64, "seed": seed} for task in TASKS
    }
    config = {
        "model_info": [{"name": str(places[name]), "type": name} for name in ("base", *TASKS)],
        "dataset": texts["one"],
        "calibration": texts,
        "nsamples": 4,
        "search": {"guidance": [UNIFORM], "depth_groups": 1, "weights": 1},
    }
    path = folder / "pair.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def _teach_head(place: Path, lines: Sequence[str]) -> None:
    """Add to the head, along the mean final hidden state, the logarithm of how often each token comes in some text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if (place / "taught").exists():
        return
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    ids = [torch.tensor(tokenizer(line)["input_ids"]) for line in lines]
    with torch.inference_mode():
        mean = torch.cat([model.model(input_ids=own[None]).last_hidden_state[0] for own in ids[:16]]).mean(0)
    width = model.get_output_embeddings().weight.shape[0]
    counts = torch.bincount(torch.cat(ids), minlength=width).float() + 0.05
    with torch.no_grad():
        logs = (counts / counts.sum()).log()
        model.get_output_embeddings().weight += (logs - logs.mean())[:, None] * mean / mean.square().sum()
    for file in place.glob("model*"):
        file.unlink()
    model.to(torch.bfloat16).save_pretrained(place)
    (place / "taught").touch()


def race(config: "PairConfig", scorer: "Scorer", known: Sequence[Known], folder: Path) -> tuple[Costs, str, Any]:
    """All candidates in one race; the winner's name, and the search for more questions."""
    from utils.commands.search_setup import SearchOptions, prepare_search

    options = SearchOptions(config, folder, trials=len(known), first_rows=FIRST_ROWS, quiet=True, device="cpu")
    ready = prepare_search(options, lambda line: None, known, [scorer])
    scorer.seconds.weights = scorer.seconds.forward = 0.0  # the pair's own losses are needed by both ways
    start = time.perf_counter()
    ready.search.run_batch(0, len(known))
    total = time.perf_counter() - start
    finished = ready.study.finished(ready.yardstick.all_rows)
    best = max(finished, key=lambda one: sum(one.gains.values()))
    return Costs(scorer.seconds.weights, 0.0, scorer.seconds.forward, total), best.known, ready


def one_by_one(ready: Any, known: Sequence[Known], work: Path) -> tuple[Costs, dict[str, dict[tuple[str, int], float]]]:
    """Each candidate merged by stock mergekit, loaded and scored; the losses by candidate and row."""
    merging = loading = forward = 0.0
    losses = {}
    begin = time.perf_counter()
    for one in known:
        recipe, merged = work / "candidate.yaml", work / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        publish_files(
            work, {recipe.name: yaml.safe_dump(dict(ready.maker.make(one.point).data)).encode()}, overwrite=True
        )
        start = time.perf_counter()
        command = [str(Path(sys.executable).with_name("mergekit-yaml")), str(recipe), str(merged)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        merging += time.perf_counter() - start
        losses[one.name], spent = _scored(ready, merged)
        loading, forward = loading + spent[0], forward + spent[1]
    shutil.rmtree(work / "merged", ignore_errors=True)
    return Costs(merging, loading, forward, time.perf_counter() - begin), losses


def _scored(ready: Any, folder: Path) -> tuple[dict[tuple[str, int], float], tuple[float, float]]:
    """The losses of a folder's model on all validation rows, by transformers in batches; seconds of loading and forward."""
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    loaded = time.perf_counter()
    _, encoded = ready.scorer.encoded(folder, str(folder))
    found = {}
    with torch.inference_mode():
        for task, numbers in ready.yardstick.rows.items():
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
    return found, (loaded - start, time.perf_counter() - loaded)


def verdict(ready: Any, winner: str, losses: Mapping[str, Mapping[tuple[str, int], float]]) -> str:
    """Whether the race's winner is the best of all rows, or how far it is behind and whether a paired test sees that."""
    import numpy as np

    from utils.searching import racing

    yardstick = ready.yardstick
    rows = [(task, number) for task, numbers in yardstick.rows.items() for number in numbers]
    names = list(losses)
    nll = np.array([[losses[name][row] for row in rows] for name in names])
    task = np.repeat(np.arange(len(yardstick.rows)), [len(own) for own in yardstick.rows.values()])
    read = racing.Rows(task, ready.losses.sizes(yardstick.base, yardstick.rows))
    base = ready.losses.table([yardstick.base], yardstick.rows)[0]
    figure = yardstick.objective.figure(racing.gains(nll, read, base, yardstick.scales))
    best = int(figure.argmax())
    if names[best] == winner:
        return "the same winner"
    pair = nll[[best, names.index(winner)]]
    apart = racing.beaten(pair, read, base, yardstick.scales, yardstick.objective, 0.05)[1]
    behind = 100 * (figure[best] - figure[names.index(winner)])
    return f"another winner, {behind:.2f} points behind: {'beaten' if apart else 'tied (paired test, 5 %)'}"


def main() -> None:
    """Time both ways for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-78m", choices=SHAPES)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--rows", type=int, default=64, help="validation rows a task")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "bench_search")
    args = parser.parse_args()

    from utils.commands.measure import quiet_libraries
    from utils.commands.search_setup import SearchOptions, make_scorers
    from utils.pair.config import read_pair_config

    quiet_libraries()
    print(f"machine: {machine()}")
    for seed in map(int, args.seeds.split(",")):
        work = (args.work / f"{args.shape}_{seed}").resolve()
        shutil.rmtree(work / "search", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        config = read_pair_config(make_pair(args.shape, work, 4 * args.rows, seed))
        options = SearchOptions(
            config, work / "search", validation_rows=args.rows, test_rows=2, device="cpu", quiet=True
        )
        (scorer,) = make_scorers(options, lambda line: None)
        known = points(args.candidates)
        (work / "search").mkdir()
        searched, winner, ready = race(config, scorer, known, work / "search")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        single, losses = one_by_one(ready, known, work)
        ready.study.close()
        params = parameter_count(work / "models" / "base")
        read = sum(len(own) for own in ready.yardstick.rows.values())
        print(f"\n{args.shape} ({params / 1e6:.0f} M), {len(known)} candidates, {read} rows, seed {seed}:\n")
        print(single.line("one by one"))
        print(searched.line("searched"))
        ratio = single.total / searched.total
        merging = (single.merging + single.loading) / max(1e-9, searched.merging)
        print(
            f"{ratio:.1f} times less time (merging, reading and loading {merging:.1f}, forward "
            f"{single.forward / max(1e-9, searched.forward):.1f}); peak memory of the race {peak:.2f} GB; "
            f"{verdict(ready, winner, losses)}"
        )


if __name__ == "__main__":
    main()

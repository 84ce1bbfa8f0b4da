"""Pairs that searches are measured on: random models of a shape whose heads know their text, or trained ones at a larger size."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from benchmarks.shapes import build_pair, rows_files
from benchmarks.widened import shape_of, widen

TASKS = ("one", "two")  # of random pairs
TEXTS = {"gsm8k": "{question}\n{answer}", "mbpp": "{text}\n{code}"}  # of trained ones
SEQLEN, TRAINED_SEQLEN = 64, 32  # random pairs' texts have some 30 tokens, too


@dataclass(frozen=True)
class Case:
    """A pair to measure: `make` builds it in a folder, for so many rows a task, and returns its config."""

    shape: str
    seed: int
    make: Callable[[Path, int], Path]


def random_cases(shape: str, seeds: Sequence[int]) -> list[Case]:
    """A shape's random pair with texts of several seeds."""
    return [Case(shape, seed, partial(random_pair, shape, seed)) for seed in seeds]


def trained_cases(models: Sequence[Path], data: Path, width: int, depth: int) -> list[Case]:
    """Trained pairs, each of the seed it was trained with."""
    return [
        Case(
            shape_of(own, width, depth),
            json.loads((own / "made.json").read_text())["seed"],
            partial(trained_pair, own, data, width, depth),
        )
        for own in models
    ]


def random_pair(shape: str, seed: int, folder: Path, rows: int) -> Path:
    """The models of a shape, heads that know their text's tokens, texts and a pair config, for so many validation rows a
    task; made once per seed."""
    rows *= 4
    places = build_pair(shape, folder / "models", None)
    source = [json.loads(line) for line in next(iter(rows_files(None).values())).read_text().splitlines()]
    words = [word for row in source for word in str(next(iter(row.values()))).split()]
    for place, task in enumerate(TASKS):
        own = words[place :: len(TASKS)]
        lines = [" ".join(own[(7 * i + j + 31 * seed) % len(own)] for j in range(24)) + f" {i}" for i in range(rows)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        _teach_head(places[task], lines[: rows // 2])
    texts = {
        task: {"path": str(folder / f"{task}.jsonl"), "text": "{text}", "seqlen": SEQLEN, "seed": seed}
        for task in TASKS
    }
    return write_pair(folder, places, texts)


def trained_pair(models: Path, data: Path, width: int, depth: int, folder: Path, rows: int) -> Path:
    """A trained pair at a larger size, text that its training did not read and a pair config; made once."""
    places = {name: folder / "models" / name for name in ("base", *TEXTS)}
    for name, place in places.items():
        if not (place / "tokenizer.json").exists():
            widen(models / name, place, width, depth)
    texts = {
        name: {"path": str((data / name / "test.jsonl").resolve()), "text": text, "seqlen": TRAINED_SEQLEN}
        for name, text in TEXTS.items()
    }
    return write_pair(folder, places, texts)


def write_pair(folder: Path, places: Mapping[str, Path], texts: Mapping[str, Mapping[str, object]]) -> Path:
    """A pair config of models and of the experts' texts, all uniform merges to be searched."""
    config = {
        "model_info": [{"name": str(places[name].resolve()), "type": name} for name in ("base", *texts)],
        "dataset": next(iter(texts.values())),
        "calibration": dict(texts),
        "nsamples": 4,
        "search": {"guidance": ["uniform"], "depth_groups": 1, "weights": 1},
    }
    path = folder / "pair.yaml"
    path.write_text(yaml.dump(config, Dumper=_PlainDumper, sort_keys=False))
    return path


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors, which pair configs do not have."""

    def ignore_aliases(self, data: object) -> bool:
        return True


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

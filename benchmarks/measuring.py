"""What measuring a pair costs, against the published procedure.

    python3 benchmarks/measuring.py --shape llama-365m --data FOLDER --runs 3
    python3 benchmarks/measuring.py --shape llama-78m,llama-160m,llama-365m --data FOLDER --text gsm8k --contenders ours
    python3 benchmarks/measuring.py --shape llama-78m --data FOLDER --text gsm8k --nsamples 15,60,240 --contenders ours
    python3 benchmarks/measuring.py --shape llama-3.1-8b --data FOLDER --device cuda --contenders ours,published,read-floor

Runs each contender as a whole process, in turn, `--runs` times with the weights in the page cache, and prints medians,
ratios and peak memory; every run goes into `benchmarks/results/measuring.csv`. Over three shapes or numbers of samples or
more, it also prints how cost grows with parameters and with tokens. Contenders: `ours` (default settings), `parity`
(ours with `parity: reference`, pruning 0.5, in float32) and `parity-fast` (the same in bfloat16); `published` and
`published-fp32` are the procedure as published (`benchmarks/published_scoring.py`), in bfloat16 and float32; `read-floor`
brings the weights of both models to the device and computes nothing (`benchmarks/read_floor.py`); `gram_mean` and
`saliency_budget` measure the expert by these, where `ours` is two ways forward, one of each model:

    python3 benchmarks/measuring.py --shape llama-78m --data FOLDER --text gsm8k --contenders ours,gram_mean

`two-rounds` measures two experts by gram_mean in two rounds, and `best` tunes from there, in as many steps as help on what is
held out (of random models, as here, in few):

    python3 benchmarks/measuring.py --shape llama-78m --data FOLDER --text gsm8k --contenders best,two-rounds \\
        --results benchmarks/results/best.csv
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.contenders import Contender, Run, alternate, chosen, growth_lines, machine, table, write_csv
from benchmarks.shapes import ROOT, SHAPES, build_pair, parameter_count, rows_files

GUIDED = ("gram_mean", "saliency_budget")
OF_TWO = {"two-rounds": ("gram_mean", "--rounds", "2"), "best": ("best",)}
NAMES = ("ours", "parity", "parity-fast", "published", "published-fp32", "read-floor", *GUIDED, *OF_TWO)


def contender(name: str, places: dict[str, Path], text: str, rows: Path, nsamples: int, device: str) -> Contender:
    """The command line of one contender on one text."""
    base, expert = str(places["base"]), str(places["one"])
    weights = [file for place in (base, expert) for file in Path(place).glob("*.safetensors")]
    moved = sum(file.stat().st_size for file in weights)
    if name == "read-floor":
        script = str(ROOT / "benchmarks" / "read_floor.py")
        return Contender(name, (sys.executable, script, device, *map(str, sorted(weights))), moved)
    if name.startswith("published"):
        dtype = "float32" if name.endswith("fp32") else "bfloat16"
        script = str(ROOT / "benchmarks" / "published_scoring.py")
        options = ["--base", base, "--expert", expert, "--rows", str(rows), "--dtype", dtype]
        options += ["--nsamples", str(nsamples), "--device", device]
        return Contender(name, (sys.executable, script, *options), moved)
    config = places["base"].parent / f"{name}_{text}_{nsamples}.yaml"
    parity = {"parity": "reference", "sparsity_ratio": 0.5} if name.startswith("parity") else {}
    models = [{"name": str(places[key]), "type": key} for key in ("base", "one", "two")[: 3 if name in OF_TWO else 2]]
    dataset = {"name": text, "path": str(rows)}
    config.write_text(yaml.safe_dump({"model_info": models, "dataset": dataset, "nsamples": nsamples, **parity}))
    out = places["base"].parent / f"dfs_{name}"
    options = ["--config", str(config), "--out_dir", str(out), "--overwrite", "--device", device]
    options += ["--dtype", {"parity": "float32", "parity-fast": "bfloat16"}.get(name, "auto")]
    if name in GUIDED or name in OF_TWO:
        options += [
            "--guidance",
            *OF_TWO.get(name, (name,)),
            "--accept_useless_text",
        ]  # random models gain nothing on their text
    return Contender(name, (sys.executable, str(ROOT / "lewis_importance.py"), *options), moved)


def read_weights(places: dict[str, Path]) -> None:
    """Bring the weights into the page cache, so that every run finds them there."""
    for file in (file for place in places.values() for file in place.glob("*.safetensors")):
        with open(file, "rb") as stream:
            while stream.read(2**24):
                pass


def main() -> None:
    """Time the contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help=f"one or more of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--data", type=Path, help="folder with gsm8k/train.jsonl and mbpp/train.jsonl")
    parser.add_argument("--text", default="gsm8k,mbpp", help="data sets, separated by commas")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--nsamples", default="15", help="one or more numbers, separated by commas")
    parser.add_argument("--contenders", default=",".join(NAMES[:1] + NAMES[3:4]))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "bench", help="where models are made")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "measuring.csv")
    args = parser.parse_args()
    print(f"machine: {machine()}")
    names = chosen(args.contenders, NAMES)
    everything: list[tuple[Run, str, int, int]] = []
    for shape in args.shape.split(","):
        places = build_pair(shape, args.work / shape, args.data)
        params = parameter_count(places["base"])
        texts = {name: rows for name, rows in rows_files(args.data).items() if name in args.text.split(",")}
        for text, rows in texts.items():
            for nsamples in map(int, args.nsamples.split(",")):
                contenders = [contender(name, places, text, rows, nsamples, args.device) for name in names]
                runs = alternate(contenders, args.runs, lambda places=places: read_weights(places), uncounted=0)
                columns = {"shape": shape, "params": params, "text": text, "nsamples": nsamples, "device": args.device}
                write_csv(args.results, runs, **columns, machine=machine())
                everything += [(run, text, params, nsamples) for run in runs]
                print(f"\n{shape}, {nsamples} samples of {text}, medians of {args.runs} runs:\n")
                print(table(contenders, runs, names[-1]))
    for line in growth(everything):
        print(line)


def growth(runs: list[tuple[Run, str, int, int]]) -> list[str]:
    """How cost grows: with parameters at each text and number of samples, with tokens at each text and size."""
    lines = []
    for text, nsamples in dict.fromkeys((text, nsamples) for _, text, _, nsamples in runs):
        points = [(run, params) for run, t, params, n in runs if (t, n) == (text, nsamples)]
        lines += [f"\n{nsamples} samples of {text}, {one}" for one in growth_lines(points, "100 M parameters", 1e8)]
    for text, params in dict.fromkeys((text, params) for _, text, params, _ in runs):
        points = [(run, run.tokens) for run, t, p, _ in runs if (t, p) == (text, params) and run.tokens]
        lines += [f"\n{params / 1e6:.0f} M, {text}, {one}" for one in growth_lines(points, "1000 tokens", 1e3)]
    return lines


if __name__ == "__main__":
    main()

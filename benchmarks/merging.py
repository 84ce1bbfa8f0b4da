"""What merging two experts costs, against stock mergekit and against reading and writing alone.

    python3 benchmarks/merging.py --shape llama-365m --runs 3
    python3 benchmarks/merging.py --shape llama-78m,llama-160m,llama-365m --runs 3 --contenders ours,floor
    python3 benchmarks/merging.py --shape llama-365m --runs 3 --contenders ours,floor --cold
    python3 benchmarks/merging.py --shape llama-3.2-3b --runs 3 --device cuda --contenders ours,ours-gpu,mergekit-yaml,floor

Every contender merges the same three models by the same YAML, `ties` with a density for each linear weight of each
layer, as a whole process, in turn, `--runs` times after one warm-up round. Medians, ratios and peak memory are printed;
every run goes into `benchmarks/results/merging.csv`. Contenders: `ours` (with `--device cuda` as it is typed without
`--device`, which leaves the choice to the command); `ours-gpu` and `ours-cpu` (told where to compute); `ours-stock` (the
same command, mergekit's own executor); `mergekit-yaml`; `mergekit-fast-options` (with those of its options that make it
faster on this machine); `floor` (the inputs read, one output written, nothing computed). `--cold` drops the inputs from the page cache before
every run. Over three shapes or more it also prints how cost grows with parameters. "job" is the merge itself: for mergekit its executor's run, which includes writing.
"""

import argparse
import os
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.contenders import Contender, Run, alternate, chosen, growth_lines, machine, table, write_csv
from benchmarks.shapes import ROOT, SHAPES, build_pair, parameter_count
from utils.models.headers import read_headers

NAMES = ("ours", "ours-gpu", "ours-cpu", "ours-stock", "mergekit-yaml", "mergekit-fast-options", "floor")
STOCK = str(ROOT / "benchmarks" / "timed_mergekit.py")
FAST_OPTIONS = {"cpu": ("--async-write", "--write-threads", "2", "--out-shard-size", "1B"), "cuda": ("--gpu-rich",)}


def write_recipe(places: dict[str, Path], path: Path, method: str, dtype: str) -> Path:
    """Write a recipe as command 2 makes it: a seeded random density for every matrix of every layer, 1 for the rest."""
    matrices = [
        name.removesuffix(".weight")
        for name, header in sorted(read_headers(places["base"], "base").items())
        if ".layers." in name and len(header.shape) == 2
    ]
    models: list[dict] = [{"model": str(places["base"])}]
    for seed, name in enumerate(("one", "two")):
        draw = random.Random(seed)
        densities = [{"filter": matrix, "value": round(draw.uniform(0.3, 0.8), 5)} for matrix in matrices]
        models.append({"model": str(places[name]), "parameters": {"weight": 1, "density": [*densities, {"value": 1}]}})
    recipe = {
        "models": models,
        "merge_method": method,
        "base_model": str(places["base"]),
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": dtype,
        "out_dtype": "bfloat16",
    }
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def contender(name: str, recipe: Path, output: Path, weights: list[Path], device: str) -> Contender:
    """The command line of one contender."""
    kind = device.partition(":")[0]
    moved = sum(file.stat().st_size for file in weights) * 4 // 3  # three inputs read, one output written
    if name == "floor":
        command = (str(ROOT / "benchmarks" / "copy_floor.py"), str(output), *map(str, weights))
    elif name.startswith("mergekit"):
        options = FAST_OPTIONS[kind] if name == "mergekit-fast-options" else ("--cuda",) * (kind == "cuda")
        command = (STOCK, str(recipe), str(output), "--random-seed", "0", *options)
    else:
        command = (str(ROOT / "utils" / "merger.py"), "--output_path", str(output), "--merge_config", str(recipe))
        where = {"ours": "auto" if kind == "cuda" else device, "ours-cpu": "cpu"}.get(name, device)
        command += ("--device", where, "--fast_selection", str(name != "ours-stock"))
    return Contender(name, (sys.executable, *command), moved)


def prepare(output: Path, cold: list[Path]) -> None:
    """Before a run: no output, nothing left to be written to the disk, and the `cold` files not in the page cache."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    for file in cold:
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Time the contenders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help=f"one or more of {', '.join(SHAPES)}, separated by commas")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--contenders", default="ours,ours-stock,mergekit-yaml,mergekit-fast-options,floor")
    parser.add_argument("--method", default="ties", choices=["ties", "breadcrumbs", "breadcrumbs_ties"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="text for the tokenizer, as for benchmarks/shapes.py")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "bench", help="where models are made")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "merging.csv")
    args = parser.parse_args()
    print(f"machine: {machine()}")
    names = chosen(args.contenders, NAMES)
    sized: list[tuple[Run, float]] = []
    baseline = "mergekit-yaml" if "mergekit-yaml" in names else names[-1]
    for shape in args.shape.split(","):
        places = build_pair(shape, (args.work / shape).resolve(), args.data)
        weights = [file for place in places.values() for file in sorted(place.glob("*.safetensors"))]
        params = parameter_count(places["base"])
        output = places["base"].parent / "merged"
        recipe = write_recipe(places, output.with_name(f"{args.method}_{args.dtype}.yaml"), args.method, args.dtype)
        contenders = [contender(name, recipe, output, weights, args.device) for name in names]
        cold = weights if args.cold else []
        runs = alternate(contenders, args.runs, before=lambda output=output, cold=cold: prepare(output, cold))
        cache = "cold" if args.cold else "warm"
        sized += [(run, params) for run in runs]
        columns = {"shape": shape, "params": params, "method": args.method, "dtype": args.dtype}
        columns |= {"device": args.device, "cache": cache}
        write_csv(args.results, runs, **columns, machine=machine())
        shutil.rmtree(output, ignore_errors=True)
        print(f"\n{shape}, {args.method} in {args.dtype}, page cache {cache}, medians of {args.runs} runs:\n")
        print(table(contenders, runs, baseline))
    for line in growth_lines(sized, "100 M parameters", 1e8):
        print(f"\n{line}")


if __name__ == "__main__":
    main()

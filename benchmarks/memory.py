"""Memory: what each guidance and merge method takes, against what its command says before the work, and whether depth adds to it.

    python3 benchmarks/memory.py
    python3 benchmarks/memory.py --guidance saliency_budget,sens_merging --merge_methods "" --depths 4,32
    python3 benchmarks/memory.py --guidance "" --merge_methods ties,della,slerp --shapes llama-365m
    python3 benchmarks/memory.py --device cuda

Every command runs as a whole process, once for each shape and each number of blocks in `--depths`, on models that have random
weights. The peak of memory that the system cannot reclaim (RssAnon; on a GPU the peak that the command prints), without that of the same
command on models of next to no size, which is the runtime, is compared with the line `memory: about`. Every run goes into
`benchmarks/results/memory.csv`; a table of medians is printed, in which what is below the resolution of that difference is
said to be.
"""

import argparse
import csv
import itertools
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import yaml

from benchmarks.contenders import Contender, machine, run_once
from benchmarks.shapes import ROOT, SHAPES, build_pair, rows_files
from utils.guidance.method import guidance_methods

RESULTS = ROOT / "benchmarks" / "results" / "memory.csv"
COLUMNS = ("device", "command", "method", "shape", "blocks", "estimate_mb", "peak_mb", "runtime_mb", "ratio", "machine")
# no tensor of it fills a buffer of a merge in pieces
NARROW = SHAPES["llama-78m"] | {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2,
                 "vocab_size": 8192, "num_hidden_layers": 2}  # fmt: skip
MERGE_METHODS = (
    "linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della",
    "della_linear", "model_stock", "nuslerp", "sce", "karcher", "multislerp", "nearswap", "ram", "arcee_fusion",
    "saliency_budget", "gram_mean",
)  # fmt: skip
OF_EACH = {
    **{name: {} for name in ("slerp", "model_stock", "sce", "karcher", "nearswap", "ram", "arcee_fusion")},
    **{name: {"weight": 0.5} for name in ("linear", "task_arithmetic", "nuslerp", "multislerp")},
}
OF_ALL = {"slerp": {"t": 0.5}, "sce": {"select_topk": 0.5}, "nearswap": {"t": 0.5}}
OF_TWO = ("slerp", "nearswap", "arcee_fusion")  # of the base and another model
SAMPLES = 6
FREE = dict.fromkeys(
    ("gram_mean", "saliency_budget", "sens_merging", "submodule_linearity"), ("--accept_useless_text",)
) | {"tuned": ("--accept_useless_text", "--tune_steps", "2")}
RESOLUTION = 5  # MB: what two runs of one process can differ by (pages of stacks, of small pieces that were freed)
_ABOUT = re.compile(r"memory: about ([\d.]+) (MB|GB|kB)")
_GPU_PEAK = re.compile(r"peak GPU memory ([\d.]+) (MB|GB|kB)")
_SCALE = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


def measuring(method: str, places: dict[str, Path], folder: Path, device: str) -> tuple[str, ...]:
    """The command line of command 1 for one guidance."""
    models = [{"name": str(place), "type": name} for name, place in places.items()]
    text = {"name": "gsm8k", "path": str(rows_files(None)["gsm8k"])}
    config = {"model_info": models, "base_model_type": "base", "dataset": text, "nsamples": SAMPLES}
    (folder / "pair.yaml").write_text(yaml.safe_dump(config))
    words = ("--config", str(folder / "pair.yaml"), "--out_dir", str(folder / "out"), "--guidance", method)
    return (sys.executable, str(ROOT / "lewis_importance.py"), *words, "--devices", device, *FREE.get(method, ()))


def merging(method: str, places: dict[str, Path], folder: Path, device: str) -> tuple[str, ...]:
    """The command line of command 3 for one merge method."""
    if method in guidance_methods():
        return _guided(method, places, folder, device)
    base, *experts = (str(place) for place in places.values())
    own, shared = OF_EACH.get(method, {"weight": 0.5, "density": 0.5}), OF_ALL.get(method, {})
    listed = [base, experts[0]] if method in OF_TWO else experts
    models = [{"model": one, **({"parameters": own} if own else {})} for one in listed]
    recipe = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": models,
        **({"parameters": shared} if shared else {}),
    }
    if method not in ("linear", "karcher"):
        recipe["base_model"] = base
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return _merger(folder / "recipe.yaml", folder, device)


def _guided(method: str, places: dict[str, Path], folder: Path, device: str) -> tuple[str, ...]:
    """The command line of command 3 for the recipe that commands 1 and 2 make, which run here."""
    for name in ("dfs", "recipes"):
        shutil.rmtree(folder / name, ignore_errors=True)
    measure = measuring(method, places, folder, device)
    measure = tuple(str(folder / "dfs") if word == str(folder / "out") else word for word in measure)
    flags = {"config_file": "pair.yaml", "delta_dfs_in_dir": "dfs", "out_dir": "recipes"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(folder / value))]
    decide = (sys.executable, str(ROOT / "lewis_merge.py"), *words, "--guidance", method)
    for command in (measure, decide):
        run_once(Contender(command[1], command, 0))
    (recipe,) = (folder / "recipes").glob("*_merge_config.yaml")
    return _merger(recipe, folder, device)


def _merger(recipe: Path, folder: Path, device: str) -> tuple[str, ...]:
    words = ("--merge_config", str(recipe), "--output_path", str(folder / "out"), "--device", device)
    return (sys.executable, str(ROOT / "utils" / "merger.py"), *words)


def measured(command: tuple[str, ...], folder: Path, device: str) -> tuple[float, float]:
    """(bytes the command says it needs, bytes at its peak)."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    log = folder / "log"
    shell = ("bash", "-c", 'exec "$@" > "$0" 2>&1', str(log), *command)
    try:
        run = run_once(Contender(command[1], shell, 0))
    except RuntimeError as error:
        raise RuntimeError(log.read_text()[-2000:]) from error
    said = log.read_text()
    about, gpu = _ABOUT.search(said), _GPU_PEAK.search(said)
    peak = run.anonymous if device == "cpu" else float(gpu[1]) * _SCALE[gpu[2]]
    return float(about[1]) * _SCALE[about[2]], peak


def rows(
    kind: str, methods: Sequence[str], shapes: Sequence[str], depths: Sequence[int], folder: Path, device: str
) -> Iterator[dict[str, object]]:
    """A row for every method, shape and depth."""
    command = {"measure": measuring, "merge": merging}[kind]
    SHAPES["narrow"] = NARROW
    narrow = build_pair("narrow", folder / "narrow", None)
    here = machine()
    for method in methods:
        _, runtime = measured(command(method, narrow, folder, device), folder, device)
        for shape, blocks in itertools.product(shapes, depths):
            name = f"{shape}-{blocks}"
            SHAPES[name] = SHAPES[shape] | {"num_hidden_layers": blocks}
            places = build_pair(name, folder / name, None)
            about, peak = measured(command(method, places, folder, device), folder, device)
            values = (
                device,
                kind,
                method,
                shape,
                blocks,
                about / 1e6,
                peak / 1e6,
                runtime / 1e6,
                about / (peak - runtime),
            )
            row = dict(zip(COLUMNS, [round(one, 3) if isinstance(one, float) else one for one in values], strict=False))
            print(row, file=sys.stderr, flush=True)
            yield row | {"machine": here}


def table(found: Sequence[dict[str, object]]) -> str:
    """Medians as Markdown."""
    lines = [
        "| device | command | method | shape | blocks | said MB | taken MB | said / taken |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys(map(_key, found)):
        own = [row for row in found if _key(row) == key]
        said, taken = (
            statistics.median(values)
            for values in ([row["estimate_mb"] for row in own], [row["peak_mb"] - row["runtime_mb"] for row in own])
        )
        lines.append(f"| {' | '.join(map(str, key))} | {said:.0f} | {' | '.join(_figures(said, taken))} |")
    return "\n".join(lines)


def _figures(said: float, taken: float) -> tuple[str, str]:
    """What was taken and the ratio; where both are below what can be told apart from nothing, that."""
    if max(said, taken) < RESOLUTION:
        return f"under {RESOLUTION}", ""
    return f"{taken:.0f}", f"{said / taken:.2f}"


def _listed(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _key(row: dict[str, object]) -> tuple[object, ...]:
    return row["device"], row["command"], row["method"], row["shape"], row["blocks"]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidance", default=",".join(guidance_methods()), help="methods, separated by commas")
    parser.add_argument("--merge_methods", default=",".join(MERGE_METHODS), help="methods, separated by commas")
    parser.add_argument("--depths", default="4", help="numbers of blocks, separated by commas")
    parser.add_argument("--shapes", default="llama-78m", help=f"widths, separated by commas: {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:n")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder in which the models stay; without it a temporary one")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the file that every run is added to")
    args = parser.parse_args()
    depths, found = [int(one) for one in args.depths.split(",")], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work or temporary
        for kind, names in (("measure", args.guidance), ("merge", args.merge_methods)):
            for _ in range(args.runs):
                for row in rows(kind, _listed(names), _listed(args.shapes), depths, Path(folder), args.device):
                    found.append(row)
                    new = not args.results.exists()
                    with open(args.results, "a", newline="") as file:
                        writer = csv.DictWriter(file, COLUMNS)
                        writer.writerows([dict(zip(COLUMNS, COLUMNS, strict=True))] * new + [row])
    print(table(found))


if __name__ == "__main__":
    main()

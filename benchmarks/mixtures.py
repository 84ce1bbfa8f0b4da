"""What measuring and merging a mixture of experts costs, against the dense model of the same active parameters.

    python3 benchmarks/mixtures.py
    python3 benchmarks/mixtures.py --blocks 4,8,14 --runs 3 --data FOLDER
    python3 benchmarks/mixtures.py --device cuda --blocks 4,8,14
    python3 benchmarks/mixtures.py --blocks 2,3,4 --hidden 64 --experts 4 --expert_width 32 --results FILE

For each number of blocks makes a pair of Qwen3-MoE models (`--experts` experts a block, of which each token is given
`--active`) and a pair of Qwen3 models whose MLP is as wide as those active experts together; random weights in bfloat16,
experts stored apart as they are released, 1.1 B parameters with 14 blocks. Measures them with lewis, one model at a time, and
merges two experts by `ties` with a density for every matrix; whole processes in turn, `--runs` times, with the weights in the page cache. Every run goes into `benchmarks/results/mixtures.csv`. Printed, and
by `benchmarks/report.py` too: what each costs, how time grows with the bytes that are read, and how memory stands to the bytes of
one block.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import yaml

from benchmarks import merging
from benchmarks.contenders import Contender, Run, alternate, machine, write_csv
from benchmarks.growth import ENOUGH, fit
from benchmarks.measuring import read_weights
from benchmarks.shapes import ROOT, SHAPES, build_pair, parameter_count, rows_files
from utils.models.headers import read_headers

RESULTS = ROOT / "benchmarks" / "results" / "mixtures.csv"
FIGURES = ["seconds", "job_seconds", "anonymous", "gpu"]
MIXTURE, DENSE = "mixture", "dense"
HEADING = ("work", "model", "blocks", "M parameters", "GB read", "GB a block", "job s", "process s", "unreclaimable MB", "GPU MB")  # fmt: skip


def shape(kind: str, blocks: int, hidden: int, experts: int, active: int, width: int) -> dict[str, object]:
    """The config of a mixture, or of the dense model whose MLP has as many parameters as a token's experts."""
    heads = max(1, hidden // 64)
    common = {
        "hidden_size": hidden, "num_hidden_layers": blocks, "num_attention_heads": heads, "vocab_size": 32000,
        "num_key_value_heads": max(1, heads // 4), "head_dim": 64, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "intermediate_size": active * width,
    }  # fmt: skip
    if kind == DENSE:
        return {"model_type": "qwen3", **common}
    own = {"num_experts": experts, "num_experts_per_tok": active, "moe_intermediate_size": width}
    return {"model_type": "qwen3_moe", **common, **own, "norm_topk_prob": True, "decoder_sparse_step": 1}


def measuring(places: dict[str, Path], nsamples: int, rows: Path, device: str) -> Contender:
    """Command 1 on base and one expert, one model at a time."""
    models = [{"name": str(places["base"]), "type": "base"}, {"name": str(places["one"]), "type": "one"}]
    folder = places["base"].parent
    config = folder / "pair.yaml"
    config.write_text(
        yaml.safe_dump({"model_info": models, "dataset": {"name": "gsm8k", "path": str(rows)}, "nsamples": nsamples})
    )
    options = ("--config", str(config), "--out_dir", str(folder / "dfs"), "--overwrite", "--devices", device)
    return Contender("measure", (sys.executable, str(ROOT / "lewis_importance.py"), *options), _bytes(places, "one"))


def merging_both(places: dict[str, Path], device: str) -> Contender:
    """Command 3 on base and two experts."""
    folder = places["base"].parent
    recipe = merging.write_recipe(places, folder / "recipe.yaml", "ties", "bfloat16")
    weights = [file for place in places.values() for file in sorted(place.glob("*.safetensors"))]
    command = merging.contender("ours", recipe, folder / "merged", weights, device).command
    return Contender("merge", command, _bytes(places, "one", "two"))


def _bytes(places: dict[str, Path], *experts: str) -> int:
    return sum(file.stat().st_size for name in ("base", *experts) for file in places[name].glob("*.safetensors"))


def block_bytes(place: Path) -> int:
    """Stored bytes of the largest block of a model folder."""
    sizes: dict[str, int] = {}
    for name, header in read_headers(place, place.name).items():
        if ".layers." in name:
            layer = name.partition(".layers.")[2].partition(".")[0]
            sizes[layer] = sizes.get(layer, 0) + header.nbytes
    return max(sizes.values())


def medians(frame: pd.DataFrame) -> pd.DataFrame:
    """Medians of the figures of each work on each model."""
    keys = ["machine", "device", "nsamples", "contender", "model", "blocks", "params", "bytes_read", "block_bytes"]
    return frame.groupby(keys, sort=False)[FIGURES].median().reset_index()


def summary(frame: pd.DataFrame) -> Iterator[str]:
    """What the runs cost, as Markdown: a table for each machine and device, and what grows with what."""
    for (where, device, nsamples), table in medians(frame).groupby(["machine", "device", "nsamples"], sort=False):
        yield f"\nMixtures of experts on {where}, device {device}, {nsamples} samples:\n"
        yield "| " + " | ".join(HEADING) + " |"
        yield "|" + "---|" * len(HEADING)
        for row in table.itertuples():
            sizes = (f"{row.params / 1e6:.0f}", f"{row.bytes_read / 1e9:.2f}", f"{row.block_bytes / 1e9:.3f}")
            times = (f"{row.job_seconds:.1f}", f"{row.seconds:.1f}")
            memory = (f"{row.anonymous / 1e6:.0f}", f"{row.gpu / 1e6:.0f}")
            yield f"| {' | '.join((row.contender, row.model, str(row.blocks), *sizes, *times, *memory))} |"
        yield ""
        yield from _growth(table, "gpu" if table["gpu"].any() else "anonymous")


def _growth(table: pd.DataFrame, held: str) -> Iterator[str]:
    for (work, model), rows in table.groupby(["contender", "model"], sort=False):
        rows = rows.sort_values("blocks")
        if rows["blocks"].nunique() < ENOUGH:
            continue
        time = fit(list(rows["bytes_read"].astype(float)), list(rows["job_seconds"].astype(float)))
        first, last = rows[held].iloc[0] / 1e6, rows[held].iloc[-1] / 1e6
        yield (
            f"- {work}, {model}: {time.sentence('GB read', 1e9)}; {first:.0f} MB with {rows['blocks'].iloc[0]} blocks, "
            f"{last:.0f} MB with {rows['blocks'].iloc[-1]}."
        )
    deepest = table[table["blocks"] == table["blocks"].max()]
    for work, rows in deepest.groupby("contender", sort=False):
        own = rows.set_index("model")
        if {MIXTURE, DENSE} <= set(own.index):
            more, block = own.loc[MIXTURE, held] - own.loc[DENSE, held], own.loc[MIXTURE, "block_bytes"]
            block -= own.loc[DENSE, "block_bytes"]
            yield (
                f"- {work}: the mixture takes {own.loc[MIXTURE, 'job_seconds'] / own.loc[DENSE, 'job_seconds']:.1f} times as "
                f"long as the dense model, of {own.loc[MIXTURE, 'bytes_read'] / own.loc[DENSE, 'bytes_read']:.1f} times the "
                f"bytes, and {more / 1e6:.0f} MB more, {more / block:.1f} times what its block is larger on disk."
            )


def run(args: argparse.Namespace, kind: str, blocks: int) -> tuple[Sequence[Run], dict[str, object]]:
    """All runs on one model, and what is the same in them."""
    sizes = (args.hidden, args.experts, args.active, args.expert_width)
    name = f"{kind}-{blocks}-{'x'.join(map(str, sizes))}"
    SHAPES[name] = shape(kind, blocks, *sizes)
    places = build_pair(name, (args.work / name).resolve(), args.data)
    rows = rows_files(args.data)["gsm8k"]
    works = [measuring(places, args.nsamples, rows, args.device), merging_both(places, args.device)]

    def before() -> None:
        shutil.rmtree(places["base"].with_name("merged"), ignore_errors=True)
        read_weights(places)

    runs = alternate(works, args.runs, before, uncounted=args.uncounted)
    before()
    read = {work.name: work.bytes_moved for work in works}
    fixed = {"model": kind, "blocks": blocks, "params": parameter_count(places["base"]), "device": args.device}
    return runs, fixed | {"nsamples": args.nsamples, "block_bytes": block_bytes(places["base"]), "read": read}


def main() -> None:
    """Run both works on both kinds of models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", default="14", help="numbers of blocks, separated by commas")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=32, help="in each block")
    parser.add_argument("--active", type=int, default=2, help="that each token is given")
    parser.add_argument("--expert_width", type=int, default=768)
    parser.add_argument("--nsamples", type=int, default=8)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--uncounted", type=int, default=0, help="rounds before those that count")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="folder with gsm8k and mbpp; else the rows that come with the tests")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "bench", help="where models are made")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    print(f"machine: {machine()}")
    for blocks in map(int, args.blocks.split(",")):
        for kind in (MIXTURE, DENSE):
            runs, columns = run(args, kind, blocks)
            read = columns.pop("read")
            for one in runs:
                write_csv(args.results, [one], **columns, bytes_read=read[one.contender], machine=machine())
    for line in summary(pd.read_csv(args.results)):
        print(line)


if __name__ == "__main__":
    main()

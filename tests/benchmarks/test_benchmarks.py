"""The benchmarks measure what they say: lines through points, what a process tells, tables, and one small real run.

python -m pytest tests/benchmarks/test_benchmarks.py
"""

import csv
import math
import subprocess
import sys

import numpy
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import contenders, cutting, measuring, merging, mixtures, products, reading, report, shapes
from benchmarks.contenders import Run, chosen, growth_lines, read_output, write_csv
from benchmarks.growth import fit
from tests.conftest import ROOT
from utils.runtime import computing_dtype

COSTS = st.floats(0.1, 1e3)
TINY = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
}  # fmt: skip


@given(st.lists(st.integers(1, 10**6), min_size=3, max_size=8, unique=True), st.data())
def test_the_line_is_numpys(xs, data):
    ys = [data.draw(COSTS) for _ in xs]
    line = fit(xs, ys)
    slope, fixed = numpy.polyfit(numpy.array(xs) / max(xs), ys, 1)
    assert line.at(0) == pytest.approx(fixed, abs=1e-4 * max(ys))
    assert line.at(max(xs)) == pytest.approx(fixed + slope, abs=1e-4 * max(ys))
    if numpy.std(ys) > 1e-3 * max(ys):
        assert line.r_squared == pytest.approx(numpy.corrcoef(xs, ys)[0, 1] ** 2, abs=1e-4)


def test_the_same_cost_at_every_size_is_a_line():
    assert (fit([1, 2, 3], [0.1] * 3).r_squared, fit([1, 2, 3], [0.1] * 3).at(9)) == pytest.approx((1, 0.1))


def test_proportional_cost_has_no_fixed_part_and_doubling_steps_do():
    straight, steps = fit([1, 2, 4], [3, 6, 12]), fit([1, 2, 4], [1, 4, 16])
    assert (straight.fixed, straight.slope) == pytest.approx((0, 3))
    assert straight.r_squared == pytest.approx(1) and straight.deviation == pytest.approx(0, abs=1e-9)
    assert steps.fixed < 0 and steps.deviation > 0.5
    assert "3.000 s per GB" in straight.sentence("GB", 1)


@pytest.mark.parametrize("xs", [[1, 2], [1, 1, 2], []])
def test_two_sizes_say_nothing_about_growth(xs):
    with pytest.raises(ValueError, match="at least 3"):
        fit(xs, [1.0] * len(xs))


def test_what_a_process_reports_is_read():
    said = "bfloat16 (its own), 2341 tokens in 2 micro-batches\nmeasured in 3.25 s, peak GPU memory 1.50 GB\nwrote"
    assert read_output("ours", said, 9.0, 7) == Run("ours", 9.0, 3.25, 7, 1_500_000_000, 2341)
    small = "merged in 2.00 s, peak GPU memory 15.5 MB; wrote 0.70 GB to x"
    assert read_output("ours", small, 9.0, 7) == Run("ours", 9.0, 2.0, 7, 15_500_000, 0)
    assert read_output("floor", "", 9.0, 7) == Run("floor", 9.0, 9.0, 7, 0, 0)


def test_our_commands_print_what_is_read(monkeypatch):
    import torch

    from utils import runtime

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2_500_000_000 * (device.index + 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert runtime.peak_gpu_memory(runtime.devices_used("cpu")) == ""
    one, both = runtime.devices_used("cuda:0"), runtime.devices_used("cuda", all_of_them=True)
    assert [
        read_output("ours", f"merged in 1.00 s{runtime.peak_gpu_memory(used)}; wrote", 2, 3).gpu for used in (one, both)
    ] == [
        2_500_000_000,
        5_000_000_000,
    ]


def test_new_columns_leave_older_rows_blank(tmp_path):
    path = tmp_path / "deep" / "runs.csv"
    write_csv(path, [Run("ours", 1, 2, 3, 4, 5)], shape="a")
    write_csv(path, [Run("ours", 6, 7, 8, 9, 10)], shape="b", device="cuda")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["shape"], row["device"], row["seconds"], row["tokens"]) for row in rows] == [
        ("a", "", "1", "5"),
        ("b", "cuda", "6", "10"),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["runs.csv"]


def test_an_unknown_contender_ends_the_program():
    assert chosen("ours,floor", merging.NAMES) == ["ours", "floor"]
    with pytest.raises(SystemExit, match="unknown contender 'our'; known: ours"):
        chosen("ours,our", merging.NAMES)


def test_growth_is_said_for_contenders_with_three_sizes():
    points = [(Run("ours", 0, 2.0 * size + 1, 0, 0), float(size)) for size in (1, 1, 2, 4)]
    points += [(Run("floor", 0, size, 0, 0), float(size)) for size in (1, 2)]
    (line,) = growth_lines(points, "GB", 1)
    assert line.startswith("ours: job 1.00 s + 2.000 s per GB")


def synthetic(folder, device="cpu", gpu=0):
    """Runs of known cost: 1 s + 2 s per 100 M parameters and 0.5 s per thousand tokens; the baseline takes ten times that."""
    machine = "a machine"
    for params, nsamples in ((100e6, 15), (200e6, 15), (400e6, 15), (100e6, 60), (100e6, 240)):
        columns = {"shape": f"s{params / 1e6:.0f}", "params": int(params), "text": "gsm8k", "nsamples": nsamples}
        tokens = nsamples * 200
        cost = 1 + 2 * params / 1e8 + 0.5 * tokens / 1000
        runs = [
            Run("ours", cost + 3, cost, 100e6, gpu, tokens),
            Run("published", cost * 10 + 3, cost * 10, 900e6, gpu, tokens),
        ]
        write_csv(folder / "measuring.csv", runs, **columns, device=device, machine=machine)
    for params in (100e6, 200e6, 400e6):
        columns = {"shape": f"s{params / 1e6:.0f}", "params": int(params), "method": "ties", "dtype": "bfloat16"}
        runs = [Run("ours", params / 1e8 + 3, params / 1e8, 1, gpu), Run("mergekit-yaml", 99, params / 1e7, 1, gpu)]
        runs += [Run("floor", 1, params / 2e8, 1, 0)]
        write_csv(folder / "merging.csv", runs, **columns, device=device, cache="warm", machine=machine)


@pytest.mark.parametrize(("device", "gpu"), [("cpu", 0), ("cuda", 3e9)])
def test_the_report_says_what_the_runs_cost(tmp_path, device, gpu):
    synthetic(tmp_path, device, gpu)
    said = []
    written = report.report(tmp_path, said.append)
    tail = "" if device == "cpu" else "_cuda"
    assert [path.name for path in written] == ["summary.md", f"cost_by_size{tail}.png", f"cost_by_samples{tail}.png"]
    assert all(path.stat().st_size > 0 for path in written)
    text = (tmp_path / "summary.md").read_text()
    assert text.strip() == "\n".join(said).strip()
    assert "measuring a pair, 15 gsm8k samples: ours: 2.50 s + 2.000 s per 100 M parameters (R² 1.0000" in text
    assert "measuring a pair, 100 M, gsm8k: ours: 3.00 s + 0.500 s per 1000 tokens (R² 1.0000" in text
    assert "merging two experts, ties, cache warm: ours: 0.00 s + 1.000 s per 100 M parameters" in text
    row = next(line for line in text.splitlines() if "measuring a pair, 400 M, 15 GSM8K samples" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:7] == ["published procedure, bfloat16", "10.5 / 105.0", "10.0", "13.5 / 108.0", "8.0", "100 / 900"]
    assert (cells[7] == "3000 / 3000") == (device == "cuda")
    floor = next(line for line in text.splitlines() if "merging two experts, 400 M" in line and "writing" in line)
    assert floor.split("|")[3:5] == [" 4.0 / 2.0 ", " 0.5 "]
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == ({9} if device == "cpu" else {10})


def test_a_panel_of_costs_has_the_line_of_the_baseline(tmp_path):
    synthetic(tmp_path)
    for kind, baseline in (("measuring", "published"), ("merging", "mergekit-yaml")):
        table = report.medians(pd.read_csv(tmp_path / f"{kind}.csv"))
        panels = report.with_baselines(kind, table, "params")
        assert panels and all(
            ["ours", baseline] == [rows["contender"].iloc[0] for rows in drawn[:2]] for drawn in panels.values()
        )


def test_runs_on_other_machines_and_work_are_not_compared(tmp_path):
    same = {"shape": "s", "params": 10, "method": "ties", "dtype": "bfloat16", "device": "cpu", "cache": "warm"}
    write_csv(tmp_path / "merging.csv", [Run("ours", 1, 1, 0, 0)], **same, machine="one")
    write_csv(tmp_path / "merging.csv", [Run("mergekit-yaml", 9, 9, 0, 0)], **same, machine="two")
    write_csv(tmp_path / "merging.csv", [Run("floor", 9, 9, 0, 0)], **same | {"cache": "cold"}, machine="one")
    table = report.medians(pd.read_csv(tmp_path / "merging.csv"))
    assert not list(report.compared(table, report.BASELINES["merging"]))


def test_the_report_of_the_results_at_hand(tmp_path):
    for file in (ROOT / "benchmarks" / "results").glob("*.csv"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    written = report.report(tmp_path, lambda line: None)
    assert "job, times faster" in written[0].read_text()


@pytest.mark.parametrize(("script", "place"), [("read_floor.py", "cpu"), ("copy_floor.py", "out")])
def test_floors_move_every_byte(tmp_path, script, place):
    files = [tmp_path / f"{number}.bin" for number in range(3)]
    for number, file in enumerate(files):
        file.write_bytes(bytes([number]) * (9 * 2**20 + number))
    command = [sys.executable, str(ROOT / "benchmarks" / script), place, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert contenders.JOB_SECONDS.search(done.stdout), done.stderr
    if place == "out":
        total = sum(file.stat().st_size for file in files)
        assert (tmp_path / "out" / "model.safetensors").stat().st_size == total // 3


def test_parameters_are_counted_from_the_headers(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    places = shapes.build_pair("tiny", tmp_path, None)
    hidden, wide, rows = 64, 96, 8192
    block = 2 * hidden * hidden + 2 * hidden * hidden // 2 + 3 * hidden * wide + 2 * hidden
    assert {shapes.parameter_count(place) for place in places.values()} == {2 * rows * hidden + hidden + 2 * block}


def mixture_runs(folder):
    """Runs of known cost: 1 s + 2 s per GB that is read; a mixture takes four times its block, a dense model none."""
    for blocks in (2, 4, 8):
        for model, block in (("mixture", 250e6), ("dense", 50e6)):
            read = int(2 * blocks * block)
            columns = {"model": model, "blocks": blocks, "params": read, "device": "cpu", "nsamples": 8}
            columns |= {"block_bytes": int(block), "bytes_read": read, "machine": "a machine"}
            held = 300e6 + 4 * (block - 50e6)
            write_csv(folder / "mixtures.csv", [Run("measure", 9, 1 + 2 * read / 1e9, held, 0)], **columns)


def test_mixtures_are_reported_by_bytes_and_blocks(tmp_path):
    mixture_runs(tmp_path)
    report.report(tmp_path, lambda line: None)
    text = (tmp_path / "summary.md").read_text()
    assert "measure, mixture: 1.00 s + 2.000 s per GB read (R² 1.0000" in text
    assert "1100 MB with 2 blocks, 1100 MB with 8" in text
    assert "of 5.0 times the bytes, and 800 MB more, 4.0 times what its block is larger on disk" in text


def test_a_mixture_and_its_dense_equal_have_the_same_active_parameters():
    sizes = {"blocks": 2, "hidden": 64, "experts": 8, "active": 2, "width": 96}
    mixture, dense = (mixtures.shape(kind, **sizes) for kind in (mixtures.MIXTURE, mixtures.DENSE))
    assert dense["intermediate_size"] == 2 * 96 == mixture["num_experts_per_tok"] * mixture["moe_intermediate_size"]
    assert {name for name in dense if dense[name] != mixture[name]} == {"model_type"}


@pytest.mark.slow
def test_a_mixture_is_measured_and_merged(tmp_path, monkeypatch, capsys):
    sizes = ["--blocks", "2,3,4", "--hidden", "64", "--experts", "4", "--expert_width", "32", "--nsamples", "2"]
    places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "mixtures.csv")]
    monkeypatch.setattr(sys, "argv", ["mixtures.py", *sizes, *places])
    mixtures.main()
    rows = pd.read_csv(tmp_path / "mixtures.csv")
    assert len(rows) == 3 * 2 * 2 and (rows["job_seconds"] < rows["seconds"]).all()
    stored = next((tmp_path / "work").glob("mixture-2-*/base/model.safetensors.index.json")).read_text()
    assert "model.layers.1.mlp.experts.3.gate_proj.weight" in stored
    assert capsys.readouterr().out.count("s per GB read") == 4


@pytest.mark.slow
def test_both_benchmarks_run_and_report(tmp_path, monkeypatch, capsys):
    sizes = {f"tiny-{blocks}": TINY | {"num_hidden_layers": blocks} for blocks in (2, 4, 6)}
    for name, shape in sizes.items():
        monkeypatch.setitem(shapes.SHAPES, name, shape)
    common = ["--shape", ",".join(sizes), "--work", str(tmp_path / "work"), "--runs", "1"]
    flags = [*common, "--results", str(tmp_path / "measuring.csv"), "--contenders", "ours,read-floor"]
    monkeypatch.setattr(sys, "argv", ["measuring.py", *flags, "--text", "gsm8k", "--nsamples", "2"])
    measuring.main()
    flags = [*common, "--results", str(tmp_path / "merging.csv"), "--contenders", "ours,mergekit-yaml,floor"]
    monkeypatch.setattr(sys, "argv", ["merging.py", *flags])
    merging.main()
    printed = capsys.readouterr().out
    assert printed.count("ours: job ") == 2 and "s per 100 M parameters" in printed
    report.report(tmp_path, print)
    assert {path.name for path in tmp_path.glob("*.png")} == {"cost_by_size.png"}
    rows = pd.read_csv(tmp_path / "measuring.csv")
    assert set(rows["contender"]) == {"ours", "read-floor"} and (rows[rows["contender"] == "ours"]["tokens"] > 0).all()


def test_products_in_few_bits_are_compared_with_float32(monkeypatch):
    monkeypatch.setattr(products, "SHAPES", ((4, 8, 8),))
    table = products.measured("cpu", threads=1, repeats=1).set_index("dtype")
    assert table.loc["float32", "of_float32"] == 1 and (table["gflops"] >= 0).all()
    assert table["computed_in"].to_dict() == {
        name: computing_dtype(name, torch.device("cpu")) for name in ("float32", "bfloat16", "float16")
    }


def test_cutting_a_layer_is_timed(tmp_path, monkeypatch):
    words = ("--shapes", "4x8,6x4", "--repeats", "1", "--threads", str(torch.get_num_threads()))
    monkeypatch.setattr("sys.argv", ["cutting.py", *words, "--out", str(tmp_path / "cutting.csv")])
    cutting.main()
    table = pd.read_csv(tmp_path / "cutting.csv")
    assert table["outputs"].tolist() == [4, 6] and table["inputs"].tolist() == [8, 4]
    assert (table[["search_ns_entry", "fit_ns_entry"]] > 0).all(axis=None)


@pytest.mark.parametrize("count", [reading.FEWEST, 9, 21, 25, 41])
def test_the_interval_of_a_median_is_the_shortest_that_holds_it_with_95_percent(count):
    """Every way in which `count` ratios can lie about their median, one more or less on either side, is counted."""
    left_out = reading.beyond(count)
    ways = [math.comb(count, below) for below in range(count + 1)]  # so many of them lie below the median

    def covered(outside: int) -> float:
        return sum(ways[below] for below in range(count + 1) if outside < below < count - outside) / 2**count

    assert covered(left_out) >= 0.95 > covered(left_out + 1)


def test_of_few_ratios_there_is_no_such_interval():
    with pytest.raises(ValueError, match="too few"):
        reading.beyond(reading.FEWEST - 1)
    pairs = [(float(place), 1.0) for place in range(1, 10)]
    assert "5.000 (2.000 to 8.000, 9 pairs)" in reading.summary(pairs)

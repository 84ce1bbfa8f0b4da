"""Run whole commands in turn, several times, and keep what each cost: time, unreclaimable memory, bytes moved."""

import csv
import os
import re
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from benchmarks.growth import ENOUGH, fit


@dataclass(frozen=True)
class Contender:
    """A command line to time. `bytes_moved` is what it cannot avoid reading and writing, once each."""

    name: str
    command: tuple[str, ...]
    bytes_moved: int


@dataclass(frozen=True)
class Run:
    """One finished run: whole-process seconds, the job's own seconds (start-up apart), peak memory in bytes.

    `anonymous` is the peak of memory that the system could not reclaim (resident pages that no file backs; what a GPU's
    driver pins is not in it); `gpu` what the process itself reports as its peak on the GPU, 0 without one; `tokens` how
    many it says each model computed, 0 if that is not its work; `processor` the seconds that processors spent on it and
    on what it started, which others on the machine make longer far less than time by the clock.
    """

    contender: str
    seconds: float
    job_seconds: float
    anonymous: int
    gpu: int
    tokens: int = 0
    processor: float = 0


JOB_SECONDS = re.compile(r"(?:measured|merged) in ([\d.]+) s")
_TOKENS = re.compile(r"(\d+) tokens in ")
_GPU = re.compile(r"peak GPU memory ([\d.]+) (MB|GB)")


def chosen(names: str, known: Sequence[str]) -> list[str]:
    """Contenders by name, separated by commas; ends the program if one is unknown."""
    found = names.split(",")
    if unknown := [name for name in found if name not in known]:
        raise SystemExit(f"unknown contender {unknown[0]!r}; known: {', '.join(known)}")
    return found


def run_once(contender: Contender) -> Run:
    """Run a contender as a whole process; raises with its output if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen(contender.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, before = [0], _spent_by_children()
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    seconds = time.perf_counter() - start
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{contender.name} failed:\n{output[-3000:]}")
    return replace(read_output(contender.name, output, seconds, peak[0]), processor=_spent_by_children() - before)


def read_output(name: str, output: str, seconds: float, anonymous: int) -> Run:
    """What a process says of itself, beside what was seen from outside."""
    job, gpu, tokens = JOB_SECONDS.search(output), _GPU.search(output), _TOKENS.search(output)
    held = float(gpu[1]) * (1e9 if gpu[2] == "GB" else 1e6) if gpu else 0
    return Run(
        name, seconds, float(job[1]) if job else seconds, anonymous, round(held), int(tokens[1]) if tokens else 0
    )


def alternate(
    contenders: Sequence[Contender], runs: int, before: Callable[[], None] = lambda: None, *, uncounted: int = 1
) -> list[Run]:
    """Run all contenders in turn, `runs` times, after `uncounted` rounds; `before` is called before every run."""
    for contender in [*contenders] * uncounted:
        before()
        run_once(contender)
    done = []
    for number in range(runs):
        for contender in contenders:
            before()
            done.append(run_once(contender))
            print(f"  run {number + 1}/{runs} {contender.name}: {done[-1].seconds:.1f} s", file=sys.stderr)
    return done


def table(contenders: Sequence[Contender], runs: Sequence[Run], baseline: str) -> str:
    """Medians per contender and how many times faster than the baseline, as Markdown."""
    medians = {name: _medians([run for run in runs if run.contender == name]) for name in {r.contender for r in runs}}
    lines = [
        "| contender | process s | job s | processor s | job: baseline / this | process: baseline / this | "
        "processor: baseline / this | unreclaimable MB | GPU MB | moved GB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    base = medians[baseline]
    for contender in contenders:
        m = medians[contender.name]
        lines.append(
            f"| {contender.name} | {m.seconds:.2f} | {m.job_seconds:.2f} | {m.processor:.2f} | "
            f"{base.job_seconds / m.job_seconds:.2f} | {base.seconds / m.seconds:.2f} | "
            f"{base.processor / m.processor:.2f} | {m.anonymous / 1e6:.0f} | {m.gpu / 1e6:.0f} | "
            f"{contender.bytes_moved / 1e9:.2f} |"
        )
    return "\n".join(lines)


def write_csv(path: Path, runs: Sequence[Run], **columns: object) -> None:
    """Add every run, with further constant columns (shape, machine ...), to a CSV file; older rows keep blanks in columns
    that are new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    if path.exists():
        with open(path, newline="") as file:
            rows += csv.DictReader(file)
    rows += [{**columns, **asdict(run)} for run in runs]
    names = dict.fromkeys([*columns, *(field.name for field in fields(Run)), *(name for row in rows for name in row)])
    unfinished = path.with_name(f".{path.name}.part")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, list(names), restval="")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(unfinished, path)


def growth_lines(points: Sequence[tuple[Run, float]], unit: str, per: float) -> list[str]:
    """A sentence per contender on how its job grows with a size, where there are three sizes or more."""
    by_size: dict[str, dict[float, list[float]]] = {}
    for run, size in points:
        by_size.setdefault(run.contender, {}).setdefault(size, []).append(run.job_seconds)
    lines = []
    for name, sizes in by_size.items():
        if len(sizes) >= ENOUGH:
            line = fit(list(sizes), [statistics.median(seconds) for seconds in sizes.values()])
            lines.append(f"{name}: job {line.sentence(unit, per)}")
    return lines


def machine() -> str:
    """The machine in a few words: processor, cores, memory, GPU if torch sees one."""
    import torch

    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB{gpu}, torch {torch.__version__}"


def _medians(runs: Sequence[Run]) -> Run:
    return Run(
        runs[0].contender,
        *(
            statistics.median(getattr(run, name) for run in runs)
            for name in ("seconds", "job_seconds", "anonymous", "gpu", "tokens", "processor")
        ),
    )


def _spent_by_children() -> float:
    """Processor seconds of the processes that were started here and have ended, and of theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    """Keep the most of resident pages that no file backs and nobody shares."""
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        try:
            resident, shared = map(int, Path(f"/proc/{process.pid}/statm").read_text().split()[1:3])
        except (OSError, ValueError):  # it has ended
            return
        peak[0] = max(peak[0], (resident - shared) * page)
        time.sleep(0.003)

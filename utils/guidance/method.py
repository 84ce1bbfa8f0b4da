"""What a guidance method is, and which there are: every package in `utils/guidance/` whose `method.py` defines `METHOD`.

A method has two halves. The *measure* half turns models and text into tables (command 1), the *decide* half turns the
tables into a density or a weight for each tensor (command 2). `method.py` only says what the method is called, which
flags it has and which files it writes, and is light to import; `measure.py` (torch) and `decide.py` (numpy, pandas)
beside it are imported when their command comes to them.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from utils import guidance
from utils.errors import UserError
from utils.recipes.method_rules import DeltaMethod

if TYPE_CHECKING:
    from utils.guidance.decide_job import DecideJob, Decision
    from utils.guidance.measure_job import Measured, MeasureJob
    from utils.pair.config import PairConfig

DEFAULT = "lewis"
Half = Literal["measure", "decide"]


@dataclass(frozen=True)
class MethodFlag:
    """A flag that belongs to one method. `default` is what holds if it is not given; `switch` makes it a boolean."""

    name: str
    help: str
    type: Callable[[str], Any] | None = None
    choices: tuple[str, ...] | None = None
    default: Any = None
    switch: bool = False


@dataclass(frozen=True)
class GuidanceMethod:
    """One way to guide a merge.

    Attributes:
        name: what `--guidance` calls it.
        package: the package of its halves: `<package>.measure` has `choices(job)`, `memory(job)` and `measure(job)`,
            `<package>.decide` has `decide(job)`.
        summary: a line for people.
        gives: what its *decide* half sets per tensor.
        merge_method: the usual one.
        tables: names of the files that its *measure* half writes, the manifest and those of each expert aside.
        expert_file: the name of the file that it writes for each expert, by the expert's type.
        measure_flags, decide_flags: the flags of each half.
        fewest_experts: how many are needed.
        text_per_task: whether each expert should be measured on text of its own.
        config_keys: keys of the pair config that this method uses and others do not.
        own_merge_methods: this project's merge methods (`utils/recipes/method_rules.py`) that `--merge_method` may name
            beside mergekit's.
        merge_rule: turns the merge method asked for, and the values of the method's own flags, into the one that the
            recipe names.
        tasks: what a task is on a cluster, and why no less, unless `choices` says it.
        file_flags: names of its *measure* flags whose values are files that it reads.
        searched: whether a search that names no guidance measures by it.
        several: the merge method to suggest where there are several experts, if it is not `merge_method`.
        refines: merge methods (of `utils/recipes/method_rules.py`) whose recipes of several experts it gains from when it
            starts at them, by the first of its `file_flags` or by `start` (benchmarks/quality.py).
        density_alone: the `--mean_density` to suggest where there is one expert, and of `best` for it; None: none.
        measured_for: reads from a dataframe folder the one merge method that it was measured for, where there is one; raises
            a `UserError` if it cannot.
        in_float32: whether it computes in float32 whatever `--dtype` says.
        models_at_once: of how many models a block is in memory at a time, by how many experts there are.
        authors_samples: how many samples of a text the method's authors measured on; 0 where nobody else uses it.
    """

    name: str
    package: str
    summary: str
    gives: Literal["densities", "weights"]
    merge_method: str
    tables: tuple[str, ...]
    expert_file: Callable[[str], str] | None = None
    measure_flags: tuple[MethodFlag, ...] = ()
    decide_flags: tuple[MethodFlag, ...] = ()
    fewest_experts: int = 1
    text_per_task: bool = False
    config_keys: tuple[str, ...] = ()
    own_merge_methods: tuple[str, ...] = ()
    file_flags: tuple[str, ...] = ()
    merge_rule: Callable[[DeltaMethod, Mapping[str, Any]], DeltaMethod] = lambda asked, options: asked
    several: str = ""
    refines: tuple[str, ...] = ()
    density_alone: float | None = None
    measured_for: Callable[[Path], str] | None = None
    authors_samples: int = 0
    tasks: str = ""
    searched: bool = True
    in_float32: bool = False
    models_at_once: Callable[[int], int] = lambda experts: 1

    def files(self, config: "PairConfig") -> tuple[str, ...]:
        """The names of all files that measuring writes, the manifest aside."""
        own = () if self.expert_file is None else tuple(self.expert_file(entry.type) for entry in config.experts)
        return (*own, *self.tables)

    def check(self, job: "MeasureJob") -> None:
        """Refuse what is known of a job before anything is computed. Raises a `UserError`."""
        half = self._half("measure")
        if hasattr(half, "check"):
            half.check(job)

    def depends_on(self, job: "MeasureJob") -> dict[str, Any]:
        """What the measurement depends on beside the models, their text and the config's options, as plain data."""
        half = self._half("measure")
        return half.depends_on(job) if hasattr(half, "depends_on") else {}

    def choices(self, job: "MeasureJob") -> list[str]:
        """Lines that say how a job will be measured."""
        return self._half("measure").choices(job)

    def memory(self, job: "MeasureJob") -> int:
        """Bytes that measuring needs on one device at its peak, beside the runtime, about; for one piece of work."""
        return self._half("measure").memory(job)

    def waiting(self, job: "MeasureJob") -> int:
        """Bytes of hidden states that wait for the way back outside of that memory, at most; of all that is done at a time."""
        half = self._half("measure")
        return half.waiting(job) if hasattr(half, "waiting") else 0

    def on_disk(self, job: "MeasureJob") -> int:
        """Bytes that measuring puts into the output folder, at most, what a run after a kill goes on from included."""
        half = self._half("measure")
        return half.on_disk(job) if hasattr(half, "on_disk") else 0

    def left_on_disk(self, job: "MeasureJob") -> int:
        """Bytes of those that stay until what was measured is published."""
        half = self._half("measure")
        return half.left_on_disk(job) if hasattr(half, "left_on_disk") else 0

    def measure(self, job: "MeasureJob") -> "Measured":
        """Measure a pair."""
        return self._half("measure").measure(job)

    def decide(self, job: "DecideJob") -> "Decision":
        """Decide on densities or weights."""
        return self._half("decide").decide(job)

    def _half(self, half: Half) -> ModuleType:
        """The one late import of a method's halves: torch, numpy and pandas come with them."""
        return importlib.import_module(f"{self.package}.{half}")

    def flags(self, half: Half) -> tuple[MethodFlag, ...]:
        """The flags of one half."""
        return self.measure_flags if half == "measure" else self.decide_flags

    def few_samples(self, count: int | None) -> str:
        """A sentence if fewer samples of a text are measured on than the method's authors took; else ""."""
        if count is None or count >= self.authors_samples:
            return ""
        return f"nsamples {count}; the authors of {self.name} measure on {self.authors_samples}"

    def check_experts(self, config: "PairConfig", count: int) -> None:
        """Raise a `UserError` if the method needs more experts."""
        if count < self.fewest_experts:
            raise UserError(
                f"--guidance {self.name} weighs experts against each other and needs at least {self.fewest_experts}; "
                f"pair config {config.path} has {count} to merge",
                "guidance-few-experts",
            )


@cache
def guidance_methods() -> dict[str, GuidanceMethod]:
    """Every method by name, the default first."""
    found = {}
    for entry in pkgutil.iter_modules(guidance.__path__):
        if entry.ispkg:
            method = importlib.import_module(f"{guidance.__name__}.{entry.name}.method").METHOD
            found[method.name] = method
    return {DEFAULT: found.pop(DEFAULT), **found}

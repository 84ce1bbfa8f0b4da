"""The text of the offline example: what every Python carries, and generated arithmetic.

Code comes from the source files of the running interpreter's standard library, prose from their docstrings,
arithmetic from `demo.arithmetic`. Nothing is downloaded. The same interpreter and seed give the same text.
"""

import ast
import os
import random
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from demo.arithmetic import arithmetic_rows
from utils.errors import UserError

# Tests, bundled third-party wheels, tables of characters and text that is not Python.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "encodings",
    "_bundled",
    "pydoc_data",
    "turtledemo",
}
CHARACTERS = (120, 800)
# One file in this many gives held-out code, another one calibration code, the others training text.
FILES_PER_SPLIT = 10
# Few rows of one file, so that no author's style fills a part; prose is scarcer than code.
CODE_PER_FILE = 6
PROSE_PER_FILE = 20


@dataclass(frozen=True)
class Sizes:
    """How many rows each part holds. A row is one function, one docstring or one group of arithmetic problems."""

    base_prose: int = 1200
    base_code: int = 150
    base_math: int = 100
    train: int = 700
    calibration: int = 32
    heldout: int = 144


@dataclass(frozen=True)
class Split:
    """One kind of text in three parts that share no row (code: no source file either)."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    heldout: tuple[str, ...]


@dataclass(frozen=True)
class Texts:
    """Everything the example reads: the base model's mixture and the two skills."""

    base: tuple[str, ...]
    code: Split
    math: Split


def build_texts(sizes: Sizes = Sizes(), seed: int = 0, library: Path | None = None) -> Texts:
    """Collect and generate all text.

    Args:
        sizes: rows of each part.
        seed: decides which files and rows go where, and every number of the arithmetic.
        library: folder with Python sources; the running interpreter's standard library if not given.

    Raises:
        UserError: the library holds too little source text (a stripped Python installation).
    """
    library = library or Path(sysconfig.get_path("stdlib"))
    rng = random.Random(seed)
    paths = sorted(_sources(library))
    rng.shuffle(paths)
    training = [path for index, path in enumerate(paths) if index % FILES_PER_SPLIT > 1]

    # The order matters for rows that several files share: the held-out part is filled first and keeps them.
    pool = _Pool(rng, library)
    code_heldout = pool.take(code_chunks, CODE_PER_FILE, paths[0::FILES_PER_SPLIT], sizes.heldout)
    code_calibration = pool.take(code_chunks, CODE_PER_FILE, paths[1::FILES_PER_SPLIT], sizes.calibration)
    code_training = pool.take(code_chunks, CODE_PER_FILE, training, sizes.base_code + sizes.train)
    prose = pool.take(prose_chunks, PROSE_PER_FILE, training[::-1], sizes.base_prose)

    arithmetic = iter(arithmetic_rows(sizes.heldout + sizes.calibration + sizes.train + sizes.base_math, seed))
    base = [*prose, *code_training[: sizes.base_code], *islice(arithmetic, sizes.base_math)]
    rng.shuffle(base)
    texts = Texts(
        base=tuple(base),
        code=Split(code_training[sizes.base_code :], code_calibration, code_heldout),
        math=Split(
            train=tuple(islice(arithmetic, sizes.train)),
            calibration=tuple(islice(arithmetic, sizes.calibration)),
            heldout=tuple(islice(arithmetic, sizes.heldout)),
        ),
    )
    assert_disjoint(texts)
    return texts


def _sources(library: Path) -> Iterator[Path]:
    """The Python files in a folder, those in skipped folders left out: packages that users installed are thousands."""
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def assert_disjoint(texts: Texts) -> None:
    """Raise `AssertionError` if a row occurs twice, in one part or in two."""
    parts = (
        texts.base,
        *(part for split in (texts.code, texts.math) for part in (split.train, split.calibration, split.heldout)),
    )
    rows = [row for part in parts for row in part]
    if len(set(rows)) != len(rows):
        raise AssertionError("a row of the example's text occurs twice")


def code_chunks(source: str) -> list[str]:
    """Functions and small classes of a source text, dedented, in its order; a large class gives its methods."""
    lines = source.splitlines()
    chunks = []

    def visit(nodes: Sequence[ast.stmt]) -> None:
        for node in nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            chunk = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])) + "\n"
            if CHARACTERS[0] <= len(chunk) <= CHARACTERS[1]:
                chunks.append(chunk)
            elif isinstance(node, ast.ClassDef):
                visit(node.body)

    visit(ast.parse(source).body)
    return chunks


def prose_chunks(source: str) -> list[str]:
    """Docstrings of a source text that read as prose: neither a single line nor a console session."""
    chunks = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= CHARACTERS[0] and ">>>" not in text:
                chunks.append(text[: CHARACTERS[1]] + "\n")
    return chunks


class _Pool:
    """Draws rows from source files without ever giving one twice; remembers what it gave."""

    def __init__(self, rng: random.Random, library: Path) -> None:
        self._rng = rng
        self._library = library
        self._given: set[str] = set()

    def take(
        self, chunks_of: Callable[[str], list[str]], per_file: int, paths: Sequence[Path], count: int
    ) -> tuple[str, ...]:
        """Return `count` new rows; reads no more files than it needs.

        At most `per_file` rows of each file, and as many again where all files together give too few: Debian's Python
        has fewer files than others.
        """
        drawn: list[str] = []
        found = -1
        while found < len(drawn) < count:
            found = len(drawn)
            for path in paths:
                if len(drawn) >= count:
                    break
                try:
                    chunks = chunks_of(path.read_text(encoding="utf-8"))
                except (
                    UnicodeDecodeError,
                    SyntaxError,
                    ValueError,
                ):  # samples in other encodings or for other versions
                    continue
                fresh = [chunk for chunk in dict.fromkeys(chunks) if chunk not in self._given]
                fresh = self._rng.sample(fresh, min(per_file, len(fresh), count - len(drawn)))
                self._given.update(fresh)
                drawn += fresh
        if len(drawn) < count:
            raise UserError(
                f"{self._library} holds too little Python source for the example: {count} rows are needed, "
                f"{len(drawn)} found. Use a complete Python installation (its standard library as .py files).",
                "demo-too-little-text",
            )
        return tuple(drawn)

"""Train the three small models of the offline example: a base, a code expert and an arithmetic expert.

Run from the repository root (a minute and a half on two CPU cores; no network):

    python3 -m demo.train
    python3 -m demo.train --fast --out output/demo_fast    # a few steps: models that know nothing, in seconds

Writes `models/{base,code,math}` (bfloat16 safetensors with the tokenizer) and `data/*.jsonl` (column `text`) under
`--out`. Folders that are there already with the same settings are kept; folders that something else wrote or changed
are never touched.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import platform
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.small_model import Shape, fit, new_model, train_tokenizer, windows
from demo.texts import Sizes, Split, Texts, build_texts
from utils.errors import UserError, run_command
from utils.flags import FlagParser
from utils.publishing.manifest import file_sha256, to_json
from utils.publishing.staging import foreign_entries, staged_folder, stamp

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

FOLDERS = ("data", "models/base", "models/code", "models/math")
MANIFEST = "demo_manifest.json"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the models, apart from the versions of the packages."""

    sizes: Sizes
    shape: Shape
    seed: int = 0
    window: int = 128
    batch: int = 4
    base_steps: int = 340
    expert_steps: int = 130
    base_rate: float = 3e-3
    expert_rate: float = 8e-4
    # Rows of the base's mixture an expert sees again, per row of its own. Without them models this small forget the
    # other skill so thoroughly that every merge of the two is worse than the base.
    replay: float = 0.7


FULL = Settings(Sizes(), Shape())
FAST = Settings(
    Sizes(base_prose=60, base_code=10, base_math=10, train=40, calibration=32, heldout=8),
    Shape(vocabulary=512, hidden=32, intermediate=64, blocks=2, heads=2),
    window=64,
    batch=2,
    base_steps=4,
    expert_steps=3,
)


def train_models(settings: Settings, texts: Texts, out: Path) -> None:
    """Train the tokenizer and the base, then both experts side by side; publish each model folder once it is complete.

    An expert starts from the base as it was saved, in bfloat16, as an expert of a published base does.
    """
    one_thread()
    tokenizer = train_tokenizer([*texts.base, *texts.code.train, *texts.math.train], settings.shape.vocabulary)
    model = new_model(settings.shape, tokenizer, settings.seed)
    size = f"{model.num_parameters() / 1e6:.1f} M parameters, {settings.shape.blocks} blocks"
    print(f"a Llama of {size}, trained in float32, one thread a model", flush=True)
    train(model, tokenizer, "base", texts.base, settings.base_steps, settings.base_rate, settings, out)
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=one_thread) as processes:
        experts = [
            processes.submit(train_expert, name, [*split.train, *_replayed(settings, texts, split)], settings, out)
            for name, split in (("code", texts.code), ("math", texts.math))
        ]
    for expert in experts:
        expert.result()


def _replayed(settings: Settings, texts: Texts, split: Split) -> list[str]:
    return texts.base[: round(settings.replay * len(split.train))]


def one_thread() -> None:
    """Compute on one thread from now on, without bars: regions this short cost more on two threads than on one."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()  # a bar of one shard per model says nothing


def train_expert(name: str, rows: Sequence[str], settings: Settings, out: Path) -> None:
    """Train one expert from the base in `out`, and publish its folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = out / "models" / "base"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train(model, tokenizer, name, rows, settings.expert_steps, settings.expert_rate, settings, out)


def train(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    name: str,
    rows: Sequence[str],
    steps: int,
    rate: float,
    settings: Settings,
    out: Path,
) -> None:
    """Train a model on rows of text, and publish it in bfloat16 as `models/<name>`."""
    import torch

    data = windows(rows, tokenizer, settings.window)
    fit(model, data, steps=steps, batch=settings.batch, rate=rate, seed=settings.seed, name=name)
    model.to(torch.bfloat16)
    with _publish(out / "models" / name, settings) as stage:
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


def write_data(settings: Settings, texts: Texts, out: Path) -> None:
    """Publish each expert's calibration text and held-out text as JSONL files with a column `text`."""
    files = {
        f"{part}_{name}.jsonl": getattr(split, part)
        for name, split in (("code", texts.code), ("math", texts.math))
        for part in ("calibration", "heldout")
    }
    with _publish(out / "data", settings) as stage:
        for name, rows in files.items():
            lines = "".join(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
            (stage / name).write_text(lines, encoding="utf-8")


def identity(settings: Settings) -> dict[str, Any]:
    """What a folder's content follows from: settings, versions, and the source of this example."""
    here = Path(__file__).parent
    return {
        "settings": dataclasses.asdict(settings),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "sources": {
            name: file_sha256(here / name) for name in ("texts.py", "arithmetic.py", "small_model.py", "train.py")
        },
    }


def up_to_date(folder: Path, settings: Settings) -> bool:
    """Whether `folder` holds exactly what these settings give; False if it is missing or from other settings.

    Raises:
        UserError: something other than this script wrote the folder, or changed it since.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    refusal = f"Move or remove {folder}, or choose another folder with --out."
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is in the way: it was not made by demo/train.py. {refusal}", "demo-foreign-folder"
        ) from error
    if foreign := foreign_entries(folder, _stamps(folder, files)):
        raise UserError(
            f"{folder} holds files demo/train.py did not write: {', '.join(foreign[:5])}. {refusal}",
            "demo-foreign-files",
        )
    for name, digest in files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            raise UserError(f"{folder / name} was changed after demo/train.py wrote it. {refusal}", "demo-changed-file")
    return manifest.get("identity") == identity(settings)


def _stamps(folder: Path, files: Collection[str]) -> dict[str, tuple[int, int]]:
    return {name: stamp(folder / name) for name in (*files, MANIFEST) if (folder / name).is_file()}


@contextlib.contextmanager
def _publish(folder: Path, settings: Settings) -> Iterator[Path]:
    old = json.loads((folder / MANIFEST).read_text())["files"] if (folder / MANIFEST).exists() else {}
    with staged_folder(folder, replaceable=_stamps(folder, old)) as stage:
        yield stage
        files = {path.name: file_sha256(path) for path in sorted(stage.iterdir())}
        (stage / MANIFEST).write_bytes(to_json({"identity": identity(settings), "files": files}))


def main() -> None:
    """Make whatever is missing; say so if nothing is."""
    parser = FlagParser(prog="python3 -m demo.train", description=__doc__)
    parser.flag("out", "folder to write data/ and models/ into", default="output/demo")
    parser.switch("fast", "train only a few steps of much smaller models: useless ones, in seconds")
    flags = parser.parse()
    settings, out = (FAST if flags.fast else FULL), Path(flags.out)

    current = [up_to_date(out / folder, settings) for folder in FOLDERS]  # refuses before anything is replaced
    if all(current):
        print(f"{out}/models and {out}/data are there already, made with the same settings: nothing to train")
        return
    started = time.monotonic()
    texts = build_texts(settings.sizes, settings.seed)
    write_data(settings, texts, out)
    train_models(settings, texts, out)
    print(f"wrote {', '.join(FOLDERS)} under {out} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run_command(main)

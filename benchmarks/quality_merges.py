"""Recipe -> merged model -> held-out losses, by command 3's own function; what was judged once is remembered.

The memory is a file beside the pair's, keyed by a digest of the recipe, of the vectors it names and of the text: a run
that was interrupted, or gains a contender, goes on where it was.
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.quality_losses import mean_loss, token_rows
from benchmarks.quality_models import precision_of
from benchmarks.quality_pairs import LONGEST, Pair
from benchmarks.quality_texts import Texts
from utils.commands.merge import merge
from utils.merging.settings import MergeSettings

VALIDATION, TEST = "validation", "test"
TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}
CODE_VERSION = 2  # raise it when merging or judging changes


class Judge:
    """Judges recipes and model folders of one pair; holds the tokenized text and what was judged before."""

    def __init__(self, pair: Pair, texts: Texts, rows: Mapping[str, int], device: str) -> None:
        """Prepare to judge. `rows` says how many rows of each split are read per task."""
        from transformers import AutoTokenizer

        self.pair, self.device = pair, device
        tokenizer = AutoTokenizer.from_pretrained(pair.trained.base)
        self.rows = {
            (split, task): token_rows(tokenizer, getattr(own, split)[: rows[split]], LONGEST)
            for split in (VALIDATION, TEST)
            for task, own in texts.tasks.items()
        }
        self.memory = pair.folder / "judged.json"
        self.judged = json.loads(self.memory.read_text()) if self.memory.exists() else {}

    def recipe_losses(self, recipe: Path, split: str) -> dict[str, float]:
        """Mean loss per token on every task's text of a split of a recipe's merge, or of a model folder in its place."""
        if recipe.is_dir():
            return self.model_losses(recipe, split)
        return self.split_losses(recipe, (split,))[split]

    def split_losses(self, recipe: Path, splits: Sequence[str]) -> dict[str, dict[str, float]]:
        """The same of several splits, by split; merged once."""
        return self._remembered(_digest(recipe), splits, lambda: self._merged(recipe))

    def model_losses(self, folder: Path, split: str) -> dict[str, float]:
        """The same of a model folder."""
        return self._remembered(f"model {folder.name}", (split,), lambda: contextlib.nullcontext(folder))[split]

    def _remembered(self, what: str, splits: Sequence[str], model) -> dict[str, dict[str, float]]:
        keys = {split: f"{CODE_VERSION} {split} {self._text_digest(split)} {what}" for split in splits}
        missing = [split for split in splits if keys[split] not in self.judged]
        if missing:
            with self.pair.clock.work(keys[missing[0]]), model() as folder:
                for split in missing:
                    self.judged[keys[split]] = self.measured_losses(folder, split)
            self.memory.write_text(json.dumps(self.judged, indent=1))
        return {split: self.judged[key] for split, key in keys.items()}

    def _text_digest(self, split: str) -> str:
        rows = [rows for (own, _), rows in self.rows.items() if own == split]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:12]

    @contextlib.contextmanager
    def _merged(self, recipe: Path):
        out = self.pair.folder / "merged"
        shutil.rmtree(out, ignore_errors=True)
        settings = MergeSettings(out, recipe, device=self.device, quiet=True, write_model_card=False)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            merge(settings)
        try:
            yield out
        finally:
            shutil.rmtree(out, ignore_errors=True)

    def measured_losses(self, folder: Path, split: str) -> dict[str, float]:
        import torch
        from transformers import AutoModelForCausalLM

        device = "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"
        # Weights in float32; products in bfloat16 where that takes half the time, and the same for every contender.
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision_of(device) == "bfloat16"):
            at_once = TOKENS_AT_ONCE[device]
            return {task: mean_loss(model, rows, at_once) for (own, task), rows in self.rows.items() if own == split}


def _digest(recipe: Path) -> str:
    """A digest of what a recipe asks for: its text, and the vector files it names."""
    digest = hashlib.sha256(recipe.read_bytes())
    for path in _vector_files(yaml.safe_load(recipe.read_text())):
        digest.update((recipe.parent / path).read_bytes())
    return digest.hexdigest()


def _vector_files(recipe: Mapping[str, Any]) -> Sequence[str]:
    found = (model.get("parameters", {}).get("saliency") for model in recipe["models"])
    return [path for path in found if path]

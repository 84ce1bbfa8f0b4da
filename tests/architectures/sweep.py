"""One architecture through the commands: measured by every guidance, decided, merged, loaded again, and compared.

What command 2 can write beside a guidance's usual recipe (controls, portable recipes, masks, levels) is written, and planned by
command 3. gram_mean takes two rounds, as `--guidance best` does before it tunes.

What is compared with is computed in other ways: LEWIS norms with hooks on the whole model that transformers loads,
experts token by token in float64; merges with the formula on loaded state dicts.
"""

import contextlib
import importlib
import inspect
import io
import json
import math
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import yaml
from safetensors import safe_open
from torch import nn

from tests.architectures.record import ROWS
from tests.architectures.shrinking import VOCABULARY, Row, save_changed, tiny_model
from tests.tiny_pairs import save_tokenizer
from utils.errors import EXIT_SIGNAL, run_command

GUIDANCE = {
    "lewis": ("--expert_tokens", "0"),
    "sens_merging": ("--accept_useless_text",),
    "submodule_linearity": ("--accept_useless_text",),
    "saliency_budget": ("--accept_useless_text",),
    "gram_mean": ("--accept_useless_text", "--rounds", "2"),
    "tuned": ("--accept_useless_text", "--tune_steps", "1"),
}
RECIPES = "recipes"
STEPS = ("merge", *GUIDANCE, RECIPES)
_USUAL = {"saliency_budget": ("--merge_method", "guided_mean")}  # what command 1 names for several experts
_RECIPES = (
    ("lewis", "--merge_method", "ties", "--apply_lewis_to_weights", "--control", "lines", "--portable"),
    ("saliency_budget", "--merge_method", "ties", "--mask", "saliency"),
    ("gram_mean", "--mean_density", "0.5"),
    ("gram_mean", "--mean_density", "0.5", "--form", "low_rank"),
)
_NOT_PORTABLE = ("flag-no-effect:", "recipe-not-portable:")  # what stock mergekit runs anyway, or cannot
SHARES = {"code": 0.5, "math": 0.3}
_TEXTS = ("What is one and two?", "It is three.", "Name a color that is warm, please.", "Red is one, so is orange.")
NORM_ERROR, MERGE_ERROR = 1e-5, 1e-6


@dataclass
class Outcome:
    """What became of a row: by step `ok`, `refused: <code>: <message>`, or `wrong: <what>`."""

    label: str
    architecture: str
    steps: dict[str, str] = field(default_factory=dict)


def read_rows() -> list[Row]:
    """The committed rows."""
    found = yaml.safe_load(ROWS.read_text())
    own = {label: dict(settings or {}) for label, settings in found.items()}
    seeds = {label: settings.pop("seed", 0) for label, settings in own.items()}
    return [Row(*label.split(":"), settings, seeds[label]) for label, settings in own.items()]


def sweep(row: Row, folder: Path, steps: Collection[str] = STEPS) -> Outcome:
    """Take one row through these steps; `folder` is made and filled."""
    outcome = Outcome(row.label, row.architecture)
    try:
        _save(row, folder)
    except Exception as error:  # a row that cannot be built says so instead of ending the sweep
        outcome.steps["build"] = f"wrong: {type(error).__name__}: {error}"
        return outcome
    with contextlib.chdir(folder):
        if "merge" in steps:
            outcome.steps["merge"] = _step(lambda: _merge_uniform(folder))
        for guidance, flags in GUIDANCE.items():
            if guidance not in steps:
                continue
            measured = _step(lambda guidance=guidance, flags=flags: _measure(guidance, flags))
            if measured == "ok" and guidance == "lewis":
                measured = _step(lambda: _compare_norms(folder, row))
            if measured == "ok":
                measured = _late(_step(lambda guidance=guidance: _decide_and_merge(folder, guidance)))
            outcome.steps[guidance] = measured
        if RECIPES in steps:
            outcome.steps[RECIPES] = _late(_step(lambda: _plan_recipes(folder)))
    outcome.steps = {step: said.replace(str(folder), ".") for step, said in outcome.steps.items()}
    return outcome


def _save(row: Row, folder: Path) -> None:
    model = tiny_model(row)
    model.save_pretrained(folder / "base")
    for seed, name in enumerate(SHARES, start=1):
        save_changed(model, folder / name, row.seed * len(SHARES) + seed)
    for name in ("base", *SHARES):
        save_tokenizer(folder / name, size=VOCABULARY - 2)  # some kinds of tokenizers add a token of their own
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in _TEXTS))
    pair = {
        "model_info": [{"name": f"./{name}", "type": name} for name in ("base", *SHARES)],
        "dataset": {"path": "rows.jsonl", "text": "{text}", "seqlen": 24},
        "nsamples": len(_TEXTS),
    }
    (folder / "pair.yaml").write_text(yaml.safe_dump(pair))


class _Refused(Exception):
    """A command ended with a message."""


def _step(do: Callable[[], None]) -> str:
    try:
        do()
    except _Refused as refusal:
        return f"refused: {refusal}"
    except AssertionError as error:
        return f"wrong: {error}"
    except Exception as error:  # a traceback is what the sweep looks for
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"wrong: {type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:300]}"
    return "ok"


def run(script: str, *arguments: object) -> str:
    """Run a command in this process; its output.

    Raises:
        _Refused: it ended with a message.
    """
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = [f"{script}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_command(importlib.import_module(script).main)
    except SystemExit as end:
        if isinstance(end.code, int) and end.code > EXIT_SIGNAL:
            raise KeyboardInterrupt from end  # the sweep was to end, not this row
        if end.code:
            said = err.getvalue()
            message = said[said.index("error: ") + 7 :] if "error: " in said else said
            code = re.search(r"\[([a-z0-9-]+)\]\s*$", message)
            raise _Refused(f"{code[1] if code else '?'}: {' '.join(message.split())}") from end
    finally:
        sys.argv = before
    return out.getvalue()


def _late(said: str) -> str:
    return said.replace("refused: ", "refused late: ", 1)


def _merge(recipe: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run("utils.merger", "--merge_config", recipe, "--output_path", folder, "--device", "cpu", "--quiet")


def _merge_uniform(folder: Path) -> None:
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name), "parameters": {"weight": share}} for name, share in SHARES.items()],
        "dtype": "float32",
        "out_dtype": "float32",
    }
    (folder / "uniform.yaml").write_text(yaml.safe_dump(recipe))
    _merge(folder / "uniform.yaml", folder / "merged")
    stored = _stored(folder / "merged")
    assert set(stored) == set(_stored(folder / "base")), "names are not those of the base"
    before, result = _loaded(folder / "base"), _loaded(folder / "merged")
    others = {name: _loaded(folder / name) for name in SHARES}
    for name, base in before.items():
        if not base.is_floating_point():
            continue
        wanted = base + sum(share * (others[key][name] - base) for key, share in SHARES.items())
        worst = float((result[name] - wanted).abs().max()) if base.numel() else 0.0
        assert worst <= MERGE_ERROR * max(1.0, float(base.abs().max())), f"{name} is {worst:.2g} off"


def _stored(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def _model(folder: Path) -> nn.Module:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"], f"missing on reload: {sorted(report['missing_keys'])[:3]}"
    assert not report["unexpected_keys"], f"unexpected on reload: {sorted(report['unexpected_keys'])[:3]}"
    return model.eval()


def _loaded(folder: Path) -> dict[str, torch.Tensor]:
    return _model(folder).state_dict()


def _measure(guidance: str, flags: tuple[str, ...]) -> None:
    arguments = ("--config", "pair.yaml", "--out_dir", f"dfs_{guidance}", "--guidance", guidance, "--device", "cpu")
    run("lewis_importance", *arguments, "--dtype", "float32", "--quiet", *flags)


def _decide_and_merge(folder: Path, guidance: str) -> None:
    arguments = ("--delta_dfs_in_dir", f"dfs_{guidance}", "--config_file", "pair.yaml", "--out_dir", f"out_{guidance}")
    run("lewis_merge", *arguments, "--guidance", guidance, "--quiet", *_USUAL.get(guidance, ()))
    (recipe,) = (folder / f"out_{guidance}").glob("*.yaml")
    _merge(recipe, folder / "merged")
    assert set(_stored(folder / "merged")) == set(_stored(folder / "base")), "names are not those of the base"
    for name, value in _loaded(folder / "merged").items():
        assert not value.is_floating_point() or bool(value.isfinite().all()), f"{name} is not finite"


def _plan_recipes(folder: Path) -> None:
    """Write the other recipes of what was measured, and have command 3 plan each."""
    for place, (guidance, *flags) in enumerate(_RECIPES):
        if not (folder / f"dfs_{guidance}").is_dir():
            continue  # refused
        out = folder / f"more_{place}"
        arguments = ("--delta_dfs_in_dir", f"dfs_{guidance}", "--config_file", "pair.yaml", "--out_dir", out.name)
        try:
            try:
                run("lewis_merge", *arguments, "--guidance", guidance, "--quiet", *flags)
            except _Refused as refusal:
                if "--portable" not in flags or not str(refusal).startswith(_NOT_PORTABLE):
                    raise
                run("lewis_merge", *arguments, "--guidance", guidance, "--quiet", *flags[:-1])
            for recipe in sorted(out.glob("*.yaml")):
                run(
                    "utils.merger", "--merge_config", recipe, "--output_path", "planned", "--device", "cpu", "--dry_run"
                )
        except _Refused as refusal:
            raise _Refused(f"{refusal} ({guidance} {' '.join(flags)})") from refusal


def _compare_norms(folder: Path, row: Row) -> None:
    import pandas as pd

    norms = pd.read_csv(folder / "dfs_lewis/norms.csv")
    for name in ("base", "code"):
        own = norms[norms["model"] == name].set_index("tensor")["norm"]
        wanted = _plain_norms(folder / name)
        for tensor, value in own.items():
            assert tensor in wanted, f"{tensor} was measured, no hook saw it"
            error = abs(value - wanted[tensor]) / max(wanted[tensor], 1e-30)
            assert error <= NORM_ERROR, f"norm of {tensor} of {name} is {value}, not {wanted[tensor]}"


def _plain_norms(folder: Path) -> dict[str, float]:
    """Norms by stored name, from the whole model and hooks."""
    from utils.models.experts_apart import with_experts_apart
    from utils.models.opening import open_checkpoint
    from utils.models.stored_layout import stored_layout

    model = _model(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    squares: dict[str, torch.Tensor] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            handles.append(module.register_forward_pre_hook(_summing(squares, f"{path}.weight"), with_kwargs=True))
        elif getattr(getattr(module, "down_proj", None), "ndim", 0) == 3 and not hasattr(module, "gate_proj"):
            is_routed = (
                hasattr(module, "has_gate") or len(inspect.signature(module.forward).parameters) >= 3
            )  # hidden states, choices, gates
            take = _routed(squares, path) if is_routed else _sorted(squares, path)
            handles.append(module.register_forward_pre_hook(take, with_kwargs=True))
    tokens = 0
    with torch.no_grad():
        for text in _TEXTS:
            ids = tokenizer(text)["input_ids"][:24]
            tokens += len(ids)
            model(input_ids=torch.tensor([ids]), use_cache=False)
    layout = stored_layout(model, with_experts_apart(open_checkpoint(str(folder))))
    norms = {}
    for name, sums in squares.items():
        weight = model.get_parameter(name).detach().double()
        is_wide = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"
        metric = weight.square() * ((sums[:, None] if is_wide else sums) / tokens)
        for stored, piece in layout.split(name, metric).items() if name in layout else ():
            norms[stored] = math.sqrt(float(piece.sum()))
    return norms


def _summing(squares: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = (args[0] if args else next(iter(kwargs.values()))).double()
        own = x.reshape(-1, x.shape[-1]).square().sum(0)
        squares[name] = squares[name] + own if name in squares else own

    return take


def _routed(squares: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
    """Token by token, expert by expert: what the documented forward of transformers' experts gives each matrix."""

    def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden, chosen, gates = [*args, *kwargs.values()][:3]
        has_gate, turned = getattr(module, "has_gate", True), getattr(module, "is_transposed", False)
        first = "gate_up_proj" if has_gate else "up_proj"
        up, down = getattr(module, first), module.down_proj
        shapes = {first: up, "down_proj": down}
        for name, stack in shapes.items():
            key = f"{path}.{name}"
            if key not in squares:
                width = stack.shape[1] if turned else stack.shape[2]
                squares[key] = torch.zeros(stack.shape[0], width, dtype=torch.float64)
                squares[key] = squares[key][:, :, None] if turned else squares[key][:, None, :]
        for token, place, expert in _assignments(chosen, min(up.shape[0], down.shape[0])):
            x, gate = hidden[token].double(), gates[token, place].double()
            matrix = up[expert].double().T if turned else up[expert].double()
            middle = matrix @ x
            bias = getattr(module, f"{first}_bias", None)
            if bias is not None:
                middle = middle + bias[expert].double()
            if hasattr(module, "_apply_gate"):
                inner = module._apply_gate(middle[None])[0] if has_gate else module.act_fn(middle)
            else:  # plainly gated, or not at all
                gate_part, up_part = middle.chunk(2) if has_gate else (middle, 1.0)
                inner = module.act_fn(gate_part) * up_part
            for name, value in ((first, x), ("down_proj", inner)):
                moment = (gate * value).square()
                own = squares[f"{path}.{name}"]
                own[expert] += moment[:, None] if turned else moment[None, :]

    return take


def _sorted(squares: dict[str, torch.Tensor], path: str) -> Callable[..., None]:
    """As `_routed`, for experts that are given every token for every expert, times its gate (0 where it is not asked)."""

    def take(module: nn.Module, args: tuple, kwargs: dict) -> None:
        up, down = module.gate_up_proj.double(), module.down_proj.double()
        inputs = args[0].double().reshape(up.shape[0], -1, up.shape[1])
        for expert, rows in enumerate(inputs):
            for row in rows:
                gate, raised = (row @ up[expert]).chunk(2)
                for name, stack, value in (
                    ("gate_up_proj", up, row),
                    ("down_proj", down, raised * module.act_fn(gate)),
                ):
                    key = f"{path}.{name}"
                    if key not in squares:
                        squares[key] = torch.zeros(*stack.shape[:2], 1, dtype=torch.float64)
                    squares[key][expert] += value.square()[:, None]

    return take


def _assignments(chosen: torch.Tensor, experts: int) -> Iterator[tuple[int, int, int]]:
    for token, row in enumerate(chosen.tolist()):
        for place, expert in enumerate(row):
            if expert < experts:
                yield token, place, expert

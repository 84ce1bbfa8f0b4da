"""The parts of a network that get a merging weight of their own, at three levels; from structure, without names.

| level | inside a decoder block |
|---|---|
| `block` | the whole block |
| `attention_mlp` | each of its direct children that has parameters: attention, MLP, each norm |
| `tensor` | each module that has parameters of its own: linear maps, norms |

Outside the blocks each module with parameters of its own is a part (embeddings, final norm, head), at every level. At
each level the parts have every parameter exactly once, shared ones aside.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn

from utils.errors import UserError
from utils.guidance.submodule_linearity.method import ATTENTION_MLP, BLOCK, TENSOR
from utils.models.decoder import Decoder
from utils.models.weight_source import tied_names
from utils.passes.language_head import behind_body

WHOLE_BLOCK = "block"  # what a part is called whose path inside the block is empty


@dataclass(frozen=True)
class Submodule:
    """A part of a block.

    `path` is the path of its module inside the block, empty for the block itself; `parameters` the names inside the
    block of those of the module's parameters that are the part's; `levels` those it belongs to.
    """

    path: str
    parameters: tuple[str, ...]
    levels: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the part is called in tables."""
        return self.path or WHOLE_BLOCK


def block_submodules(block: nn.Module) -> list[Submodule]:
    """The parts of a block at all levels; what is the same part at several levels comes once."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}

    def add(level: str, path: str, names: tuple[str, ...]) -> None:
        found.setdefault((path, names), []).append(level)

    add(BLOCK, "", _below(block, ""))
    for path, child in _called_children(block, ""):
        add(ATTENTION_MLP, path, _below(child, path))
    if own := _own(block, ""):
        add(ATTENTION_MLP, "", own)
    for path, module in block.named_modules():
        if own := _own(module, path):
            add(TENSOR, path, own)
    return [Submodule(path, names, tuple(levels)) for (path, names), levels in found.items()]


@dataclass(frozen=True)
class Outside:
    """The paths, in the model, of the modules outside the blocks that have parameters of their own.

    `paths` are those of the body, `between` those that the final hidden states go through on their way to the `head`.
    """

    paths: tuple[str, ...]
    between: tuple[str, ...]
    head: str


def outside_submodules(decoder: Decoder) -> Outside:
    """Find the parts outside the blocks; the model's parameters are on the meta device.

    Raises:
        UserError: the head is missing, or something has parameters that is not on the way to it.
    """
    model = decoder.model
    head = model.get_output_embeddings()
    inside = {id(module) for module in decoder.blocks.modules()}
    body = {id(module) for module in decoder.body.modules()}
    paths, head_path, others = [], None, []
    for path, module in model.named_modules():
        if module is head:
            head_path = path
        elif id(module) in inside or not own_parameters(module):
            continue
        elif id(module) in body or _is_tower(decoder):
            paths.append(path)
        else:
            others.append(path)
    if head_path is None:
        raise _not_part_by_part(model, "it has no language-model head")
    tied = tied_names(model)
    of_head = {name for pair in tied.items() for name in pair if any(one.startswith(f"{head_path}.") for one in pair)}
    own = {path: [f"{path}.{name}" for name in own_parameters(model.get_submodule(path))] for path in others}
    between = [path for path in others if not of_head.issuperset(own[path])]
    calls = _calls_on_the_way(decoder, between) if between else Counter()
    if astray := [path for path in between if calls[path] != 1]:
        raise _not_part_by_part(model, f"{', '.join(astray)} are neither body nor head")
    return Outside(tuple(paths), tuple(between), head_path)


def _not_part_by_part(model: nn.Module, problem: str) -> UserError:
    text = f"{type(model).__name__} cannot be measured part by part: {problem}; it is not supported"
    return UserError(text, "model-unsupported")


def _calls_on_the_way(decoder: Decoder, paths: Sequence[str]) -> Counter[str]:
    """How often modules are called from the final hidden states to the logits; nothing is computed."""
    calls: Counter[str] = Counter()
    hidden = decoder.model.config.get_text_config(decoder=True).hidden_size
    with ExitStack() as stack:
        for path in paths:
            module = decoder.model.get_submodule(path)
            handle = module.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
            stack.callback(handle.remove)
        stack.enter_context(behind_body(decoder))(torch.empty(1, 2, hidden, device="meta"))
    return calls


def _is_tower(decoder: Decoder) -> bool:
    """Whether the body is a language tower beside others, which text does not reach: it has a config of its own."""
    return getattr(decoder.body, "config", None) is not decoder.model.config


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters by name, without those of its children."""
    return {name: value for name, value in module._parameters.items() if value is not None}


def require_comparable(base: Decoder, experts: Mapping[str, Decoder]) -> None:
    """Raise a `UserError` if models cannot be compared part by part; no weights are read.

    Args:
        base: the base.
        experts: the experts by what to call them.
    """
    outside = outside_submodules(base)
    for where, expert in experts.items():
        if outside_submodules(expert) != outside:
            raise UserError(
                f"{where} has other modules outside its blocks than the base; it is not a fine-tune of it",
                "model-not-of-base",
            )
        for layer, pair in enumerate(zip(base.blocks, expert.blocks, strict=True)):
            require_same_parameters(*pair, f"{where}: block {layer}")


def require_same_parameters(base: nn.Module, other: nn.Module, where: str) -> None:
    """Raise a `UserError` unless two blocks have the same parameters, of the same shapes."""
    shapes = [_shapes(block) for block in (base, other)]
    if shapes[0] != shapes[1]:
        differing = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))
        raise UserError(
            f"{where} has other parameters than the base ({differing[0][0]} among them); it is not a fine-tune of it",
            "model-not-of-base",
        )


def _shapes(block: nn.Module) -> Mapping[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in block.named_parameters()}


def _called_children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The direct children that have parameters; those of a mere container instead of the container."""
    for name, child in module.named_children():
        full = f"{path}.{name}" if path else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_children(child, full)
        elif any(True for _ in child.parameters()):
            yield full, child


def _below(module: nn.Module, path: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" if path else name for name, _ in module.named_parameters())


def _own(module: nn.Module, path: str) -> tuple[str, ...]:
    return tuple(f"{path}.{name}" if path else name for name in own_parameters(module))

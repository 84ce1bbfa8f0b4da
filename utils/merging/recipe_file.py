"""A merge recipe as somebody wrote it: its text, the data in it, and the names of models and files that stand there.

Names of folders that are relative begin where the command runs, as mergekit has it, or beside the recipe: a recipe that
moves together with what it names goes on working, and so does the one that lies beside a merged model.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from utils.errors import Problem, UserError, raise_collected
from utils.publishing.manifest import content_sha256
from utils.safe_yaml import holds_several_documents, read_text, yaml_mapping, yaml_nodes

INPUT_KEYS = ("models", "slices", "modules")
MODEL_KEYS = ("model", "base_model", "lora", "path", "tokenizer_source", "source")
FILE_KEYS = ("saliency",)  # parameters that name a file
KEYWORDS = ("union", "base")  # what the tokenizer's keys take beside models
_DONOR_KEYS = ("tokenizer_source", "source")
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # what YAML reads as text without quotes


@dataclass(frozen=True)
class MergeRecipe:
    """A recipe file: where it is, its text as written and the plain data in it."""

    path: Path
    text: str = field(repr=False)
    data: Mapping[str, Any] = field(repr=False)

    @property
    def where(self) -> str:
        """What to call it in a message."""
        return f"merge recipe {self.path}"

    @property
    def sha256(self) -> str:
        """SHA-256 of the text, as lower-case hexadecimal."""
        return content_sha256(self.text.encode())

    def locate(self, name: str) -> str:
        """Where a name leads: itself, or the path beside the recipe if only there is something of that name. Of
        `model+adapter` each is looked for on its own.

        Raises:
            UserError: there are two different things of that name.
        """
        here = Path(os.path.expanduser(name))
        beside = self.path.parent / here  # an absolute path stays what it is
        if "+" in name and not _exists(here) and not _exists(beside):
            return "+".join(map(self.locate, name.split("+")))
        if not name or not _exists(beside) or (_exists(here) and os.path.samefile(here, beside)):
            return name
        if _exists(here):
            raise UserError(
                f"{self.where}: {name} is here ({here.resolve()}) and beside the recipe ({beside.resolve()}); write "
                "the whole path of the one that is meant",
                "recipe-ambiguous-name",
            )
        return str(beside)

    def local_folders(self) -> list[tuple[str, Path]]:
        """The models that are folders here, as far as plain names tell: name and folder."""
        names = {name: Path(os.path.expanduser(self.locate(name))) for name in model_names(self.data)}
        return [(name, folder) for name, folder in names.items() if folder.is_dir()]

    def rewritten(self, name: Callable[[str], str]) -> str:
        """The text with every name of a model or a file replaced, and all else as it was."""
        text = self.text
        spots = [(node, new) for node, old in _named_nodes(yaml_nodes(text, self.where)) if (new := name(old)) != old]
        for node, new in sorted(spots, key=lambda spot: -spot[0].start_mark.index):
            written = new if _PLAIN.fullmatch(new) else json.dumps(new, ensure_ascii=False)
            text = text[: node.start_mark.index] + written + text[node.end_mark.index :]
        return text


def read_recipe(path: Path) -> MergeRecipe:
    """Read a merge recipe.

    Raises:
        UserError: not a readable YAML mapping, or not a recipe for this command.
    """
    text = read_text(path, "merge recipe")
    if holds_several_documents(text):
        raise UserError(
            f"merge recipe {path} holds several documents, one for each of several merges; mergekit-multi takes such a "
            "file, or save each document as a recipe of its own",
            "recipe-many-documents",
        )
    return checked_recipe(path, text, yaml_mapping(text, f"merge recipe {path}"))


def checked_recipe(path: Path, text: str, data: Mapping[str, Any]) -> MergeRecipe:
    """A recipe from its text and the data in it, with its outline checked; nothing is read.

    Raises:
        UserError: a file for another command; no merge method; not exactly one of `models`, `slices` and `modules`.
            `path` is what to call it.
    """
    if "model_info" in data:
        text = f"merge recipe {path} is a pair config; give the recipe that lewis_merge.py made of it"
        raise UserError(text, "recipe-pair-config")
    if "experts" in data and "merge_method" not in data:
        raise UserError(
            f"merge recipe {path} makes a mixture of experts out of whole models; mergekit-moe takes it: mergekit-moe "
            f"{path} FOLDER",
            "recipe-moe",
        )
    problems = []
    if not isinstance(data.get("merge_method"), str):
        got = data.get("merge_method")
        problems.append(Problem(f"merge_method must name a method, e.g. ties, got {got!r}", "recipe-no-method"))
    present = [key for key in INPUT_KEYS if data.get(key)]
    if len(present) != 1:
        got = " and ".join(present) if present else "none of them"
        problems.append(Problem(f"needs exactly one of models, slices and modules, got {got}", "recipe-inputs"))
    raise_collected(problems, f"merge recipe {path}")
    return MergeRecipe(path, text, data)


def in_float32(recipe: MergeRecipe) -> MergeRecipe:
    """A recipe whose merge is computed and handed over in float32, whatever it says itself."""
    return replace(recipe, data={**recipe.data, "dtype": "float32", "out_dtype": "float32"})


def is_tokenizer_keyword(key: Any, value: str) -> bool:
    """Whether a text under a key is a word of mergekit's there, and names nothing, whatever folder is called like it."""
    return key in _DONOR_KEYS and value in KEYWORDS


def model_names(node: Any) -> Iterator[str]:
    """Every text under the keys by which mergekit knows models."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key in MODEL_KEYS and isinstance(value, str) and "\0" not in value:
                if not is_tokenizer_keyword(key, value):
                    yield value
            else:
                yield from model_names(value)
    elif isinstance(node, list):
        for value in node:
            yield from model_names(value)


def _named_nodes(node: yaml.Node | None, named: bool = False) -> Iterator[tuple[yaml.ScalarNode, str]]:
    """The scalars of a YAML tree that name models and files, each once, with what they say."""
    for key, value in _children(node):
        here = key in (*MODEL_KEYS, *FILE_KEYS) or (named and key in ("value", None))
        if not isinstance(value, yaml.ScalarNode):
            yield from _named_nodes(value, key in FILE_KEYS or (named and key is None))
        elif here and value.value and not is_tokenizer_keyword(key, value.value):
            yield value, value.value


def _children(node: yaml.Node | None) -> Iterator[tuple[str | None, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        yield from ((key.value, value) for key, value in node.value)
    elif isinstance(node, yaml.SequenceNode):
        yield from ((None, value) for value in node.value)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False

"""One source of calibration text, as the pair config writes it: a name (`gsm8k`), or a mapping with a path and columns."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from utils.errors import Problem
from utils.suggestions import suggestion
from utils.validation import Mistakes, Text, checked, one_line, refuse, show

DATASET_NAMES = ("gsm8k", "mbpp")
_DEFAULTS = ("seed", "seqlen")  # of the pair config, for texts that do not say their own

Seed = Annotated[int, Field(strict=True, ge=0, le=2**32 - 1)]
SequenceLength = Annotated[int, Field(strict=True, ge=2, le=2**20)]


def in_a_home(path: str) -> str:
    """Refuse a path that begins with a `~` that stands for no known home folder."""
    if path.startswith("~") and os.path.expanduser(path) == path:
        raise Mistakes(Problem(f"{show(path)}: no such user's home folder; write the full path", "no-home"))
    return path


def _known_name(name: str) -> str:
    if name in DATASET_NAMES:
        return name
    hint = suggestion(name, DATASET_NAMES, "for text of your own give a mapping: {path: ..., text: ...}")
    known = ", ".join(DATASET_NAMES)
    raise Mistakes(Problem(f"{show(name)} is unknown (known: {known}); {hint}", "unknown-dataset"))


def _of_columns(text: str) -> str:
    one_line(re.sub(r"[\n\t]", " ", text))
    return text


Template = Annotated[str, Field(strict=True), AfterValidator(_of_columns)]
Place = Annotated[Text, AfterValidator(in_a_home)]


@checked
class ChatTurn:
    """A message of a chat: who says it, and a template over columns of what is said."""

    role: Text
    content: Template


def _some_turns(turns: tuple[ChatTurn, ...] | None) -> tuple[ChatTurn, ...] | None:
    if turns is not None and not turns:
        raise Mistakes(Problem("must list messages such as {role: user, content: '{question}'}", "no-turns"))
    return turns


@checked
class CalibrationSource:
    """Where calibration text comes from. `name` selects built-in defaults; the other fields override them.

    A row's text is made by one of `text` (a template over columns), `messages` (a column of chat messages) and `chat`
    (messages made of columns); the latter two go through the tokenizer's chat template.
    """

    name: Annotated[Text, AfterValidator(_known_name)] | None = None
    path: Place | None = None
    subset: Text | None = None
    split: Text | None = None
    text: Template | None = None
    messages: Text | None = None
    chat: Annotated[tuple[ChatTurn, ...] | None, AfterValidator(_some_turns)] = None
    seed: Seed = 42
    seqlen: SequenceLength = 512

    @property
    def shown(self) -> str:
        """What to call it in a line of print."""
        return self.path or self.name or "nothing"

    @property
    def is_chat(self) -> bool:
        """Whether rows are rendered with the tokenizer's chat template."""
        return self.messages is not None or self.chat is not None

    def plain(self) -> dict[str, Any]:
        """As plain data, for manifests; without `chat` where there is none, as manifests were before there was."""
        data = asdict(self)
        turns = data.pop("chat")
        return data if turns is None else {**data, "chat": list(turns)}


def written_out(raw: Any, info: ValidationInfo) -> Any:
    """A name as the mapping it stands for, with the config's own `seed` and `seqlen` where it does not say them."""
    if isinstance(raw, CalibrationSource):
        return raw
    if isinstance(raw, str):
        raw = {"name": raw}
    if not isinstance(raw, dict):
        known = ", ".join(DATASET_NAMES)
        raise Mistakes(Problem(f"must be a name ({known}) or a mapping, got {show(raw)}", "wrong-type"))
    return {**{key: info.data[key] for key in _DEFAULTS if key in info.data}, **raw}


def complete(source: CalibrationSource) -> CalibrationSource:
    """Refuse a source of no text, and one of two."""
    problems = []
    if source.name is None and source.path is None:
        problems.append(Problem("needs a name or a path", "no-text"))
    if sum(each is not None for each in (source.text, source.messages, source.chat)) > 1:
        text = ": give one of text (a template), messages (a chat column) and chat (messages made of columns)"
        problems.append(Problem(text, "two-texts"))
    refuse(problems)
    return source


TextSource = Annotated[CalibrationSource, BeforeValidator(written_out), AfterValidator(complete)]
TextByKey = Mapping[str, TextSource]

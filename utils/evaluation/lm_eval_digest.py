"""What decides a task's results beside the model, as one hash: a result that was kept is one of this very task."""

import functools
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from utils.publishing.manifest import file_sha256, sha256_of


def task_digest(task: Any) -> str:
    """SHA-256 of a loaded task of lm-eval's: its settings with what they include, its functions, its documents.

    Functions count by their file and the Python files beside it, which it may import.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(task.config.to_dict(keep_callable=True), default=_plain).encode())
    shown = task.fewshot_docs() if task.config.num_fewshot else ()
    for documents in (task.eval_docs, shown):
        for document in documents or ():
            digest.update(json.dumps(document, default=_plain).encode() + b"\n")
        digest.update(b"\0")
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What is no plain data as something that is the same in every process: no addresses."""
    if isinstance(value, functools.partial):
        return [_plain(value.func), list(value.args), value.keywords]
    if not callable(value):
        return f"{type(value).__qualname__} {value}" if type(value).__str__ is not object.__str__ else repr(type(value))
    named = value if hasattr(value, "__qualname__") else type(value)
    try:
        folder = Path(inspect.getfile(named)).parent
    except (TypeError, OSError):  # a built-in, or of a module that is in no file
        return named.__qualname__
    return sha256_of([named.__qualname__, [[path.name, file_sha256(path)] for path in sorted(folder.glob("*.py"))]])

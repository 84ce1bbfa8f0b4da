"""Small folders laid out as the published data sets that the quality benchmark reads."""

import json
from pathlib import Path

from benchmarks.quality_texts import FILES


def gsm8k(name: str, number: int) -> dict:
    """A row of GSM8K."""
    return {"question": f"How many {name} are {number}?", "answer": f"{name} {number}\n#### {number}"}


def mbpp(name: str, number: int) -> dict:
    """A row of MBPP."""
    code = f"def {name}_{number}():\r\n\treturn {number}"
    return {"text": f"Write {name} {number}.", "code": code, "test_list": [f"assert {name}_{number}() == {number}"]}


def write_sets(folder: Path, rows: int = 30) -> None:
    """Write both sets, with so many rows in a split (400 in GSM8K's train); rows of test come back in the others."""
    for task, make in (("gsm8k", gsm8k), ("mbpp", mbpp)):
        (folder / task).mkdir()
        for split in FILES[task]:
            own = [make(split, number) for number in range(400 if (task, split) == ("gsm8k", "train") else rows)]
            if split in ("train", "validation"):
                again = make("test", 2)
                same_question = {**make(split, 99), **{key: again[key] for key in again if key in ("question", "text")}}
                same_answer = {**make(split, 98), **{key: again[key] for key in again if key in ("answer", "code")}}
                spaced = {
                    key: value.upper() + "  " if isinstance(value, str) else value for key, value in again.items()
                }
                own = [again, same_question, same_answer, spaced, *own]
            (folder / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))

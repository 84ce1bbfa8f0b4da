"""Files changed at random, each in the way of its kind: bytes in, bytes out, the same ones for the same `Random`.

Text is changed by its bytes, or as what it holds: values of JSON and YAML exchanged for what readers stumble over, keys taken
away, doubled and moved, cells of tables swapped, headers of safetensors rewritten under a length that fits. Libraries that
were looked at instead: hypothesis shrinks an example by hundreds of runs, of a second each here; Atheris and AFL steer by
the coverage of one process, of which a command is many; radamsa knows no safetensors.
"""

import copy
import csv
import io
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import yaml

Mutation = Callable[[bytes, Random], bytes]

TOKENS = [
    b"0", b"-1", b"1e400", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"99999999999", b"*a", b"&a ", b"!!int ", b"\xff", b"\0",
    b"---\n", b"\xef\xbb\xbf", b"\r", b"\t", b"<<: ", b"!!python/object/apply:os.system ", b"0x10", b"1:30", b"'", b'"', b"\\u0000", b"../",
]  # fmt: skip
VALUES: list[Any] = [
    0, 1, -1, 2, 3, 7, 10**4, 10**8, 10**12, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-30, 1e300, float("inf"), float("-inf"),
    float("nan"), True, False, None, [], {}, "", "no", "1", "0.5", "x", "../x", "/", "/etc/passwd", "a" * 5000, "\u202e\u200b", "\ud800",
    "${HOME}", "float32", "base", [0], [[]], [None], [0.1] * 300, {"x": {}}, {"filter": "x", "value": 1}, ["x", 1], {"": ""},
]  # fmt: skip
CELLS = [
    "",
    "0",
    "-1",
    "nan",
    "inf",
    "1e400",
    "x",
    "1,5",
    "=1+1",
    '"',
    "true",
    "0x10",
    "1e-320",
    "99999999999999999999",
    " 1",
    "\u00e9",
]
SNIPPETS = [
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "{{ 1/0 }}", "{{ messages[9] }}", "{% if %}",
    "{{ raise_exception('x') }}", "{{ ''.__class__.__mro__ }}", "{{ 'a' * 10**9 }}", "{% include 'x' %}", "{{", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
]  # fmt: skip
DTYPES = ["F32", "F16", "BF16", "F64", "I8", "I64", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "", None, 3]


def changed_bytes(content: bytes, chance: Random) -> bytes:
    """A few spans replaced, removed, doubled, or exchanged for what parsers stumble over; sometimes cut off."""
    for _ in range(chance.randint(1, 3)):
        place, span = chance.randrange(len(content) + 1), chance.randint(1, 12)
        new = [
            b"",
            chance.randbytes(span),
            content[place : place + span] * 2,
            chance.choice(TOKENS),
            content[place : place + span].swapcase(),
        ]
        content = content[:place] + chance.choice(new) + content[place + span :]
    return content[: chance.randrange(len(content) + 1)] if chance.random() < 0.05 else content


def changed_json(content: bytes, chance: Random) -> bytes:
    """One to three values, keys or entries of a JSON file changed; now and then its bytes."""
    if chance.random() < 0.15:
        return changed_bytes(content, chance)
    text = json.dumps(_changed_data(json.loads(content), chance))
    if chance.random() < 0.05:  # a key given twice
        text = text.replace("{", '{"model_type": "gpt2", "version": 2, ', 1)
    return text.encode(errors="surrogatepass")


def changed_yaml(content: bytes, chance: Random) -> bytes:
    """The same of a YAML file."""
    if chance.random() < 0.3:
        return changed_bytes(content, chance)
    data = _changed_data(yaml.safe_load(content), chance)
    if chance.random() < 0.5:
        return json.dumps(data).encode(errors="surrogatepass")
    return yaml.safe_dump(data, sort_keys=False).encode(errors="surrogatepass")


def changed_table(content: bytes, chance: Random) -> bytes:
    """Cells changed or swapped, rows or columns doubled, removed or moved."""
    if chance.random() < 0.2:
        return changed_bytes(content, chance)
    rows = list(csv.reader(io.StringIO(content.decode())))
    for _ in range(chance.randint(1, 2)):
        _change_rows(rows, chance)
    written = io.StringIO()
    csv.writer(written, delimiter=chance.choice([",", ",", ",", ",", ",", ";", "\t"]), lineterminator="\n").writerows(
        rows
    )
    return written.getvalue().encode()


def _change_rows(rows: list[list[str]], chance: Random) -> None:
    row, other = chance.randrange(len(rows)), chance.randrange(len(rows))
    column = chance.randrange(max(1, len(rows[row])))
    match chance.randrange(8):
        case 0:
            rows.insert(other, list(rows[row]))
        case 1 if len(rows) > 1:
            del rows[row]
        case 2:
            rows[row], rows[other] = rows[other], rows[row]
        case 3:
            for one in rows:
                del one[column : column + 1]
        case 4:
            rows[row] = rows[row][: len(rows[row]) - 1]
        case _ if rows[row]:
            rows[row][column] = chance.choice([*CELLS, rows[other][column] if column < len(rows[other]) else ""])


def changed_template(content: bytes, chance: Random) -> bytes:
    """A chat template with something put in."""
    if chance.random() < 0.5:
        return changed_bytes(content, chance)
    place = chance.randrange(len(content) + 1)
    return content[:place] + chance.choice(SNIPPETS).encode() + content[place:]


def changed_lines(content: bytes, chance: Random) -> bytes:
    """A file of JSON lines with one line changed, or its bytes."""
    if chance.random() < 0.4:
        return changed_bytes(content, chance)
    lines = content.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    lines[place] = changed_json(lines[place], chance) + chance.choice([b"\n", b"", b"\n\n"])
    return b"".join(lines)


def changed_weights(content: bytes, chance: Random) -> bytes:
    """A safetensors file with another header, another length of it, other bytes, or cut off."""
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    match chance.randrange(6):
        case 0:
            return (
                struct.pack("<Q", chance.choice([0, 1, length - 1, length + 1, 10**8, 2**63, 2**64 - 1])) + content[8:]
            )
        case 1:
            return content[: chance.randrange(len(content))]
        case 2:
            place = chance.randrange(len(data))
            data = (
                data[:place] + chance.choice([b"\xff" * 4, b"\0" * 64, b"\x80\x7f", chance.randbytes(8)]) + data[place:]
            )
            data = data[: len(content) - 8 - length] if chance.random() < 0.7 else data
        case 3:
            return changed_bytes(content[: 8 + length], chance) + data
        case 4:
            _change_entry(header[chance.choice([name for name in header if name != "__metadata__"])], chance)
        case _:
            header = _changed_data(header, chance)
    text = json.dumps(header).encode(errors="surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def _change_entry(entry: dict[str, Any], chance: Random) -> None:
    match chance.randrange(4):
        case 0:
            entry["dtype"] = chance.choice(DTYPES)
        case 1:
            entry["shape"] = chance.choice(
                [entry["shape"][::-1], entry["shape"][:-1], [*entry["shape"], 1], [0], [], [-1], [2**40, 2**40]]
            )
        case 2:
            entry["data_offsets"] = [chance.choice([*entry["data_offsets"], 0, -1, 2**62]) for _ in range(2)]
        case _:
            entry["data_offsets"] = [one + chance.choice([-2, 2, 64]) for one in entry["data_offsets"]]


def _changed_data(data: Any, chance: Random) -> Any:
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        data = _change(data, chance)
    return data


def _change(data: Any, chance: Random) -> Any:
    """Plain data with one place changed; every place below it is as likely as another one on its level."""
    if not isinstance(data, (dict, list)) or not data or chance.random() < 0.02:
        return copy.deepcopy(chance.choice(VALUES))
    keys = list(data) if isinstance(data, dict) else list(range(len(data)))
    key = chance.choice(keys)
    if isinstance(data[key], (dict, list)) and data[key] and chance.random() < 0.8:
        data[key] = _change(data[key], chance)
        return data
    match chance.randrange(7):
        case 0:
            del data[key]
        case 1 if isinstance(data, dict):
            data[chance.choice([f"{key}x", f"{key}"[:-1], "", "__class__", f"{key}".upper()])] = data.pop(key)
        case 1:
            data.insert(chance.randrange(len(data) + 1), copy.deepcopy(data[key]))
        case 2:
            data[key] = copy.deepcopy(data[chance.choice(keys)])
        case 3:
            data[key] = _nested(data[key], chance.choice([1, 2, 60]))
        case 4 if isinstance(data[key], (int, float)) and not isinstance(data[key], bool):
            data[key] = chance.choice([-data[key], data[key] + 1, data[key] * 2, data[key] * 10**6, str(data[key])])
        case _:
            data[key] = copy.deepcopy(chance.choice(VALUES))
    return data


def _nested(value: Any, levels: int) -> Any:
    for _ in range(levels):
        value = [value]
    return value

"""A stranger's adapter before peft builds it: ranks that its weights have, and patterns that come to an end.

peft allocates the ranks that `adapter_config.json` names before it looks at the weights, and searches the modules' names by
regular expressions of the config's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.bounded_files import read_json
from utils.errors import UserError
from utils.models.headers import file_headers
from utils.models.low_rank import CONFIG, WEIGHTS
from utils.trial import Begin, Trial

_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save")


def check_before_peft(adapter: Path, name: str, modules: Sequence[str]) -> None:
    """Check an adapter's config; `modules` are the names that its patterns will be held against.

    Raises:
        UserError: a rank that none of its tensors has; a pattern over which a search takes too long.
    """
    config = read_json(adapter / CONFIG, f"LoRA adapter {name}: {CONFIG}")
    most = max((size for header in file_headers(adapter / WEIGHTS, name) for size in header.shape), default=0)
    by_module = config.get("rank_pattern")
    for rank in (config.get("r", 8), *(by_module.values() if isinstance(by_module, Mapping) else ())):
        if type(rank) is not int or not 1 <= rank <= most:
            raise UserError(
                f"LoRA adapter {name}: {CONFIG} has a rank of {str(rank)[:40]}, which no tensor in {WEIGHTS} has",
                "adapter-unfit",
            )

    def search(begin: Begin) -> None:
        begin(f"LoRA adapter {name}: searching modules by the patterns in its {CONFIG}")
        for pattern in _patterns(config):
            for module in modules:
                re.fullmatch(rf"(?:.*?\.)?(?:{pattern})", module)

    if failure := Trial(search).failure():
        raise UserError(f"{failure}; is this adapter from a source you trust?", "model-breaks-libraries")


def _patterns(config: Mapping[str, Any]) -> Iterator[str]:
    for key in _PATTERNS:
        value = config.get(key)
        yield from (one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str))
    for key in ("rank_pattern", "alpha_pattern"):
        yield from config[key] if isinstance(config.get(key), Mapping) else ()

"""What was written, checked before anybody sees it: names, shapes, dtypes, config, tokenizer; does it load?"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer

from utils.errors import Problem, UserError, is_memory, raise_collected
from utils.merging.loading import loading_report
from utils.merging.plan import MergePlan
from utils.merging.settings import MergeSettings
from utils.merging.stacked_outputs import written_tensors
from utils.models.headers import FLOAT_DTYPES, TensorHeader, read_headers
from utils.models.mergekit_inputs import quiet_mergekit
from utils.models.tokenizer_files import GENERATION, has_chat_template, has_tokenizer
from utils.trial import is_failure

_SHOWN = 5


def check_result(plan: MergePlan, settings: MergeSettings, folder: Path) -> list[str]:
    """Check a merged model in its folder.

    Args:
        plan: what was planned.
        settings: the flags.
        folder: the folder with weights, config and tokenizer.

    Returns:
        Sentences for the user about what was checked and what changed.

    Raises:
        UserError: the result is not what was planned or does not load. It is then not published.
    """
    headers = read_headers(folder, "the result")
    _refuse(_tensor_problems(plan, headers))
    problems = [*_small_file_problems(plan, settings, folder), *_loading_problems(folder, settings.trust_remote_code)]
    rows, row_problems = _vocabulary(plan, settings, folder, headers)
    _refuse([*problems, *row_problems])
    checked = f"{len(headers)} tensors are finite and have the planned names, shapes and dtypes"
    return [f"checked: {checked}; transformers loads them all", *rows]


def _refuse(problems: Iterable[str]) -> None:
    found = [Problem(text, "merge-result-wrong") for text in problems]
    raise_collected(found, "the merged model did not pass its checks")


def _does_not_load(what: str, error: Exception) -> UserError:
    text = f"the merged model did not pass its checks: {what}: {type(error).__name__}: {error}"
    return UserError(text, "merge-result-unloadable")


def _tensor_problems(plan: MergePlan, headers: dict[str, TensorHeader]) -> Iterator[str]:
    planned = {tensor.name: tensor for tensor in written_tensors(plan)}
    required = {name for name, tensor in planned.items() if not tensor.optional}
    for what, names in (("lacks", required - set(headers)), ("has unplanned", set(headers) - set(planned))):
        if names:
            yield f"the result {what} {', '.join(sorted(names)[:_SHOWN])}"
    for name, header in headers.items():
        tensor = planned.get(name)
        if tensor and tensor.shape is not None and header.shape != tensor.shape:
            yield f"{name} has shape {list(header.shape)}, planned was {list(tensor.shape)}"
        if tensor and tensor.dtype is not None and FLOAT_DTYPES.get(header.dtype) != tensor.dtype:
            yield f"{name} is {header.dtype}, planned was {tensor.dtype}"


def _loading_problems(folder: Path, trust_remote_code: bool) -> Iterator[str]:
    try:
        found = loading_report(folder, trust_remote_code)
    except Exception as error:  # whatever else it is, the result does not load
        if is_memory(error):
            raise
        raise _does_not_load("transformers cannot load it", error) from error
    for names, what in (
        (found.missing, "are missing for the model class"),
        (found.misshapen, "have shapes that do not fit config.json"),
    ):
        if names:
            yield f"{len(names)} tensors {what}: {', '.join(names[:_SHOWN])}"


def _small_file_problems(plan: MergePlan, settings: MergeSettings, folder: Path) -> Iterator[str]:
    donor = plan.inputs.donor.checkpoint.folder
    if (donor / GENERATION).is_file() and not (folder / GENERATION).is_file():
        yield f"{GENERATION} of the base is missing"
    if not settings.copy_tokenizer and not plan.vocabulary.asked:
        return
    if has_tokenizer(donor) and not has_tokenizer(folder):
        yield "the tokenizer of the base is missing"
    if has_chat_template(donor) and not has_chat_template(folder):
        yield "the chat template of the base is missing"


def _vocabulary(
    plan: MergePlan, settings: MergeSettings, folder: Path, headers: dict[str, TensorHeader]
) -> tuple[list[str], list[str]]:
    """What there is to say about tokens and rows, and what is wrong with them."""
    if not has_tokenizer(folder):
        return ["the result has no tokenizer"], []
    try:
        with quiet_mergekit():
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=settings.trust_remote_code)
    except BaseException as error:  # tokenizers raise anything
        if not is_failure(error) or is_memory(error):
            raise
        raise _does_not_load("its tokenizer cannot be loaded", error) from error
    rows = {
        headers[tensor.name].shape[tensor.vocabulary_axis]
        for tensor in plan.tensors
        if tensor.vocabulary_axis is not None and tensor.name in headers
    }
    declared = getattr(config.get_text_config(), "vocab_size", None)
    problems = []
    donor = plan.inputs.donor.checkpoint.tensors
    as_before = all(  # some classes have rows beyond their vocab_size
        donor[tensor.name].shape == headers[tensor.name].shape
        for tensor in plan.tensors
        if tensor.vocabulary_axis is not None and tensor.name in headers and tensor.name in donor
    )
    if declared is not None and rows and rows != {declared} and not as_before:
        problems.append(f"embeddings have {sorted(rows)} rows, config.json says vocab_size {declared}")
    size = plan.vocabulary.size
    if plan.vocabulary.asked and size is not None and rows != {size}:
        problems.append(f"embeddings have {sorted(rows)} rows, the tokenizer needs {size}")
    highest = max(tokenizer.get_vocab().values(), default=-1)
    lines = []
    if rows and highest >= min(rows):
        text = f"the tokenizer has ids up to {highest}, the embeddings {min(rows)} rows"
        (problems if plan.vocabulary.asked else lines).append(text)
    before = plan.inputs.donor.checkpoint.config.get("vocab_size")
    if declared is not None and before is not None and declared != before:
        lines.append(f"vocabulary: {before} rows became {declared} (tokenizer {len(tokenizer)})")
    return lines, problems

"""Text becomes token ids."""

import hashlib
from collections.abc import Sequence
from typing import Any

from utils.errors import UserError, brief
from utils.pair.sample_text import Sample, is_unicode
from utils.trial import is_failure

# No tokenizer's tokens are this long on average: characters further on cannot reach the first `seqlen` tokens, and a
# row that holds a whole book need not be tokenized to its end.
_CHARACTERS_PER_TOKEN = 1024


def encode(samples: Sequence[Sample], tokenizer: Any, seqlen: int, where: str) -> list[list[int]]:
    """Token ids of each sample, special tokens once, truncated to `seqlen`.

    Chat messages are rendered with the tokenizer's chat template, which writes its own special tokens.

    Raises:
        UserError: a chat column without a chat template, messages the template refuses, text the tokenizer cannot
            encode, or a sample without tokens.
    """
    encoded = []
    for sample in samples:
        if sample.messages is None:
            text, special = sample.text, True
        else:
            text, special = _render_chat(sample, tokenizer, where), False
        if getattr(tokenizer, "truncation_side", "right") == "right":
            text = text[: _CHARACTERS_PER_TOKEN * seqlen]
        try:
            ids = tokenizer(text, add_special_tokens=special, truncation=True, max_length=seqlen)["input_ids"]
        except BaseException as error:  # tokenizers raise errors of their own kinds, and panic over regular expressions
            if not is_failure(error):
                raise
            raise UserError(
                f"{where}: its tokenizer cannot encode row {sample.row} of the data set: {brief(error)}",
                "text-not-encodable",
            ) from error
        if not ids:
            raise UserError(
                f"{where}: row {sample.row} of the data set gives no tokens: {text[:60]!r}; remove the row or choose another "
                "seed",
                "text-no-tokens",
            )
        encoded.append(ids)
    return encoded


def token_digest(encoded: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the token ids, for the manifest."""
    return hashlib.sha256(repr([list(ids) for ids in encoded]).encode()).hexdigest()


def _render_chat(sample: Sample, tokenizer: Any, where: str) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{where}: its tokenizer has no chat template; give dataset.text instead",
            "text-no-chat-template",
        )
    try:
        text = tokenizer.apply_chat_template(sample.messages, tokenize=False)
    except Exception as error:  # templates raise errors of their own kinds
        raise UserError(
            f"{where}: the chat template refuses row {sample.row}: {brief(error)}", "text-chat-refused"
        ) from error
    if not is_unicode(text):
        raise UserError(
            f"{where}: row {sample.row} holds half of a surrogate pair, which is not a character; correct the row",
            "text-surrogate",
        )
    return text

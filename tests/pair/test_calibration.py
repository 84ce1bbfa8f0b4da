"""From rows to token batches: the reference's choice of rows, templates, chat, and batches that hold every token once.

python -m pytest tests/pair/test_calibration.py
"""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.refusals import refused
from tests.tiny_pairs import BOS_CHAT, CHATML, save_tokenizer
from utils.pair.batches import micro_batches, reference_batches
from utils.pair.calibration import choose_samples, text_doubts, with_defaults
from utils.pair.sample_text import Sample
from utils.pair.source import CalibrationSource, ChatTurn
from utils.pair.tokens import encode, token_digest

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Ho"}


def source(folder: Path, rows: list, **settings) -> CalibrationSource:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CalibrationSource(path=str(path), **settings)


def refusal(code: str, call, *args) -> str:
    with refused(code) as caught:
        call(*args)
    return str(caught.value)


# --- which rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 42, 2**32 - 1])
def test_rows_are_those_of_a_shuffled_hub_data_set(tmp_path, seed):
    from datasets import Dataset

    rows = [{"text": f"row {i}"} for i in range(200)]
    chosen = choose_samples(source(tmp_path, rows, seed=seed), 15)
    shuffled = Dataset.from_list(rows).shuffle(seed=seed)
    assert [sample.text for sample in chosen] == [shuffled[i]["text"] for i in range(15)]
    assert [rows[sample.row]["text"] for sample in chosen] == [sample.text for sample in chosen]


def test_as_many_samples_as_rows_use_every_row_once(tmp_path):
    chosen = choose_samples(source(tmp_path, [{"text": f"{i}"} for i in range(7)]), 7)
    assert sorted(sample.row for sample in chosen) == list(range(7))


@pytest.mark.parametrize(("rows", "wanted"), [(0, 1), (3, 15), (1000, 1_000_000)])
def test_too_few_rows_are_said_in_plain_digits(tmp_path, rows, wanted):
    said = refusal("text-too-few-rows", choose_samples, source(tmp_path, [{"text": "x"}] * rows), wanted)
    assert f"has {rows} rows, but nsamples is {wanted}; lower nsamples" in said


def test_defaults_of_the_built_in_data_sets(tmp_path):
    gsm8k = with_defaults(CalibrationSource(name="gsm8k"))
    assert (gsm8k.path, gsm8k.subset, gsm8k.split, gsm8k.text) == (
        "openai/gsm8k",
        "main",
        "train",
        "{question} {answer}",
    )
    mbpp = with_defaults(CalibrationSource(name="mbpp", split="validation"))
    assert (mbpp.path, mbpp.subset, mbpp.split) == ("google-research-datasets/mbpp", "full", "validation")
    local = with_defaults(source(tmp_path, [], name="gsm8k"))
    assert (local.subset, local.split, local.text) == (None, None, "{question} {answer}")
    other_hub = with_defaults(CalibrationSource(name="gsm8k", path="me/mine"))
    assert (other_hub.subset, other_hub.split) == (None, "train")
    chat = with_defaults(CalibrationSource(name="gsm8k", messages="m"))
    assert chat.text is None


@pytest.mark.parametrize("key", ["subset", "split"])
def test_a_file_has_no_subset_and_no_split(tmp_path, key):
    said = refusal("text-key-of-file", choose_samples, source(tmp_path, [{"text": "x"}], **{key: "train"}), 1)
    assert f"dataset.{key}: " in said and f"is a file, which has no {key}; remove the key" in said


def test_a_hub_data_set_that_cannot_be_had(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise RuntimeError("Dataset scripts are no longer supported, but found x.py\nmore")

    said = refusal("text-not-loadable", choose_samples, CalibrationSource(path="nobody/nothing"), 1)  # offline
    assert said.startswith("dataset nobody/nothing, split train: cannot be loaded: ")
    assert "For a local file give dataset.path its name" in said
    monkeypatch.setattr(datasets, "load_dataset", fail)
    said = refusal("text-not-loadable", choose_samples, CalibrationSource(name="gsm8k"), 1)
    assert said.startswith("dataset openai/gsm8k (main), split train: cannot be loaded: Dataset scripts are no longer")
    assert "\n" not in said and len(said) < 500


# --- their text -------------------------------------------------------------------------------------------------------


def text_of(folder: Path, template: str | None, row: dict) -> str:
    return choose_samples(source(folder, [row], text=template), 1)[0].text


@pytest.mark.parametrize(
    ("template", "row", "text"),
    [
        (None, {"text": "as it is\n", "x": 1}, "as it is\n"),
        ("{q} {a}", {"q": "one", "a": "two"}, "one two"),
        ("Q: {q}\nA: {a}\n", {"q": "1", "a": "2"}, "Q: 1\nA: 2\n"),
        ("{{literal}} {q}", {"q": "x"}, "{literal} x"),
        ("{q}{q}", {"q": "ab"}, "abab"),
        ("{q}", {"q": "{not a column} {0} {}"}, "{not a column} {0} {}"),
        ("{q}", {"q": 3}, "3"),
        ("{q}", {"q": 0.5}, "0.5"),
        ("{a.b}", {"a.b": "dots"}, "dots"),
        ("{0}", {"0": "digits"}, "digits"),
        ("{two words}", {"two words": "x"}, "x"),
        ("{q}", {"q": "\U0001f600 \u05e9"}, "\U0001f600 \u05e9"),
    ],
)
def test_templates(tmp_path, template, row, text):
    assert text_of(tmp_path, template, row) == text


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{}", "template-invalid"),
        ("{q:>10}", "template-invalid"),
        ("{q!r}", "template-invalid"),
        ("{q", "template-invalid"),
        ("q}", "template-invalid"),
        ("{q} {", "template-invalid"),
        ("no column", "template-no-column"),
        ("{{literal}}", "template-no-column"),
        ("{q.__class__}", "text-no-column"),
        ("{q[0]}", "text-no-column"),
        ("{0}", "text-no-column"),
        ("{Q}", "text-no-column"),
    ],
)
def test_templates_refused(tmp_path, template, code):
    refusal(code, text_of, tmp_path, template, {"q": "x"})


def test_what_is_said_of_a_template(tmp_path):
    for code, template, words in (
        ("template-invalid", "{}", "dataset.text '{}': write columns as {column}, nothing else in the braces"),
        ("template-no-column", "word", "dataset.text 'word' names no column; write for example {question}"),
    ):
        assert refusal(code, text_of, tmp_path, template, {"q": "x"}) == words
    assert "is not a template: expected '}'" in refusal("template-invalid", text_of, tmp_path, "{q", {"q": "x"})


def test_a_wrong_template_is_said_before_the_file_is_read(tmp_path):
    with refused("template-invalid"):
        choose_samples(CalibrationSource(path=str(tmp_path / "none.jsonl"), text="{q"), 1)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, "text-bad-value"),
        (float("nan"), "text-bad-value"),
        (float("-inf"), "text-bad-value"),
        (["x"], "text-bad-value"),
        ({"a": 1}, "text-bad-value"),
        ("", "text-empty"),
        (" \n\t\u3000", "text-empty"),
        ("half \ud83d", "text-surrogate"),
    ],
)
def test_values_that_are_no_text(tmp_path, value, code):
    said = refusal(code, text_of, tmp_path, "{q}", {"q": value})
    assert said.startswith(f"dataset {tmp_path / 'rows.jsonl'}, row 0")


def test_what_is_said_of_a_value(tmp_path):
    where = f"dataset {tmp_path / 'rows.jsonl'}, row 0"
    for code, value, words in (
        ("text-bad-value", None, ": column 'q' holds nothing (null), not text"),
        ("text-bad-value", ["x"], ": column 'q' holds a list, not text"),
        ("text-empty", "", " is empty; remove the row or choose another seed"),
    ):
        assert refusal(code, text_of, tmp_path, "{q}", {"q": value}) == where + words


def test_a_missing_column_names_those_that_are_there(tmp_path):
    said = refusal("text-no-column", text_of, tmp_path, None, {"question": "x", "answer": "y"})
    assert "no column 'text' (columns: question, answer); give dataset.text" in said


def test_unused_columns_may_hold_anything(tmp_path):
    assert text_of(tmp_path, "{q}", {"q": "x", "n": None, "f": float("nan"), "l": [1]}) == "x"


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(folder: Path, messages) -> list[Sample]:
    return choose_samples(source(folder, [{"m": messages}], messages="m"), 1)


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        (None, "text-bad-messages"),
        ("Hi", "text-bad-messages"),
        (["Hi"], "text-bad-messages"),
        ({"role": "user"}, "text-bad-messages"),
        ([], "text-bad-messages"),
        ([{"from": "human", "value": "Hi"}], "text-bad-messages"),
        ([USER, {"role": None, "content": "x"}], "text-bad-messages"),
        ([{"role": "user", "content": None}], "text-bad-messages"),
        ([{"role": "user"}], "text-bad-messages"),
    ],
)
def test_columns_that_are_no_chat(tmp_path, messages, code):
    refusal(code, chat, tmp_path, messages)


def test_what_is_said_of_a_message(tmp_path):
    said = refusal("text-bad-messages", chat, tmp_path, [{"from": "human", "value": "Hi"}])
    assert said.endswith("message 1 must have a role and a content, both text; it has from, value")


def test_a_missing_chat_column(tmp_path):
    assert "no column 'chat' (columns: m)" in refusal(
        "text-no-column", choose_samples, source(tmp_path, [{"m": []}], messages="chat"), 1
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    from transformers import AutoTokenizer

    made = {}

    def load(template: str | None = None, bos: bool = True):
        if (template, bos) not in made:
            folder = tmp_path_factory.mktemp("tokenizer")
            made[template, bos] = AutoTokenizer.from_pretrained(save_tokenizer(folder, chat_template=template, bos=bos))
        return made[template, bos]

    return load


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(text))


def test_plain_text_gets_its_special_tokens_once(tokenizers):
    for bos in (True, False):
        tokenizer = tokenizers(bos=bos)
        assert encode([Sample(0, "Hi")], tokenizer, 99, "m") == [[0] * bos + ids(tokenizer, "Hi")]


def test_chat_has_exactly_one_bos_whoever_writes_it(tmp_path, tokenizers):
    """The template writes BOS and the post-processor would add another."""
    samples = chat(tmp_path, [USER, ASSISTANT])
    tokenizer = tokenizers(BOS_CHAT, bos=True)
    (encoded,) = encode(samples, tokenizer, 99, "m")
    assert encoded[0] == 0 and encoded.count(0) == 1
    body = [*ids(tokenizer, "<|user|>Hi"), 1, *ids(tokenizer, "<|assistant|>Ho"), 1]
    assert encoded == [0, *body]
    # A template that writes none is taken at its word: the model was trained without.
    assert encode(samples, tokenizers(CHATML, bos=True), 99, "m") == [body]


def test_chat_made_of_columns(tmp_path, tokenizers):
    """The same as a column of messages that holds them, for data sets that have questions and answers."""
    turns = (ChatTurn("user", "Q: {q}"), ChatTurn("assistant", "{a}{n}"))
    asked = source(tmp_path, [{"q": "Hi", "a": "Ho", "n": 2}], chat=turns)
    assert with_defaults(asked).text is None
    (made,) = choose_samples(asked, 1)
    assert made.messages == [{"role": "user", "content": "Q: Hi"}, {"role": "assistant", "content": "Ho2"}]
    (written,) = chat(tmp_path, made.messages)
    tokenizer = tokenizers(BOS_CHAT, bos=True)
    assert encode([made], tokenizer, 99, "m") == encode([written], tokenizer, 99, "m")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{nothing}", "text-no-column"),
        ("{q", "template-invalid"),
        ("plain", "template-no-column"),
        ("{l}", "text-bad-value"),
    ],
)
def test_chat_made_of_columns_that_are_not_there(tmp_path, content, code):
    with refused(code):
        choose_samples(source(tmp_path, [{"q": "x", "l": []}], chat=(ChatTurn("user", content),)), 1)


def test_chat_without_a_template(tmp_path, tokenizers):
    said = refusal("text-no-chat-template", encode, chat(tmp_path, [USER]), tokenizers(), 99, "model x")
    assert said == "model x: its tokenizer has no chat template; give dataset.text instead"


def test_roles_that_the_template_refuses(tmp_path, tokenizers):
    strict = (
        "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('only user') }}{% endif %}x{% endfor %}"
    )
    said = refusal("text-chat-refused", encode, chat(tmp_path, [ASSISTANT]), tokenizers(strict), 99, "model x")
    assert said == "model x: the chat template refuses row 0: only user"
    undefined = "{{ messages[0]['nothing']['more'] }}"
    refusal("text-chat-refused", encode, chat(tmp_path, [USER]), tokenizers(undefined), 99, "m")
    syntax = "{% for %}"
    refusal("text-chat-refused", encode, chat(tmp_path, [USER]), tokenizers(syntax), 99, "m")


def test_a_template_runs_in_a_sandbox(tmp_path, tokenizers):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    refusal("text-chat-refused", encode, chat(tmp_path, [USER]), tokenizers(escape), 99, "m")


def test_chat_that_renders_to_nothing_or_to_no_text(tmp_path, tokenizers):
    assert "row 0 of the data set gives no tokens" in refusal(
        "text-no-tokens", encode, chat(tmp_path, [USER]), tokenizers("{{ '' }}"), 9, "m"
    )
    half = chat(tmp_path, [{"role": "user", "content": "\ud83d"}])
    refusal("text-surrogate", encode, half, tokenizers(CHATML), 99, "m")


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_truncation_counts_special_tokens(tokenizers):
    for length in (2, 3, 10):
        (encoded,) = encode([Sample(0, "abcdefghijklmnop")], tokenizers(), length, "m")
        assert len(encoded) == length and encoded[0] == 0


def test_a_row_that_gives_no_tokens(tokenizers):
    class Silent:
        def __call__(self, text, **kwargs):
            return {"input_ids": []}

    assert "row 7 of the data set gives no tokens: 'zzz'" in refusal(
        "text-no-tokens", encode, [Sample(7, "zzz")], Silent(), 9, "m"
    )


def test_a_tokenizer_that_cannot_encode(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="<none>")))
    said = refusal("text-not-encodable", encode, [Sample(3, "b")], fast, 9, "model x")
    assert said.startswith("model x: its tokenizer cannot encode row 3 of the data set: ")


def test_a_huge_row_is_not_tokenized_to_its_end(tokenizers):
    text = "".join(chr(33 + i % 90) for i in range(100_000))
    given = []

    class Spy:
        def __call__(self, text, **kwargs):
            given.append(len(text))
            return tokenizers()(text, **kwargs)

    assert encode([Sample(0, text)], Spy(), 16, "m") == [
        tokenizers()(text, truncation=True, max_length=16)["input_ids"]
    ]
    assert given[0] < len(text) / 4


def test_a_tokenizer_that_keeps_the_end_gets_the_end(tmp_path, tokenizers):
    from transformers import AutoTokenizer

    folder = save_tokenizer(tmp_path / "t")
    left = AutoTokenizer.from_pretrained(folder, truncation_side="left")
    text = "a" * 3000 + "xyz"
    assert encode([Sample(0, text)], left, 2, "m")[0][-1] == ids(left, "z")[0]


def test_the_digest_distinguishes_token_lists():
    lists = ([[1, 2], [3]], [[1], [2, 3]], [[1, 2, 3]], [[12], [3]], [[3], [1, 2]], [])
    assert len({token_digest(encoded) for encoded in lists}) == len(lists)
    assert token_digest([(1, 2)]) == token_digest([[1, 2]])


def test_doubts():
    fine = [[1] * 30, [2] * 12]
    assert text_doubts(CalibrationSource(split="train"), fine) == []
    assert "on the test[:10%] split" in text_doubts(CalibrationSource(split="test[:10%]"), fine)[0]
    assert text_doubts(CalibrationSource(), [[1] * 20] * 3) == ["all 3 samples are the same 20 tokens"]
    assert "the longest sample has 9 tokens" in text_doubts(CalibrationSource(), [[1] * 9, [2]])[0]
    assert text_doubts(CalibrationSource(), [[1] * 20]) == []


# --- batches ----------------------------------------------------------------------------------------------------------

TOKENS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=12), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(encoded=TOKENS, at_once=st.integers(1, 40))
def test_micro_batches_hold_every_sample_once_and_respect_the_limit(encoded, at_once):
    batches = micro_batches(encoded, at_once, 0)
    seen = []
    for batch in batches:
        rows, length = batch.input_ids.shape
        assert rows * length <= at_once or rows == 1
        mask = batch.input_ids.bool() if batch.mask is None else batch.mask
        for ids_row, mask_row in zip(batch.input_ids.tolist(), mask.tolist(), strict=True):
            real = [token for token, real in zip(ids_row, mask_row, strict=True) if real]
            seen.append(real)
            assert mask_row == [True] * len(real) + [False] * (length - len(real))  # right-padded
            assert ids_row[len(real) :] == [0] * (length - len(real))
    assert sorted(seen) == sorted(map(list, encoded))
    assert sum(batch.tokens for batch in batches) == sum(map(len, encoded))


@settings(max_examples=30, deadline=None)
@given(encoded=TOKENS, left=st.booleans(), at_once=st.integers(1, 60))
def test_reference_batches_pad_every_sample_and_count_the_pads(encoded, left, at_once):
    batches = reference_batches(encoded, 12, at_once, 0, left)
    rows = [row for batch in batches for row in batch.input_ids.tolist()]
    pads = [[0] * (12 - len(ids)) for ids in encoded]
    assert rows == [pad + ids if left else ids + pad for ids, pad in zip(encoded, pads, strict=True)]
    assert all(batch.mask is None for batch in batches)
    assert sum(batch.tokens for batch in batches) == 12 * len(encoded)

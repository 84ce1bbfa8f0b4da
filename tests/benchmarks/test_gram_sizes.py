"""The sizes of models and of their Gram matrices by shape; files of a measurement are in tests/guidance/gram_mean/test_experts.py.

python -m pytest tests/benchmarks/test_gram_sizes.py
"""

from dataclasses import replace

from benchmarks import gram_sizes
from benchmarks.gram_sizes import SHAPES


def test_weights_are_those_of_the_published_models():
    """Llama 3.1 8B has 8,030,261,248 numbers, 65 norms of 4096 among them; Mixtral 46,702,792,704, as many norms."""
    assert SHAPES["llama-3.1-8b"].weights == 8_030_261_248 - 65 * 4096
    assert SHAPES["mixtral-8x7b"].weights == 46_702_792_704 - 65 * 4096


def test_an_expert_more_adds_its_two_matrices_and_layers_share_theirs():
    dense = replace(SHAPES["llama-3.2-1b"], blocks=1)
    assert dense.gram_numbers == 4 * 2048 * 2049 // 2 + 8192 * 8193 // 2
    mixture = replace(SHAPES["qwen3-30b-a3b"], blocks=1)
    more = replace(mixture, experts=129).gram_numbers - mixture.gram_numbers
    assert more == 2048 * 2049 // 2 + 768 * 769 // 2


def test_the_table_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gram_sizes.py", "--out", str(tmp_path / "sizes.csv")])
    gram_sizes.main()
    assert (tmp_path / "sizes.csv").read_text().count("\n") == len(SHAPES) + 1

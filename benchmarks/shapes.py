"""Models of a given shape with random weights, written shard by shard: real cost, no download.

    python3 benchmarks/shapes.py --shape llama-78m --folder output/bench/llama-78m --data FOLDER

Makes `base`, `one` and `two` (the base plus small noise on every tensor, as a fine-tune leaves it), bfloat16, with a
byte-level tokenizer trained on the text that will be measured. `--data` is a folder with `gsm8k/train.jsonl` and
`mbpp/train.jsonl`; without it the rows that come with the tests are used.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script
    sys.path.insert(0, str(ROOT))
VOCABULARY = 8192  # of the trained tokenizer; the embedding has the shape's own rows
SHARD_BYTES = 2_000_000_000

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
SHAPES = {
    "llama-78m": _LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16,
                           "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 32000,
                           "tie_word_embeddings": False},
    "llama-160m": _LLAMA | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16,
                            "num_attention_heads": 12, "num_key_value_heads": 12, "vocab_size": 32000,
                            "tie_word_embeddings": False},
    "llama-365m": _LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
                            "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 32000,
                            "tie_word_embeddings": False},
    "llama-3.2-1b": _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                              "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA | {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                              "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 128256,
                              "tie_word_embeddings": True},
    "llama-3.1-8b": _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                              "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                              "tie_word_embeddings": False},
    "gemma-2-2b": {"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                   "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
                   "tie_word_embeddings": True, "max_position_embeddings": 8192},
}  # fmt: skip


def build_pair(shape: str, folder: Path, data: Path | None) -> dict[str, Path]:
    """Make (or find) the three models of a shape; returns their folders by name."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    settings = dict(SHAPES[shape])
    config = AutoConfig.for_model(settings.pop("model_type"), bos_token_id=0, eos_token_id=1, **settings)
    config.dtype = "bfloat16"
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    named = {name: value for name, value in model.named_parameters() if name not in tied}
    shapes = {name: value.shape for name, value in revert_weight_conversion(model, named).items()}  # as released
    config.architectures = [type(model).__name__]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    places = {name: folder / name for name in ("base", "one", "two")}
    for seed, place in enumerate(places.values()):
        if (place / "config.json").exists():
            continue
        place.mkdir(parents=True, exist_ok=True)
        write_shards(place, _tensors(shapes, seed, device))
        write_tokenizer(place, rows_files(data).values())
        config.save_pretrained(place)
    return places


def parameter_count(place: Path) -> int:
    """Stored parameters of a model folder, from its headers."""
    from utils.models.headers import read_headers

    return sum(math.prod(header.shape) for header in read_headers(place, place.name).values())


def rows_files(data: Path | None) -> dict[str, Path]:
    """The text to measure on, by data-set name: GSM8K and MBPP from `data`, else the rows of the tests."""
    if data is None:
        return {"gsm8k": ROOT / "tests" / "golden" / "rows.jsonl"}
    return {"gsm8k": data / "gsm8k" / "train.jsonl", "mbpp": data / "mbpp" / "train.jsonl"}


def _tensors(shapes: dict, seed: int, device: str) -> Iterator[tuple[str, "torch.Tensor"]]:
    import torch

    common, own = (torch.Generator(device).manual_seed(number) for number in (1234, seed))
    for name, shape in shapes.items():
        if len(shape) < 2:
            value = torch.ones(shape, device=device)
        else:
            value = torch.randn(shape, generator=common, device=device).mul_(0.02)
        if seed:
            value += torch.randn(shape, generator=own, device=device).mul_(0.002)
        yield name, value.bfloat16().cpu()


def write_shards(folder: Path, tensors: Iterator[tuple[str, "torch.Tensor"]]) -> None:
    """Write named tensors as safetensors shards with an index, holding one shard at a time."""
    from safetensors.torch import save_file

    weight_map, shard, held, number = {}, {}, 0, 1
    for name, tensor in chain(tensors, [(None, None)]):
        if shard and (name is None or held + tensor.nbytes > SHARD_BYTES):
            file = f"model-{number:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(shard, file)
            shard, held, number = {}, 0, number + 1
        if name is not None:
            shard[name] = tensor
            held += tensor.nbytes
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_tokenizer(folder: Path, files: Iterable[Path]) -> None:
    """Train a byte-level BPE tokenizer on JSON-lines files and save it as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = (line for file in files for line in file.read_text().splitlines())
    texts = (str(value) for line in lines for value in json.loads(line).values())
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def main() -> None:
    """Build the models of one shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, choices=SHAPES)
    parser.add_argument("--folder", required=True, type=Path)
    parser.add_argument("--data", type=Path)
    args = parser.parse_args()
    for name, place in build_pair(args.shape, args.folder, args.data).items():
        print(f"{name}: {place}")


if __name__ == "__main__":
    main()

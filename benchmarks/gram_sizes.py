"""How large the Gram matrices are that `gram_mean` leaves on disk for an expert, beside the model in 16 bits.

    python3 benchmarks/gram_sizes.py

By the shapes of known models; nothing is made or measured. With n inputs a triangle has n (n + 1) / 2 numbers of 4 bytes.
Layers with the same inputs share one: queries, keys and values; gate and up, experts of a mixture each with their own
tokens. Embedding and head have one of the width each. Written to `benchmarks/results/gram_sizes.csv`.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd

from utils.publishing.files import publish_files

RESULTS = Path(__file__).resolve().parent / "results" / "gram_sizes.csv"


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder: `hidden` its width, `attention` the inputs of the output projection, `keys` those of keys and of
    values together, `intermediate` of one MLP or expert, `experts` of a block (0: no mixture)."""

    hidden: int
    attention: int
    keys: int
    intermediate: int
    blocks: int
    vocabulary: int
    tied: bool
    experts: int = 0

    @property
    def weights(self) -> int:
        """Numbers of all matrices; norms and biases are left out."""
        mlp = 3 * self.hidden * self.intermediate * (self.experts or 1) + self.hidden * self.experts
        block = self.hidden * (2 * self.attention + self.keys) + mlp
        return self.blocks * block + self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def gram_numbers(self) -> int:
        """Numbers of all triangles; of a router's inputs there is none."""
        mlp = (self.experts or 1) * (triangle(self.hidden) + triangle(self.intermediate))
        block = triangle(self.hidden) + triangle(self.attention) + mlp
        return self.blocks * block + triangle(self.hidden) * (1 if self.tied else 2)


SHAPES = {
    "llama-3.2-1b": Decoder(2048, 2048, 1024, 8192, 16, 128256, tied=True),
    "gemma-2-2b": Decoder(2304, 2048, 2048, 9216, 26, 256000, tied=True),
    "llama-3.1-8b": Decoder(4096, 4096, 2048, 14336, 32, 128256, tied=False),
    "llama-3.1-70b": Decoder(8192, 8192, 2048, 28672, 80, 128256, tied=False),
    "qwen3-30b-a3b": Decoder(2048, 4096, 1024, 768, 48, 151936, tied=False, experts=128),
    "mixtral-8x7b": Decoder(4096, 4096, 2048, 14336, 32, 32000, tied=False, experts=8),
}


def triangle(inputs: int) -> int:
    """Numbers of a symmetric matrix, each once."""
    return inputs * (inputs + 1) // 2


def table() -> pd.DataFrame:
    """One row a model: gigabytes of weights in 16 bits, of matrices for one expert, and their ratio."""
    rows = []
    for name, one in SHAPES.items():
        model, grams = 2e-9 * one.weights, 4e-9 * one.gram_numbers
        rows.append((name, round(model, 1), round(grams, 1), round(grams / model, 2)))
    return pd.DataFrame(rows, columns=["model", "model_gb", "matrices_gb", "ratio"])


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    found = table()
    print(found.to_string(index=False))
    publish_files(out.parent, {out.name: found.to_csv(index=False).encode()}, overwrite=True)


if __name__ == "__main__":
    main()

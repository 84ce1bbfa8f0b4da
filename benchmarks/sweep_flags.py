"""The flags of sweeps over the quality pairs (`budget_sweep.py`, `sens_ablation.py`)."""

import argparse
from pathlib import Path


def sweep_flags(description: str | None, results: Path) -> argparse.Namespace:
    """Read the command line: `data`, `seeds`, `work` and `results`.

    Args:
        description: what `--help` says.
        results: the folder of results where none is given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with gsm8k/ and mbpp/; default: the offline example's text")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("output/quality"), help="models and what was measured")
    parser.add_argument("--results", type=Path, default=results)
    return parser.parse_args()

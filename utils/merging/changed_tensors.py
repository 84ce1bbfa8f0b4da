"""Tensors that no file holds under their names, as mergekit's executor asks for them: of a model with an adapter, changed
as they are read; of stacked experts, each one's own.
"""

from types import SimpleNamespace

from torch import Tensor

from utils.models.checkpoints import Checkpoint
from utils.models.tensor_files import TensorFiles


class ChangedTensors:
    """What mergekit takes for an open checkpoint (its `LazyTensorLoader`): names under `index`, and tensors by name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.index = SimpleNamespace(
            base_path=str(checkpoint.folder),
            tensor_paths={name: header.file.name for name, header in checkpoint.tensors.items()},
        )

    def get_tensor(self, key: str, device: str = "cpu") -> Tensor:
        """A tensor on a device, in the dtype that it is stored in.

        Raises:
            KeyError: there is none of that name.
            UserError: a file cannot be read.
        """
        header = self.checkpoint.tensors[key]
        with TensorFiles(header.files) as files:
            return files.read_whole(header).to(device)

    def flush(self) -> None:
        """Nothing is held."""

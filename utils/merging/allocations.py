"""How many bytes of tensors are alive at the same time while code runs, counted at every operation of torch."""

import weakref
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_UNTOUCHED = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_INDEX = 8  # bytes of an int64
# These bring tensors of unlike dtypes into one first, on the CPU in memory.
_IN_ONE_DTYPE = ("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "eq", "ne", "lt", "le", "gt", "ge")


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, what operations allocate and let go of; `peak` is the most at a time.

    On the CPU memory counts from when it is written, since the system gives its pages then. Buffers inside an operation,
    which no tensor shows, count as they were measured (`_buffers`).
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        """`before`: tensors that are there already, and do not count."""
        super().__init__()
        self.live = self.peak = 0
        self._counted: dict[int, int] = {}  # by storage
        for tensor in before:
            self._know(tensor, 0)
        self._before = frozenset(self._counted)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it leaves."""
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                late = name in _UNTOUCHED and tensor.device.type == "cpu"
                self._know(tensor, 0 if late else tensor.untyped_storage().nbytes())
        for argument, value in [*zip(func._schema.arguments, args, strict=False)]:
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
                self._write(value)
        self.peak = max(self.peak, self.live + _buffers(name, args))
        return found

    def _know(self, tensor: Tensor, size: int) -> None:
        """Count memory if it is new; tensors on the meta device have none."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._counted:
            self._counted[key] = size
            self.live += size
            weakref.finalize(storage, self._forget, key).atexit = False

    def _write(self, tensor: Tensor) -> None:
        """Count what an operation has written to memory that was not all written yet."""
        storage = tensor.untyped_storage()
        counted = self._counted.get(storage._cdata)
        if counted is None or storage._cdata in self._before:
            return
        now = min(storage.nbytes(), counted + tensor.numel() * tensor.element_size())
        self._counted[storage._cdata] = now
        self.live += now - counted

    def _forget(self, key: int) -> None:
        self.live -= self._counted.pop(key, 0)


def _buffers(name: str, args: tuple) -> int:
    """Bytes that an operation takes inside, for what it is given; as measured with torch 2.13 on the CPU, about that elsewhere."""
    given = args[0] if args and isinstance(args[0], Tensor) else None
    if given is None:
        return 0
    if name.removesuffix("_") in _IN_ONE_DTYPE and given.device.type == "cpu":
        return _copies(given, *(one for one in args[1:2] if isinstance(one, Tensor)))
    if name == "sort" and given.dim() == 1:  # rows are sorted one by one
        return _INDEX * given.numel()
    if name == "topk" and given.dim() == 1:  # pairs of value and index, which torch's allocator does not see
        return 2 * _INDEX * given.numel()
    if name == "sum" and given.dtype == torch.bool:  # as numbers first
        return _INDEX * given.numel()
    return 0


def _copies(*tensors: Tensor) -> int:
    """Bytes of those that are not in the dtype that all are brought into; one without dimensions is read as a number."""
    whole = [one for one in tensors if one.dim()]
    dtype = reduce(torch.promote_types, (one.dtype for one in whole), torch.bool)
    return sum(dtype.itemsize * one.numel() for one in whole if one.dtype != dtype)

"""mergekit's selection by magnitude without its sorting, on any device, for as long as its executor runs here.

What this project does not merge in pieces is merged by mergekit's own tasks: everything on a GPU, on the CPU what
`utils/merging/pieces/choice.py` leaves out. There `ties`, `breadcrumbs` and `breadcrumbs_ties` rank a change by sorting it
whole, with an int64 index for every entry. `selecting_exactly` puts functions in the place of those two sparsifiers
that find the same entries by counting; all else, the rescaling included, remains mergekit's code.

Where no magnitudes tie the results equal mergekit's bit for bit. Of changes that tie at the threshold the first in the
tensor are kept, and always exactly as many as the density asks for. `dare_*` and `della*` are left alone: the former
sort nothing, the latter need the rank of every entry.
"""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from utils.magnitudes import pattern_of
from utils.mergekit_api import (
    RescaleNorm,
    SparsificationMethod,
    Sparsifier,
    replaced_sparsifiers,
    rescaled_masked_tensor,
)
from utils.merging.pieces.choice import kept_band
from utils.selection import band_mask


@contextlib.contextmanager
def selecting_exactly(active: bool = True) -> Iterator[None]:
    """Replace mergekit's two sparsifiers by magnitude, in all threads, while the context lasts; nothing if not active.

    Contexts may overlap, in one thread or several: the last to end puts mergekit's functions back.
    """
    with replaced_sparsifiers(_magnitude, _magnitude_outliers) if active else contextlib.nullcontext():
        yield


def _magnitude(original: Sparsifier) -> Sparsifier:
    def magnitude(tensor: Tensor, density: float, rescale_norm: RescaleNorm | None = None) -> Tensor:
        """The int(density numel) entries of largest magnitude, one at least if the density is positive."""
        if not _can_rank(tensor) or not 0 < density < 1:  # what is all kept, or all zero, mergekit does not sort
            return original(tensor, density, rescale_norm)
        return _kept(tensor, SparsificationMethod.magnitude, density, 0.0, rescale_norm)

    return magnitude


def _magnitude_outliers(original: Sparsifier) -> Sparsifier:
    def magnitude_outliers(
        tensor: Tensor, density: float, rescale_norm: RescaleNorm | None = None, gamma: float = 0.01
    ) -> Tensor:
        """The int(density numel) largest without the int(gamma numel) largest of all, of which some stay if need be."""
        if not _can_rank(tensor) or not 0 <= density < 1 or gamma < 0:
            return original(tensor, density, rescale_norm, gamma)
        return _kept(tensor, SparsificationMethod.magnitude_outliers, density, gamma, rescale_norm)

    return magnitude_outliers


def _kept(
    tensor: Tensor, method: SparsificationMethod, density: float, gamma: float, rescale_norm: RescaleNorm | None
) -> Tensor:
    band = kept_band(method, tensor.numel(), density, gamma)
    mask = band_mask(tensor, band.skip, band.keep)
    # a bool mask keeps the tensor's dtype, and x * True and x * False have the bits of x * 1 and x * 0
    return rescaled_masked_tensor(tensor, mask, rescale_norm)


def _can_rank(tensor: Tensor) -> bool:
    try:
        pattern_of(tensor.dtype)
    except TypeError:  # float64
        return False
    return tensor.numel() > 0

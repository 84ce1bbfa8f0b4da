"""The bins in which saliencies are counted, the same ones for every tensor on every device.

F is around 1e-12 and a change around 1e-5, so the product would not fit float32. Its root, |change| F^(power/2), does, and
is what is counted. A bin is what roots have in common in the leading bits of their float32 pattern, exponent and 4 bits of
the fraction: 16 bins per factor of 2 of the root, 8 per factor of 2 of the saliency, the same ones for every tensor on
every device. Bin b holds the roots from e(b) up to e(b + 1), e(b) being the float32 whose pattern is b 2^19.
"""

SHIFT = 19  # bits of the pattern that do not tell bins apart: 23 of the fraction less 4
BINS = 0x7F800000 >> SHIFT  # the pattern of infinity: all bins of finite numbers lie below

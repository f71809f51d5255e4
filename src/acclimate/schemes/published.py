"""Update sets that others published, as data.

Tiny Training Engine (Lin et al., "On-Device Training Under 256KB Memory", 2022): the last convolutions' biases, and a
share of the input channels of some weights, both counted over the model's convolutions in order; the classifier always
learns. Each was found by evolutionary search under a limit that its name says: KiB of what learns and of what is saved
for it, at one byte a weight, four a bias, one a saved activation and one bit an output that is clamped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """biases: of the last so many convolutions. weights: index of a convolution -> share of its input channels."""

    model: str
    biases: int
    weights: Mapping[int, float]


#: Shapes (outputs, inputs a group) by which the convolutions that the sets name are known.
SHAPES: Mapping[str, tuple[int, Mapping[int, tuple[int, int]]]] = {
    "mcunet-5fps": (
        42,
        {
            21: (160, 40),
            24: (144, 48),
            27: (192, 48),
            30: (240, 48),
            33: (384, 96),
            36: (384, 96),
            39: (576, 96),
        },
    ),
}

TTE: Mapping[str, Published] = {
    "49kb": Published("mcunet-5fps", 20, {24: 0.25, 27: 0.5, 30: 0.5}),
    "74kb": Published("mcunet-5fps", 21, {21: 1, 24: 1, 27: 0.5, 30: 1}),
    "99kb": Published("mcunet-5fps", 22, {21: 1, 24: 1, 27: 1, 30: 1, 36: 0.125, 39: 0.25}),
    "124kb": Published("mcunet-5fps", 24, {21: 0.25, 24: 1, 27: 1, 30: 1, 33: 0.5, 39: 0.5}),
    "148kb": Published("mcunet-5fps", 23, {21: 1, 24: 1, 27: 1, 30: 1, 36: 1, 39: 0.5}),
}

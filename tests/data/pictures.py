"""Random pictures for the tests of this package."""

import numpy as np


def picture(seed, height=10, width=10, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)

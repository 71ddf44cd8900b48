"""Random bits as a pure function of what they are drawn for, so that any host draws the same."""

import numpy as np


def mixed(values: np.ndarray, key: np.ndarray) -> np.ndarray:
    """64 well-mixed bits of (value, key): SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    bits = key + (values.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))

"""Setting invalid pixels to 0: what NumPy's `where` gives, to the last bit."""

import numpy as np
import pytest
import torch

from d3lib.masks import ones_of, zero_, zeroed

JUNK = [0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan, 1e-40, -1e38, 3.4e38]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_pixel_is_itself_where_the_mask_is_true_and_0_elsewhere(dtype):
    values = np.array(JUNK * 14, dtype).reshape(2, 1, 7, 10)
    mask = np.random.default_rng(0).random(values.shape) < 0.5
    expected = np.where(mask, values, dtype(0))
    ones = ones_of(torch.tensor(mask))
    assert ones.sum() == mask.sum()
    given = torch.tensor(values)
    assert zeroed(given, ones).numpy().tobytes() == expected.tobytes()
    assert given.numpy().tobytes() == values.tobytes()
    zero_(given[..., 1:], ones[..., 1:])  # also a part of something larger
    expected[..., 0] = values[..., 0]
    assert given.numpy().tobytes() == expected.tobytes()

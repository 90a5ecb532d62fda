"""How far pictures moved: structural similarity, gradient similarity, signal to noise.

Pictures are uint8 ``[..., H, W, 3]``; every function returns one number per picture, float64
``[...]``. Needs numpy alone, and no weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pictures = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM's Gaussian
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_C_GRADIENT = 170.0  # GMSD's constant for 8-bit pictures
PSNR_CAP = 99.0  # dB, reported for identical pictures


def ssim(a: Pictures, b: Pictures) -> Numbers:
    """Return the structural similarity of the luminance, 1 for equal pictures.

    Wang et al. (2004), with a Gaussian window of 11 pixels. Raises ValueError unless both are uint8
    of one shape and at least 11 pixels wide and high.
    """
    x, y = _luminance(a, b)
    if min(x.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} pixels, got {x.shape[-2:]}")
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
    bottom = (mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2)
    return np.asarray((top / bottom).mean(axis=(-2, -1)))


def gmsd(a: Pictures, b: Pictures) -> Numbers:
    """Return the gradient magnitude similarity deviation, a distance, 0 for equal pictures.

    Xue et al. (2014). Raises ValueError unless both are uint8 of one shape.
    """
    x, y = (_gradient(_halve(each)) for each in _luminance(a, b))
    similarity = (2 * x * y + _C_GRADIENT) / (x * x + y * y + _C_GRADIENT)
    return np.asarray(similarity.std(axis=(-2, -1)))


def psnr(a: Pictures, b: Pictures) -> Numbers:
    """Return the peak signal-to-noise ratio in dB, ``10 log10(255^2 / mean squared error)``.

    Identical pictures give `PSNR_CAP`. Raises ValueError unless both are uint8 of one shape.
    """
    _check(a, b)
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean(
        axis=(-3, -2, -1), dtype=np.float64
    )
    floor = 255.0**2 / 10 ** (PSNR_CAP / 10)
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(error, floor)), dtype=np.float64)


def _check(a: Pictures, b: Pictures) -> None:
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.ndim < 3:
        raise ValueError(
            f"expected two uint8 [..., H, W, 3], got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )


def _luminance(a: Pictures, b: Pictures) -> tuple[Numbers, Numbers]:
    _check(a, b)
    weights = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601
    return a @ weights, b @ weights


def _blur(x: Numbers) -> Numbers:
    """Return the Gaussian mean of every whole window, ``[..., H-10, W-10]``."""
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    kernel = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    kernel /= kernel.sum()
    rows = np.lib.stride_tricks.sliding_window_view(x, _WINDOW, axis=-1) @ kernel
    return np.asarray(np.lib.stride_tricks.sliding_window_view(rows, _WINDOW, axis=-2) @ kernel)


def _halve(x: Numbers) -> Numbers:
    height, width = (side // 2 * 2 for side in x.shape[-2:])
    x = x[..., :height, :width]
    return np.asarray(
        (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2]) / 4
    )


def _gradient(x: Numbers) -> Numbers:
    """Return the magnitude of the Prewitt gradient at every inner pixel, ``[..., H-2, W-2]``."""
    across = (x[..., :, 2:] - x[..., :, :-2]) / 3
    down = (x[..., 2:, :] - x[..., :-2, :]) / 3
    horizontal = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    vertical = down[..., :, :-2] + down[..., :, 1:-1] + down[..., :, 2:]
    return np.asarray(np.sqrt(horizontal**2 + vertical**2))

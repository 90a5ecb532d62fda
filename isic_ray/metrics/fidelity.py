"""How far pictures moved: structural similarity and gradient similarity. numpy only, no weights
needed.

Pictures are uint8 ``[..., H, W, 3]``; every function returns one number a picture, float64
``[...]``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Pictures = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float64]

_WINDOW, _SIGMA = 11, 1.5  # of SSIM's Gaussian
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
_C_GRADIENT = 170.0  # GMSD's constant for 8-bit pictures


def ssim(a: Pictures, b: Pictures) -> Numbers:
    """Structural similarity of luminance, 1 for equal pictures (Wang et al. 2004; Gaussian window
    of 11 pixels).

    Raises ValueError unless both are uint8 of one shape and at least 11 pixels wide and high.
    """
    x, y = _luminance(a, b)
    if min(x.shape[-2:]) < _WINDOW:
        raise ValueError(f"SSIM needs pictures of at least {_WINDOW} pixels, got {x.shape[-2:]}")
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    cov = _blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + _C1) * (2 * cov + _C2)
    return np.asarray(
        (top / ((mean_x**2 + mean_y**2 + _C1) * (var_x + var_y + _C2))).mean(axis=(-2, -1))
    )


def gmsd(a: Pictures, b: Pictures) -> Numbers:
    """Gradient magnitude similarity deviation, a perceptual distance, 0 for equal pictures (Xue et
    al. 2014).

    Raises ValueError unless both are uint8 of one shape.
    """
    x, y = (_gradient(_halve(each)) for each in _luminance(a, b))
    similarity = (2 * x * y + _C_GRADIENT) / (x * x + y * y + _C_GRADIENT)
    return np.asarray(similarity.std(axis=(-2, -1)))


def _luminance(a: Pictures, b: Pictures) -> tuple[Numbers, Numbers]:
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.ndim < 3:
        raise ValueError(
            f"expected two uint8 [..., H, W, 3], got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    weights = np.array([0.299, 0.587, 0.114])
    return a @ weights, b @ weights


def _blur(x: Numbers) -> Numbers:
    """Gaussian mean of every whole window: ``[..., H-10, W-10]``."""
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
    """Prewitt gradient magnitude of every inner pixel."""
    across = (x[..., :, 2:] - x[..., :, :-2]) / 3
    down = (x[..., 2:, :] - x[..., :-2, :]) / 3
    horizontal = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    vertical = down[..., :, :-2] + down[..., :, 1:-1] + down[..., :, 2:]
    return np.asarray(np.sqrt(horizontal**2 + vertical**2))


PSNR_CAP = 99.0  # dB, reported for identical pictures


def psnr(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Peak signal-to-noise ratio in dB of uint8 pictures ``[..., H, W, 3]``, one value a picture:
    float64 ``[...]``.

    ``10 log10(255^2 / mean squared error)``; identical pictures give 99.0, the cap. Raises
    ValueError unless both are uint8 of one shape.
    """
    if a.dtype != np.uint8 or b.dtype != np.uint8 or a.shape != b.shape or a.ndim < 3:
        raise ValueError(
            f"expected two uint8 [..., H, W, 3], got {a.dtype} {a.shape} and {b.dtype} {b.shape}"
        )
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean(
        axis=(-3, -2, -1), dtype=np.float64
    )
    floor = 255.0**2 / 10 ** (PSNR_CAP / 10)
    return np.asarray(10 * np.log10(255.0**2 / np.maximum(error, floor)), dtype=np.float64)

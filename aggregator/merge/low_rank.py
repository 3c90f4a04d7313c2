"""Factor arithmetic: the best rank-r form of a sum of products without the m x n matrix (methods/lora.md, section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Svd:
    """`left` (m, q), all singular values (q,) falling, `right` (q, n): `left * values @ right` is the matrix."""

    left: Float64
    values: Float64
    right: Float64

    def tail(self, rank: int) -> float:
        """The Frobenius norm of what a cut at `rank` leaves out; exact (Eckart and Young 1936)."""
        return float(np.sqrt(np.sum(self.values[rank:] ** 2)))


def svd_of_product(x: Float64, y: Float64) -> Svd:
    """The singular value decomposition of `x @ y`, x (m, R), y (R, n), both float64.

    While R (m + n) <= m n two reduced QR factorisations and a small SVD are used, above that the dense matrix; the choice
    depends on shapes only. In each left column the entry of largest magnitude, the first one on ties, is positive, so
    that equal input gives equal bytes.
    """
    m, n, inner = x.shape[0], y.shape[1], x.shape[1]
    if inner * (m + n) <= m * n:
        q_x, r_x = np.linalg.qr(x)
        q_y, r_y = np.linalg.qr(y.T)
        u, values, v_t = np.linalg.svd(r_x @ r_y.T, full_matrices=False)
        left, right = q_x @ u, v_t @ q_y.T
    else:
        left, values, right = np.linalg.svd(x @ y, full_matrices=False)
    largest = np.abs(left).argmax(axis=0)
    signs = np.where(left[largest, np.arange(left.shape[1])] < 0, -1.0, 1.0)
    return Svd(left * signs, values, right * signs[:, None])

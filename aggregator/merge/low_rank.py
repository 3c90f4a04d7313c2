"""Factor arithmetic: the best rank-r form of a sum of products without the m x n matrix (methods/lora.md, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Svd:
    """`left` (m, q), all singular values falling, `right` (q, n): `left * values[:q] @ right` is the matrix, or its best rank-q form."""

    left: Float64
    values: Float64
    right: Float64

    def tail(self, rank: int) -> float:
        """The Frobenius norm of what a cut at `rank` leaves out; exact (Eckart and Young 1936)."""
        return float(np.sqrt(np.sum(self.values[rank:] ** 2)))


def svd_of_product(x: Float64, y: Float64, rank: int | None = None) -> Svd:
    """The singular value decomposition of `x @ y`, x (m, R), y (R, n), both float64; `rank`: vectors of the first so many only.

    While R (m + n) <= m n two reduced QR factorisations and a small SVD are used, above that the dense matrix; the choice
    depends on shapes only. In each left column the entry of largest magnitude, the first one on ties, is positive, so
    that equal input gives equal bytes.
    """
    m, n, inner = x.shape[0], y.shape[1], x.shape[1]
    if inner * (m + n) <= m * n:
        q_x, r_x = np.linalg.qr(x)
        q_y, r_y = np.linalg.qr(y.T)
        u, values, v_t = np.linalg.svd(r_x @ r_y.T, full_matrices=False)
        left, right = q_x @ u[:, :rank], v_t[:rank] @ q_y.T
    else:
        left, values, right = np.linalg.svd(x @ y, full_matrices=False)
        left, right = left[:, :rank], right[:rank]
    largest = np.abs(left).argmax(axis=0)
    signs = np.where(left[largest, np.arange(left.shape[1])] < 0, -1.0, 1.0)
    return Svd(left * signs, values, right * signs[:, None])


def product_norm(x: Float64, y: Float64) -> float:
    """The Frobenius norm of `x @ y`, x (m, R), y (R, n), without the m x n matrix where that is smaller."""
    m, n, inner = x.shape[0], y.shape[1], x.shape[1]
    if inner * (m + n) > m * n:
        return float(np.linalg.norm(x @ y))
    r_x, r_y = (np.asarray(np.linalg.qr(side, mode="r")) for side in (x, y.T))
    return float(np.linalg.norm(r_x @ r_y.T))


def inner_products(x: Float64, y: Float64, sizes: Sequence[int]) -> Float64:
    """The inner products of the parts of a stack: x (m, R) and y (R, n) in groups of `sizes` columns and rows.

    Accurate relative to the norms of the parts, so a difference of near-equal parts has half the digits.
    """
    first = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(int)
    products = (x.T @ x) * (y @ y.T)
    return np.asarray(np.add.reduceat(np.add.reduceat(products, first, axis=0), first, axis=1))


def compact(x: Float64, y: Float64) -> tuple[Float64, Float64]:
    """The same product `x @ y` with an inner size of at most min(R, m, n); nothing is lost but rounding."""
    svd = svd_of_product(x, y)
    rank = min(svd.left.shape[1], x.shape[1])
    root = np.sqrt(svd.values[:rank])
    return svd.left[:, :rank] * root, root[:, None] * svd.right[:rank]

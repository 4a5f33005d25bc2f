"""Smooth random functions of space in millimetres: the same on every grid, however fine or coarse."""

import numpy as np

Axes = tuple[np.ndarray, np.ndarray, np.ndarray]

# Fields are defined in this box around the brain's centre (half its side, mm) and constant beyond it.
HALF_BOX_MM = 130.0
# Mean over all places of the sum of squared cubic B-spline weights in one dimension: 151 / 315.
MEAN_SQUARED_WEIGHT = 151 / 315


class RandomField:
    """A cubic B-spline in three dimensions with normal coefficients: mean 0, standard deviation 1.

    Args:
        rng: where the coefficients come from; the same draws whatever grid the field is read on.
        knot_mm: distance of the knots; structures are about twice as large.
        components: number of independent fields.
    """

    def __init__(self, rng: np.random.Generator, knot_mm: float, components: int = 1):
        knots = int(np.ceil(2 * HALF_BOX_MM / knot_mm)) + 4
        coefficients = rng.standard_normal((components, knots, knots, knots), dtype=np.float32)
        self.coefficients = coefficients / np.float32(MEAN_SQUARED_WEIGHT**1.5)
        self.knot_mm = knot_mm

    def on_grid(self, axes: Axes) -> np.ndarray:
        """Values on the grid spanned by `axes` (mm), as (components, X, Y, Z) float32."""
        values = self.coefficients
        for axis in axes:
            # Each pass moves the axis that it expands to the end: three passes restore the order. Not a matrix product:
            # BLAS may sum in another order with another number of threads, and phantoms must not differ for that.
            first, weights = self._weights(axis)
            values = np.moveaxis(values, 1, -1)
            values = sum(values[..., first + k] * weights[k] for k in range(4))
        return np.ascontiguousarray(values)

    def at(self, point: np.ndarray) -> np.ndarray:
        """Values at one point (3 coordinates, mm), as (components,)."""
        x, y, z = (np.atleast_1d(c) for c in point)
        return self.on_grid((x, y, z))[:, 0, 0, 0]

    def _weights(self, axis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = np.clip(axis, -HALF_BOX_MM, HALF_BOX_MM) + HALF_BOX_MM
        first = np.floor(inside / self.knot_mm).astype(int)
        t = inside / self.knot_mm - first
        weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
        return first, weights.astype(np.float32)

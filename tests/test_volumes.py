"""ldm3d.volumes: orientation, voxel size, intensities, boxes."""

from pathlib import Path

import numpy as np
import pytest
from nifti_files import SHAPE, volume, write
from scipy import ndimage

from ldm3d.cases import Case
from ldm3d.errors import DataError
from ldm3d.volumes import crop_or_pad, load_prepared, padded_size, percentiles, resample, scale_intensity


def prepared(path: Path, spacing: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    return load_prepared(Case("a", path), spacing)


def blob(
    shape: tuple[int, ...], spacing: tuple[float, ...], centre_mm: tuple[float, ...], width_mm: float
) -> np.ndarray:
    """A Gaussian in a grid whose middle is the origin of the world."""
    axes = [((np.arange(n) - (n - 1) / 2) * mm - c) ** 2 for n, mm, c in zip(shape, spacing, centre_mm, strict=True)]
    return np.exp(-sum(np.meshgrid(*axes, indexing="ij")) / (2 * width_mm**2)).astype(np.float32)


def centroid_mm(array: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    return (np.array(ndimage.center_of_mass(array)) - (np.array(array.shape) - 1) / 2) * spacing


def flipped_axes(signs: tuple[int, int, int], order: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """`volume()` with its axes turned and swapped, and the affine that says so."""
    affine = np.eye(4)[[*order, 3]].T
    array = volume().transpose(order)
    for axis, sign in enumerate(signs):
        if sign < 0:
            array = np.flip(array, axis)
            affine[:3, 3] += affine[:3, axis] * (array.shape[axis] - 1)
            affine[:3, axis] *= -1
    return array, affine


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (-1, 1, -1)])
def test_every_orientation_gives_the_same_volume(tmp_path: Path, signs: tuple, order: tuple) -> None:
    array, affine = flipped_axes(signs, order)
    twin = prepared(write(tmp_path / "twin.nii.gz", array, affine=affine))
    assert (twin == prepared(write(tmp_path / "ras.nii.gz", volume()))).all()


def test_voxel_sizes_follow_their_axes(tmp_path: Path) -> None:
    affine = np.diag([3.0, 2.0, 1.0, 1.0])[[2, 1, 0, 3]]
    assert prepared(write(tmp_path / "a.nii.gz", volume(), affine=affine)).shape == (8, 24, 30)


def test_a_turned_head_is_read_in_its_own_axes(tmp_path: Path) -> None:
    turn = np.eye(4)
    turn[:2, :2] = [[0.9848, -0.1736], [0.1736, 0.9848]]
    oblique = prepared(write(tmp_path / "turned.nii.gz", volume(), affine=turn @ np.diag([2, 2, 2, 1])), (2, 2, 2))
    assert np.array_equal(oblique, prepared(write(tmp_path / "a.nii.gz", volume())))


@pytest.mark.parametrize("new", [(2, 2, 2), (1.1, 1.1, 1.1), (1, 1, 1), (0.7, 2.5, 4)])
def test_resampling_keeps_place_and_size(new: tuple[float, float, float]) -> None:
    old, shape = (1.0, 1.5, 3.0), (64, 43, 20)
    before = blob(shape, old, (4.2, -3.1, 5.0), 7)
    after = resample(before, old, new)
    assert np.abs(np.array(after.shape) * new - np.array(shape) * old).max() <= max(new) / 2
    assert np.abs(centroid_mm(after, new) - centroid_mm(before, old)).max() < 0.1
    assert after.sum() * np.prod(new) == pytest.approx(before.sum() * np.prod(old), rel=0.02)
    ideal = blob(after.shape, new, (4.2, -3.1, 5.0), 7)
    assert np.abs(after - ideal).max() < 0.11
    assert (after.min() >= before.min(), after.max() <= before.max()) == (True, True)


def test_downsampling_does_not_alias() -> None:
    stripes = np.zeros((60, 9, 9), np.float32)
    stripes[::2] = 1
    middle = resample(stripes, (1, 1, 1), (3, 3, 3))[3:-3]
    assert np.abs(middle - 0.5).max() < 0.01


def test_equal_voxel_sizes_leave_the_voxels_alone() -> None:
    array = volume().astype(np.float32)
    assert resample(array, (1, 1, 1), (1.0005, 1, 1)) is array
    assert resample(array, (1, 1, 1), (1.002, 1, 1)) is not array


def test_a_thin_volume_keeps_a_voxel() -> None:
    assert resample(np.ones((4, 4, 1), np.float32), (1, 1, 1), (1, 1, 9)).shape == (4, 4, 1)


@pytest.mark.parametrize("size", [1, 2, 7, 201, 1000])
def test_percentiles_are_numpys(size: int) -> None:
    array = np.random.default_rng(size).normal(size=size).astype(np.float32)
    wanted = [0, 0.5, 50, 99.5, 100]
    assert percentiles(array, wanted) == pytest.approx(np.percentile(array.astype(float), wanted), abs=1e-6)


def test_intensities_are_scaled_over_the_whole_volume_and_clipped() -> None:
    array = np.linspace(-200, 800, 10_001, dtype=np.float32).reshape(73, 137, 1)
    scaled = scale_intensity(array, "a")
    assert scaled.dtype == np.float32
    assert scaled.ravel()[[0, 5000]] == pytest.approx([0, 0.5 / 0.995], abs=1e-5)
    assert (scaled.ravel()[9950:] == 1).all()


def test_a_nearly_empty_volume_is_refused() -> None:
    array = np.zeros((10, 10, 10), np.float32)
    array[5, 5, 5] = 1
    with pytest.raises(DataError, match="a: is nearly empty"):
        scale_intensity(array, "a")


def test_a_box_from_the_middle() -> None:
    array = volume(shape=(10, 11, 12))
    assert (crop_or_pad(array, (4, 4, 12)) == array[3:7, 3:7]).all()


def test_a_box_from_a_given_place() -> None:
    array = volume()
    assert (crop_or_pad(array, (4, 5, 6), (6, 1, 2)) == array[6:10, 1:6, 2:8]).all()


def test_padding_is_zero_and_half_on_each_side() -> None:
    box = crop_or_pad(np.ones((4, 5, 12)), (8, 8, 8))
    assert box.sum() == 4 * 5 * 8
    assert box[2:6, 1:6].all()


def test_a_box_keeps_no_hold_of_the_volume() -> None:
    array = volume()
    assert not np.shares_memory(crop_or_pad(array, SHAPE), array)


def test_padded_size() -> None:
    assert padded_size((155, 240, 1, 8), 8) == (160, 240, 8, 8)

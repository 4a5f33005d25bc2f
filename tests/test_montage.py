import numpy as np
import pytest
import torch
from PIL import Image

from ldm3d.errors import OutputError
from ldm3d.montage import LABEL_COLOURS, Cell, largest_slices, montage, tensorboard_image, three_planes, window

SHAPE = (20, 30, 24)


def block(x=slice(None), y=slice(None), z=slice(None)):
    volume = np.zeros(SHAPE, dtype=np.float32)
    volume[x, y, z] = 1
    return volume


def centre_of_mass(plane):
    """Where the brightness is: -1 is left or top, 1 is right or bottom."""
    rows, columns = (np.linspace(-1, 1, n) for n in plane.shape)
    return float(plane.sum(0) @ columns / plane.sum()), float(plane.sum(1) @ rows / plane.sum())


def test_planes_have_the_shape_of_their_axes():
    axial, coronal, sagittal = three_planes(block())
    assert (axial.shape, coronal.shape, sagittal.shape) == ((30, 20), (24, 20), (24, 30))


def test_front_is_up_in_axial_and_left_in_sagittal():
    axial, _, sagittal = three_planes(block(y=slice(20, None)))
    assert centre_of_mass(axial)[1] < -0.5
    assert centre_of_mass(sagittal)[0] < -0.5


def test_top_of_the_head_is_up():
    _, coronal, sagittal = three_planes(block(z=slice(16, None)))
    assert centre_of_mass(coronal)[1] < -0.5
    assert centre_of_mass(sagittal)[1] < -0.5


def test_left_of_the_patient_is_right_in_the_picture():
    axial, coronal, _ = three_planes(block(x=slice(0, 6)))  # RAS: low x is left
    assert centre_of_mass(axial)[0] > 0.5
    assert centre_of_mass(coronal)[0] > 0.5


def test_planes_go_through_the_voxel_asked_for():
    volume = np.zeros(SHAPE, dtype=np.float32)
    volume[3, 25, 7] = 1
    for plane in three_planes(volume, (3, 25, 7)):
        assert plane.sum() == 1
    assert all(plane.sum() == 0 for plane in three_planes(volume))


def test_label_is_shown_where_it_is_largest():
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[4, 10:20, 5:9] = 1  # a sheet at x = 4
    label[8, 10, 5] = 1
    x, y, z = largest_slices(label)
    assert (x, y, z) == (4, 10, 5)
    assert largest_slices(np.zeros(SHAPE)) is None


def test_window_shows_tissue_between_black_and_white_and_survives_nan():
    volume = np.zeros(SHAPE, dtype=np.float32)
    volume[5:15] = np.random.default_rng(0).normal(500, 50, volume[5:15].shape)
    volume[10, 10, 10] = 1e6
    volume[10, 10, 11] = np.nan
    shown = window(volume)
    assert shown.min() == 0 and shown.max() == 1
    assert shown[0].max() == 0
    assert 0.6 < np.median(shown[5:15]) < 0.95
    assert not window(np.zeros(SHAPE)).any()


def test_window_of_negative_values_starts_below_zero():
    shown = window(np.random.default_rng(0).normal(0, 1, SHAPE))
    assert np.median(shown) == pytest.approx(0.5, abs=0.05)


def test_tensorboard_image_takes_tensors_and_puts_the_reconstruction_below():
    original = torch.ones(1, *SHAPE)
    image = tensorboard_image(original, torch.zeros(1, *SHAPE))
    _, height, _ = image.shape
    assert image.shape[0] == 1 and image.dtype == np.float32
    assert image[:, : height // 3].max() == 1
    assert image[:, height // 2 + 10 :].max() == 0


def test_tensorboard_image_stretches_by_spacing():
    one = tensorboard_image(block(), block())
    wide = tensorboard_image(block(), block(), spacing=(1, 1, 3))
    assert wide.shape[1] / wide.shape[2] > one.shape[1] / one.shape[2]


def picture(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_montage_enlarges_small_volumes_and_keeps_to_the_width(tmp_path):
    rng = np.random.default_rng(0)
    volumes = rng.random((5, *SHAPE), dtype=np.float32)
    montage({"real": volumes, "generated": volumes[:2]}, (4, 4, 4), tmp_path / "m.png", title="title")
    height, width, _ = picture(tmp_path / "m.png").shape
    assert 1700 <= width <= 1810  # four side by side
    assert height > 3 * 100  # five volumes take two lines, two take one
    assert [p.name for p in tmp_path.iterdir()] == ["m.png"]


def test_montage_shows_rows_in_order_and_values_as_grey(tmp_path):
    rows = {"dark": [np.full(SHAPE, 0.25)], "bright": [np.full(SHAPE, 0.75)]}
    montage(rows, (1, 1, 1), tmp_path / "m.png")
    column = picture(tmp_path / "m.png")[:, 200, 0]
    levels = [int(v) for v in column if v in (64, 191)]
    assert levels == sorted(levels) and set(levels) == {64, 191}


def test_every_volume_of_a_long_row_is_shown(tmp_path):
    levels = (0.2, 0.4, 0.6, 0.8, 1.0)
    montage({"a": [np.full(SHAPE, level) for level in levels]}, (1, 1, 1), tmp_path / "m.png")
    pixels = picture(tmp_path / "m.png")
    assert all((pixels == round(255 * level)).all(-1).sum() > 10_000 for level in levels)


def test_montage_spends_no_room_on_air(tmp_path):
    small = np.zeros((60, 60, 60), dtype=np.float32)
    small[25:35, 25:35, 25:35] = 0.5
    montage({"a": [small]}, (1, 1, 1), tmp_path / "m.png")
    assert (picture(tmp_path / "m.png") > 100).mean() > 0.5


def test_label_is_drawn_in_colour_over_what_lies_below(tmp_path):
    label = block(slice(5, 12), slice(5, 20), slice(6, 18)).astype(np.uint8)
    montage({"a": [Cell(np.full(SHAPE, 0.5), label, caption="with label")]}, (1, 1, 1), tmp_path / "m.png")
    pixels = picture(tmp_path / "m.png")
    outline = (pixels == LABEL_COLOURS[0]).all(-1)
    inside = (pixels[..., 0] - pixels[..., 1]) > 20
    assert 100 < outline.sum() < 0.3 * inside.sum()
    assert (pixels == 128).all(-1).any()  # the rest stays grey


@pytest.mark.parametrize("rows", [{}, {"nothing": []}, {"black": [np.zeros(SHAPE)]}])
def test_montage_of_nothing_is_a_picture_too(tmp_path, rows):
    montage(rows, (1, 1, 1), tmp_path / "m.png")
    assert picture(tmp_path / "m.png").size


def test_montage_into_an_impossible_place_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        montage({"a": [block()]}, (1, 1, 1), tmp_path / "file" / "m.png")


def test_more_than_one_volume_is_our_own_mistake():
    with pytest.raises(ValueError, match="one volume"):
        three_planes(np.zeros((2, *SHAPE)))

import gzip
import json

import nibabel as nib
import numpy as np
import pytest

from ldm3d.errors import DataError, OutputError
from ldm3d.nifti import INT16_MAX, centred_affine, num_channels, read_volume, spacing_of, stem_of, write_volume

SHAPE, SPACING = (7, 9, 5), (1.5, 2.0, 4.0)


@pytest.fixture
def volume():
    values = np.random.default_rng(0).random(SHAPE, dtype=np.float32)
    values[0, 0, 0], values[-1, -1, -1] = 0, 1
    return values


def save(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_centred_affine_puts_the_middle_of_the_volume_at_the_origin():
    affine = centred_affine(SHAPE, SPACING)
    middle = (np.array(SHAPE) - 1) / 2
    assert np.allclose(affine @ [*middle, 1], [0, 0, 0, 1])
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    assert spacing_of(affine) == SPACING


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("int16", 0.51 / INT16_MAX)])
def test_written_volume_reads_back(tmp_path, volume, dtype, error):
    write_volume(tmp_path / "a.nii.gz", volume, SPACING, dtype)
    back, affine = read_volume(tmp_path / "a.nii.gz")
    assert back.dtype == np.float32
    assert np.abs(back - volume).max() <= error
    assert back.min() >= 0 and back.max() <= 1
    assert np.allclose(affine, centred_affine(SHAPE, SPACING))


def test_header_says_where_and_in_what_units(tmp_path, volume):
    write_volume(tmp_path / "a.nii.gz", volume, SPACING, "int16")
    image = nib.load(tmp_path / "a.nii.gz")
    assert (image.header["qform_code"], image.header["sform_code"]) == (1, 1)
    assert np.allclose(image.get_qform(), image.get_sform())
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms() == SPACING
    assert image.get_data_dtype() == np.int16


def test_same_input_same_bytes(tmp_path, volume):
    for name in ("a", "other_name"):
        write_volume(tmp_path / f"{name}.nii.gz", volume, SPACING)
    raw = (tmp_path / "a.nii.gz").read_bytes()
    assert raw == (tmp_path / "other_name.nii.gz").read_bytes()
    flags, mtime = raw[3], raw[4:8]
    assert flags == 0 and mtime == bytes(4)  # neither name nor time: also the same tomorrow


def test_sidecar_stands_beside_the_volume(tmp_path, volume):
    write_volume(tmp_path / "synimg_1_0.nii.gz", volume, SPACING, sidecar={"seed": 1})
    assert json.loads((tmp_path / "synimg_1_0.json").read_text()) == {"seed": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["synimg_1_0.json", "synimg_1_0.nii.gz"]


def test_no_volume_appears_without_its_sidecar(tmp_path, volume):
    with pytest.raises(TypeError):
        write_volume(tmp_path / "a.nii.gz", volume, SPACING, sidecar={"cannot be JSON": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "dtype", "complaint"),
    [(np.nan, "float32", "NaN"), (np.inf, "int16", "NaN or infinite"), (1.2, "int16", r"\[0, 1\]")],
)
def test_bad_values_are_not_written(tmp_path, volume, change, dtype, complaint):
    volume[1, 1, 1] = change
    with pytest.raises(OutputError, match=complaint):
        write_volume(tmp_path / "a.nii.gz", volume, SPACING, dtype)
    assert list(tmp_path.iterdir()) == []


def test_name_without_nii_gz_is_refused(tmp_path, volume):
    for name in ("a", "a.gz", "a.img", "anii.gz", "a.nii.bz2"):
        with pytest.raises(OutputError, match=r"must end with \.nii\.gz or \.nii"):
            write_volume(tmp_path / name, volume, SPACING)


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_without_compression_the_content_is_the_same(tmp_path, volume, dtype):
    for name in ("a.nii", "a.nii.gz"):
        write_volume(tmp_path / name, volume, SPACING, dtype)
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == (tmp_path / "a.nii").read_bytes()


def test_folder_that_cannot_be_is_refused(tmp_path, volume):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_volume(tmp_path / "file" / "a.nii.gz", volume, SPACING)


def test_volume_is_turned_to_ras(tmp_path):
    stored = np.zeros((4, 5, 6), dtype=np.float32)  # axes of the file: z downwards, x to the left, y to the front
    stored[1, 0, 5] = 1
    affine = np.array([[0, -2, 0, 10], [0, 0, 3, 20], [-4, 0, 0, 30], [0, 0, 0, 1]], dtype=float)
    volume, ras = read_volume(save(tmp_path / "a.nii.gz", stored, affine))
    assert volume.shape == (5, 6, 4)
    assert nib.aff2axcodes(ras) == ("R", "A", "S")
    assert spacing_of(ras) == (2, 3, 4)
    where = np.argwhere(volume == 1)[0]
    assert np.allclose(ras @ [*where, 1], affine @ [1, 0, 5, 1])


def test_channels_of_a_4d_file(tmp_path):
    array = np.random.default_rng(0).random((*SHAPE, 3), dtype=np.float32)
    path = save(tmp_path / "a.nii.gz", array)
    assert num_channels(path) == 3
    for channel in (2, 0, 1):
        assert np.array_equal(read_volume(path, channel)[0], array[..., channel])
    single = save(tmp_path / "b.nii.gz", array[..., :1])
    assert np.array_equal(read_volume(single)[0], array[..., 0])
    assert num_channels(save(tmp_path / "c.nii.gz", array[..., 0])) == 1


def test_only_as_much_is_decompressed_as_the_channel_needs(tmp_path):
    """A file that is cut after its second channel still gives the first two."""
    array = np.random.default_rng(0).random((32, 32, 32, 4), dtype=np.float32)
    raw = save(tmp_path / "a.nii.gz", array).read_bytes()
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(raw[: int(len(raw) * 0.55)])
    assert np.array_equal(read_volume(cut, 1)[0], array[..., 1])
    with pytest.raises(DataError, match=r"cut\.nii\.gz: is damaged or cut short"):
        read_volume(cut, 3)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("text.nii.gz", b"not a volume" * 50, "cannot be read as NIfTI"),
        ("text.nii", b"not a volume" * 50, "cannot be read as NIfTI"),
        ("gzipped_text.nii.gz", gzip.compress(b"not a volume" * 50, mtime=0), "cannot be read as NIfTI"),
        ("empty.nii.gz", b"", "cannot be read as NIfTI"),
    ],
)
def test_what_is_not_nifti_is_refused(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {complaint}"):
        read_volume(tmp_path / name)


def test_other_problems_name_the_file_and_the_reason(tmp_path):
    array = np.zeros((*SHAPE, 2), dtype=np.float32)
    four = save(tmp_path / "four.nii.gz", array)
    cases = {
        "has 2 channels; say which one": (four, None),
        "has no channel 2": (four, 2),
        "has no channel -1": (four, -1),
        "has no channel 1; it has 1": (save(tmp_path / "three.nii.gz", array[..., 0]), 1),
        r"has shape \(7, 9, 5, 2, 2\)": (save(tmp_path / "five.nii.gz", np.zeros((*SHAPE, 2, 2))), 0),
        r"has shape \(7, 9\)": (save(tmp_path / "two.nii.gz", array[:, :, 0, 0]), None),
        "complex64": (save(tmp_path / "complex.nii.gz", array[..., 0].astype(np.complex64)), None),
        "there is no such file": (tmp_path / "missing.nii.gz", None),
        "cannot be read": (tmp_path, None),
    }
    for complaint, (path, channel) in cases.items():
        with pytest.raises(DataError, match=f"{path.name}: .*{complaint}"):
            read_volume(path, channel)


def test_damaged_file_is_refused(tmp_path, volume):
    raw = save(tmp_path / "a.nii", volume).read_bytes()
    (tmp_path / "a.nii").write_bytes(raw[:500])
    with pytest.raises(DataError, match="is damaged or cut short"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("srow_x", 0, "does not say where the voxels are"),
        # Its determinant is 1, but beside the second axis' step the first one's is nothing.
        ("srow_y", (1e38, 1, 0, 0), "does not say where the voxels are"),
        ("dim", (3, 7, 9, -17398, 1, 1, 1, 1), "has shape"),
    ],
)
def test_header_without_meaning_is_refused(tmp_path, volume, field, value, complaint):
    image = nib.Nifti1Image(volume, np.eye(4))
    image.header["sform_code"], image.header[field] = 1, value
    path = tmp_path / "a.nii"
    path.write_bytes(image.header.binaryblock + bytes(4) + volume.tobytes())
    with pytest.raises(DataError, match=complaint):
        read_volume(path)


def test_stem():
    assert [stem_of(n) for n in ("x/a.b.nii.gz", "a.nii", "a")] == ["a.b", "a", "a"]

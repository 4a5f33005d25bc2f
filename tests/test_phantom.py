"""The embedded data set: anatomy, contrasts, layout, and that it does not depend on how it is made."""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from ldm3d import phantom
from ldm3d.errors import DataError, UserError
from ldm3d.phantom import Phantom, make_phantom, write_dataset
from ldm3d.phantom_anatomy import draw_anatomy

FLAIR, T1W, T1GD, T2W = range(4)
EDEMA, NECROSIS, RIM = 1, 2, 3
SMALL = {"shape": (24, 32, 24), "spacing": 6.4}


@pytest.fixture(scope="module")
def subjects() -> list[Phantom]:
    return [make_phantom(seed, 0) for seed in range(20)]


def tissues(subject: Phantom) -> dict[str, np.ndarray]:
    """Where healthy CSF, grey and white matter are, judged by T1w alone, away from the surface of the brain."""
    t1 = subject.image[T1W]
    inner = ndimage.binary_erosion(t1 > 0, iterations=2) & (ndimage.grey_dilation(subject.label, 5) == 0)
    level = t1 / np.percentile(t1[inner], 95)
    bands = {"csf": (0.1, 0.4), "grey": (0.62, 0.76), "white": (0.9, 1.1)}
    return {name: inner & (level > low) & (level < high) for name, (low, high) in bands.items()}


def means(subject: Phantom, channel: int) -> dict[str, float]:
    parts = tissues(subject) | {"edema": subject.label == EDEMA, "dead": subject.label == NECROSIS}
    parts |= {"rim": subject.label == RIM}
    return {name: float(np.median(subject.image[channel][where])) for name, where in parts.items()}


def ventricle_ml(subject: Phantom) -> float:
    """Volume of the largest dark lake of FLAIR deep inside the brain."""
    flair = subject.image[FLAIR]
    deep = ndimage.distance_transform_edt(flair > 0) > 5
    dark = deep & (flair < 0.6 * np.median(flair[flair > 0])) & (subject.label == 0)
    parts, _ = ndimage.label(dark)
    return float(np.bincount(parts.ravel())[1:].max(initial=0) * 3.2**3 / 1000)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_arrays(subjects):
    subject = subjects[0]
    assert subject.image.shape == (4, 48, 64, 48)
    assert subject.image.dtype == np.float32
    assert subject.label.shape == (48, 64, 48)
    assert subject.label.dtype == np.uint8
    assert np.isfinite(subject.image).all()
    assert subject.image.min() == 0
    centre = (np.array(subject.label.shape) - 1) / 2
    assert subject.affine @ [*centre, 1] == pytest.approx([0, 0, 0, 1])
    assert nib.aff2axcodes(subject.affine) == ("R", "A", "S")


def test_same_seed_and_index_same_subject(subjects):
    again = make_phantom(3, 0)
    assert np.array_equal(again.image, subjects[3].image)
    assert np.array_equal(again.label, subjects[3].label)
    assert not np.array_equal(make_phantom(3, 1).image, subjects[3].image)


def test_contrasts_have_the_order_of_a_scanner(subjects):
    for subject in subjects:
        flair, t1, gd, t2 = (means(subject, channel) for channel in range(4))
        assert flair["csf"] < flair["white"] < flair["grey"] < flair["edema"]
        assert t2["white"] < t2["grey"] < t2["edema"] < t2["csf"]
        assert max(t1["edema"], t1["dead"], t1["rim"]) < 0.9 * t1["white"]
        assert gd["rim"] > 1.15 * gd["white"]
        assert gd["dead"] < gd["grey"] < gd["white"]


def test_white_matter_is_crisp(subjects):
    for subject in subjects[:5]:
        white = tissues(subject)["white"]
        t1 = np.where(white, subject.image[T1W], np.nan)
        # Differences of neighbours see noise but not shading; noise is about 1.3 percent, texture little more.
        noise = np.nanstd(np.diff(t1, axis=0)) / np.sqrt(2) / np.nanmedian(t1)
        assert 0.005 < noise < 0.04


def test_ventricles_are_there_and_vary(subjects):
    volumes = [ventricle_ml(subject) for subject in subjects]
    assert min(volumes) > 2
    assert max(volumes) > 3 * min(volumes)


def changed(monkeypatch, **anatomy) -> Phantom:
    """Subject 11 with parts of its anatomy set by hand."""
    with monkeypatch.context() as patch:
        patch.setattr(phantom, "draw_anatomy", lambda rng: dataclasses.replace(draw_anatomy(rng), **anatomy))
        return make_phantom(11, 0)


def test_ventricles_and_sulci_widen_as_asked(monkeypatch):
    narrow, wide = (changed(monkeypatch, ventricles=(mm, mm)) for mm in (-1.5, 5.0))
    assert ventricle_ml(wide) > 2.5 * ventricle_ml(narrow)
    left = changed(monkeypatch, ventricles=(5.0, -1.5))
    dark = tissues(left)["csf"] & ~tissues(narrow)["csf"]
    assert dark[:24].sum() > 3 * dark[24:].sum()
    tight, open_ = (tissues(changed(monkeypatch, sulci=log))["csf"].sum() for log in (0.0, 1.5))
    assert open_ > 1.3 * tight


def test_ages_differ():
    drawn = [draw_anatomy(np.random.default_rng(seed)) for seed in range(60)]
    assert np.std([anatomy.ventricles for anatomy in drawn]) > 1.2
    assert np.std([anatomy.sulci for anatomy in drawn]) > 0.25


def test_tumour_lies_in_the_brain_with_all_its_classes(subjects):
    for subject in subjects:
        brain = (subject.image > 0).all(0)
        assert set(np.unique(subject.label)) == {0, EDEMA, NECROSIS, RIM}
        assert brain[subject.label > 0].all()
        core = subject.label >= NECROSIS
        _, pieces = ndimage.label(ndimage.binary_dilation(core))
        assert pieces <= 2
        # The rim wraps the dead core: what touches necrosis is rim far more often than anything else.
        around = subject.label[ndimage.binary_dilation(subject.label == NECROSIS) & (subject.label != NECROSIS)]
        assert (around == RIM).mean() > 0.5


def test_tumours_vary_in_size_and_place(subjects):
    volumes = [float((subject.label >= NECROSIS).sum() * 3.2**3 / 1000) for subject in subjects]
    centres = np.array([np.argwhere(subject.label >= NECROSIS).mean(0) for subject in subjects]) * 3.2
    assert max(volumes) > 5 * min(volumes)
    assert (centres.std(0) > [15, 15, 8]).all()
    right = centres[:, 0] > 23.5 * 3.2
    assert 3 <= right.sum() <= 17


def test_subjects_differ_in_anatomy_not_only_in_noise(subjects):
    masks = [subject.image[T1W] > 0 for subject in subjects]
    volumes = np.array([mask.sum() for mask in masks]) * 3.2**3 / 1000
    assert 1100 < volumes.min() < volumes.max() < 2100
    assert volumes.std() > 50
    for a, b in itertools.pairwise(masks):
        assert 0.85 < 2 * (a & b).sum() / (a.sum() + b.sum()) < 0.985
    white = [tissues(subject)["white"] for subject in subjects[:2]]
    both = masks[0] & masks[1]
    assert (white[0] != white[1])[both].mean() > 0.1


def test_no_brain_is_cut_by_the_default_grid(subjects):
    for subject in subjects:
        brain = subject.image.any(0)
        for axis in range(3):
            assert not brain.take([0, -1], axis).any()


def test_outside_is_zero_and_the_brain_is_one_piece(subjects):
    for subject in subjects[:5]:
        assert (subject.image[:, subject.image[T1W] == 0] == 0).all()
        _, pieces = ndimage.label(subject.image[T1W] > 0)
        assert pieces == 1


def test_a_subject_keeps_its_anatomy_at_any_spacing(subjects):
    fine = make_phantom(2, 0, (64, 84, 64), 2.4)
    coarse = subjects[2]
    assert (fine.image[T1W] > 0).sum() * 2.4**3 == pytest.approx((coarse.image[T1W] > 0).sum() * 3.2**3, rel=0.03)
    assert (fine.label >= 2).sum() * 2.4**3 == pytest.approx((coarse.label >= 2).sum() * 3.2**3, rel=0.2)
    ends = [(p.affine @ [*np.argwhere(p.label >= NECROSIS).mean(0), 1])[:3] for p in (fine, coarse)]
    assert np.linalg.norm(ends[0] - ends[1]) < 2


def test_a_voxel_shows_the_mean_of_what_it_covers(subjects):
    coarse = subjects[2].image[T1W]
    fine = make_phantom(2, 0, (96, 128, 96), 1.6).image[T1W].reshape(48, 2, 64, 2, 48, 2).mean((1, 3, 5))
    inner = ndimage.binary_erosion(coarse > 0, iterations=2)
    # Sampling the template without averaging it first gives 0.045, mostly along borders; noise alone gives 0.015.
    assert (fine - coarse)[inner].std() / np.percentile(coarse[inner], 95) < 0.038


def test_a_grid_that_cuts_the_brain_is_the_users_choice():
    assert make_phantom(0, 0, (3, 1, 2), 1.0).image.shape == (4, 3, 1, 2)
    assert make_phantom(0, 0, (20, 20, 20), 20.0).label.shape == (20, 20, 20)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": -1, "index": 0},
        {"seed": 0, "index": -1},
        {"seed": 0, "index": 0, "shape": (48, 64)},
        {"seed": 0, "index": 0, "shape": (48, 0, 48)},
        {"seed": 0, "index": 0, "shape": (48, 6.5, 48)},
        {"seed": 0, "index": 0, "spacing": 0},
        {"seed": 0, "index": 0, "spacing": float("nan")},
    ],
)
def test_nonsense_is_refused(arguments):
    with pytest.raises(UserError, match=r"phantom: .* must be"):
        make_phantom(**arguments)


@pytest.mark.parametrize(
    "wrong", [{"num": 0}, {"num": 2, "workers": 0}, {"num": 2, "seed": -1}, {"num": 2, "shape": (1,)}]
)
def test_nonsense_is_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(UserError, match="must be"):
        write_dataset(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_layout_is_the_decathlons(tmp_path):
    write_dataset(tmp_path, 2, seed=5, **SMALL)
    folder = tmp_path / "Task01_BrainTumour"
    described = json.loads((folder / "dataset.json").read_text())
    assert described["modality"] == {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    assert described["labels"] == {
        "0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"
    }  # fmt: skip
    assert (described["numTraining"], described["numTest"], described["test"]) == (2, 0, [])
    assert {"name", "description"} <= set(described)
    assert described["training"][0] == {
        "image": "./imagesTr/BRATS_001.nii.gz",
        "label": "./labelsTr/BRATS_001.nii.gz",
    }
    for index, case in enumerate(described["training"]):
        made = make_phantom(5, index, **SMALL)
        image, label = nib.load(folder / case["image"]), nib.load(folder / case["label"])
        assert image.shape == (24, 32, 24, 4)
        assert image.header.get_zooms()[:3] == pytest.approx((6.4, 6.4, 6.4))
        assert np.allclose(image.affine, made.affine, atol=1e-4)
        assert np.allclose(label.affine, made.affine, atol=1e-4)
        assert np.abs(np.moveaxis(image.get_fdata(), -1, 0) - made.image).max() <= 0.5
        assert np.array_equal(np.asanyarray(label.dataobj), made.label)
    found = {path.name for path in folder.rglob("*") if path.is_file()}
    assert found == {"dataset.json", "BRATS_001.nii.gz", "BRATS_002.nii.gz"}


def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    write_dataset(tmp_path / "one", 5, seed=7, workers=1, **SMALL)
    write_dataset(tmp_path / "three", 5, seed=7, workers=3, **SMALL)
    assert digests(tmp_path / "one") == digests(tmp_path / "three")
    assert len(digests(tmp_path / "one")) == 11


def test_second_call_makes_nothing_and_an_interrupted_one_is_finished(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, 3, seed=1, **SMALL)
    before = digests(tmp_path)
    made = []
    write_case = phantom._write_case
    monkeypatch.setattr(phantom, "_write_case", lambda *args: made.append(args[-1]) or write_case(*args))
    capsys.readouterr()
    write_dataset(tmp_path, 3, seed=1, **SMALL)
    assert not made
    assert "there already" in capsys.readouterr().err
    folder = tmp_path / "Task01_BrainTumour"
    (folder / "labelsTr" / "BRATS_002.nii.gz").unlink()
    write_dataset(tmp_path, 3, seed=1, **SMALL)
    assert made == [1]
    assert digests(tmp_path) == before


@pytest.mark.parametrize("other", [{"num": 3}, {"seed": 2}, {"spacing": 6.0}, {"shape": (24, 32, 26)}])
def test_other_parameters_are_refused_not_mixed(tmp_path, other):
    first = {"num": 2, "seed": 1, **SMALL}
    write_dataset(tmp_path, **first)
    before = digests(tmp_path)
    with pytest.raises(DataError, match="remove the folder"):
        write_dataset(tmp_path, **{**first, **other})
    assert digests(tmp_path) == before


def test_an_unfinished_set_is_not_mixed_with_another(tmp_path, monkeypatch):
    def stop_at_second(folder, seed, shape, spacing, index):
        if index == 1:
            raise KeyboardInterrupt
        write_case(folder, seed, shape, spacing, index)

    write_case = phantom._write_case
    monkeypatch.setattr(phantom, "_write_case", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path, 3, seed=1, **SMALL)
    folder = tmp_path / "Task01_BrainTumour"
    assert (folder / "imagesTr" / "BRATS_001.nii.gz").is_file()
    assert not (folder / "dataset.json").exists()
    monkeypatch.undo()
    with pytest.raises(DataError, match="remove the folder"):
        write_dataset(tmp_path, 3, seed=2, **SMALL)
    write_dataset(tmp_path, 3, seed=1, **SMALL)
    write_dataset(tmp_path / "fresh", 3, seed=1, **SMALL)
    assert digests(folder) == digests(tmp_path / "fresh" / "Task01_BrainTumour")


@pytest.mark.parametrize("foreign", ["dataset.json", "imagesTr/BRATS_001.nii.gz"])
def test_somebody_elses_data_is_left_alone(tmp_path, foreign):
    path = tmp_path / "Task01_BrainTumour" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(DataError, match="another data set"):
        write_dataset(tmp_path, 1, **SMALL)
    assert digests(tmp_path) == {f"Task01_BrainTumour/{foreign}": hashlib.sha256(b"{}").hexdigest()}


def test_a_missing_template_is_a_clear_error(monkeypatch):
    from ldm3d import phantom_template

    monkeypatch.setattr(phantom_template, "FILE_NAME", "gone_{}.nii.gz")
    phantom_template.load_template.cache_clear()
    phantom_template._fine_template.cache_clear()
    with pytest.raises(DataError, match="pip install nilearn"):
        make_phantom(0, 0)
    monkeypatch.undo()
    make_phantom(0, 0, (4, 4, 4), 10.0)

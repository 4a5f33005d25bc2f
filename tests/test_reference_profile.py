"""The reference profile: what it holds and what it must not, and that training and monitors measure alike."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from ldm3d import training_profile as module
from ldm3d.brain import IMAGE_FEATURES, brain_mask, coarse, image_features, match
from ldm3d.cards import AUTOENCODER
from ldm3d.data import Prepared, prepare_data
from ldm3d.errors import DataError, UserError
from ldm3d.nifti import orientation_of, read_volume
from ldm3d.phantom import make_phantom, write_dataset
from ldm3d.reference_profile import FEATURES, FILE, read_profile, write_profile
from ldm3d.schema import Config, Environment
from ldm3d.training_profile import drawn, training_profile
from ldm3d.volumes import scale_intensity
from ldm3d.weights import save_weights
from mlops.monitoring import drift_folder, make_profile
from mlops.monitoring.drift_folder import encoder, measure, measure_folder

COUNT = 8
SIZE = [16, 24, 16]


@pytest.fixture(scope="module")
def cfg() -> Config:
    return tiny.config(spacing=[9, 9, 9], diffusion_train={"patch_size": SIZE, "flip": True})


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder, COUNT, shape=(24, 32, 24), spacing=6.0)
    return folder


@pytest.fixture
def env(tmp_path: Path, data_folder: Path) -> Environment:
    model = tmp_path / "model"
    return Environment(model_dir=model, tfevent_path=model, output_dir=model, data_base_dir=data_folder)


@pytest.fixture
def data(cfg: Config, env: Environment) -> Prepared:
    return prepare_data(cfg, env)


def test_training_and_monitors_measure_alike(cfg: Config, env: Environment, data: Prepared) -> None:
    """The same files, once through the cache of prepared volumes, once read by the monitor."""
    profile = training_profile(cfg, data, env.model_dir)
    new = []
    for case in data.split.train:
        raw, affine = read_volume(case.image, case.channel)
        new.append(measure(case.image, orientation_of(case.image), raw, affine, profile, None).features)
    assert set(profile.features) == set(new[0]) == set(FEATURES)
    for name, values in profile.features.items():
        if name != "mean_match":  # of a training volume with the mean of the others
            assert values == pytest.approx(sorted(one[name] for one in new), rel=2e-3, abs=1e-4), name
    assert profile.facts == {"orientation": {"RAS": COUNT - 1}, "scanner": {"unknown": COUNT - 1}}
    assert max(profile.features["mean_match"]) <= max(one["mean_match"] for one in new)


def test_it_names_nobody_and_gives_no_line_of_one_patient(cfg: Config, env: Environment, data: Prepared) -> None:
    profile = training_profile(cfg, data, env.model_dir)
    write_profile(env.model_dir, profile)
    text = (env.model_dir / FILE).read_text()
    assert "BRATS" not in text and str(env.data_base_dir) not in text
    assert all(values == sorted(values) for values in [*profile.features.values(), profile.pair_distances])
    assert read_profile(env.model_dir) == profile == read_profile(env.model_dir / FILE)
    write_profile(env.model_dir, training_profile(cfg, data, env.model_dir))
    assert (env.model_dir / FILE).read_text() == text
    assert len(text.splitlines()) < 200  # a list is one line


def test_only_a_first_start_measures(
    cfg: Config, env: Environment, data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = training_profile(cfg, data, env.model_dir)
    write_profile(env.model_dir, profile)

    def measured(*args: Any) -> None:
        raise DataError("measured")

    monkeypatch.setattr(module, "volume_facts", measured)
    assert training_profile(cfg, data, env.model_dir) == profile
    for other in ({"trained_on": "0" * 16}, {"size": (8, 8, 8)}, {"spacing": (1.0, 1.0, 1.0)}):
        write_profile(env.model_dir, profile.model_copy(update=other))
        with pytest.raises(DataError, match="measured"):
            training_profile(cfg, data, env.model_dir)
    (env.model_dir / FILE).write_text("damaged")
    with pytest.raises(DataError, match="measured"):
        training_profile(cfg, data, env.model_dir)


def test_of_many_volumes_some_are_drawn(
    cfg: Config, env: Environment, data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGEST", 3)
    profile = training_profile(cfg, data, env.model_dir)
    assert profile.num_train == COUNT - 1
    assert {len(values) for values in profile.features.values()} == {3}
    names = [f"case{i}" for i in range(50)]
    assert drawn(names, 5) == drawn(names[::-1], 5) == drawn(names, 50)[:5] != names[:5]


def test_of_a_large_folder_some_are_judged(
    cfg: Config, env: Environment, data: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = training_profile(cfg, data, env.model_dir)
    monkeypatch.setattr(drift_folder, "LARGEST", 3)
    folder = measure_folder(env.data_base_dir, profile, env.model_dir)
    assert (folder.found, len(folder.judged), folder.unreadable) == (COUNT, 3, {})
    assert folder.latents is None and "there is no" in folder.no_latents
    with pytest.raises(UserError, match="is of channel -1"):
        measure_folder(env.data_base_dir, profile.model_copy(update={"channel": -1}), env.model_dir)
    monkeypatch.setattr(drift_folder, "LARGEST", 256)
    assert set(folder.judged) < set(measure_folder(env.data_base_dir, profile, env.model_dir).judged)


def weights_of(cfg: Config, model_dir: Path, trained_on: str) -> None:
    card = tiny.autoencoder_card(cfg).model_copy(update={"trained_on": trained_on})
    save_weights(model_dir / AUTOENCODER, tiny.autoencoder(cfg).state_dict(), card)


def made(cfg: Config, env: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command."""
    files = [tmp_path / "config.json", tmp_path / "environment.json"]
    files[0].write_text(cfg.model_dump_json(by_alias=True, exclude_none=True))
    files[1].write_text(env.model_dump_json(exclude_none=True))
    monkeypatch.setattr("sys.argv", ["make_profile", "-c", str(files[0]), "-e", str(files[1])])
    make_profile.main()


def test_the_command_adds_a_profile_to_weights(
    cfg: Config, env: Environment, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_of(cfg, env.model_dir, data.digest())
    made(cfg, env, tmp_path, monkeypatch)
    profile = read_profile(env.model_dir)
    assert profile.trained_on == data.digest() and profile.latents
    encode, why_not = encoder(profile, env.model_dir)
    assert encode, why_not
    rows = []
    for case in data.split.train:
        raw, affine = read_volume(case.image, case.channel)
        rows.append(measure(case.image, "RAS", raw, affine, profile, encode).latent)
    # In the order of a hash, which is not that of the cases.
    assert np.allclose(sorted(rows), sorted(profile.latents.rows), atol=5e-3)


def test_the_command_refuses_other_data(
    cfg: Config, env: Environment, data: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_of(cfg, env.model_dir, "0" * 16)
    with pytest.raises(UserError, match="not the data that"):
        made(cfg, env, tmp_path, monkeypatch)
    assert not (env.model_dir / FILE).exists()


# What is measured of one volume.


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no number": ({"pair_distances": [0.1, float("nan")]}, "no numbers"),
    "no end": ({"mean_image": [float("inf")] * 512}, "no numbers"),
    "no facts": ({"facts": {"orientation": {}, "scanner": {}}}, "count no volumes"),
    "no voxels": ({"spacing": [0, 1, 1]}, "must be positive"),
    "rows of latents": ({"latents": {"autoencoder_sha256": "", "rows": [[1, 2], [3]]}}, "differ in length"),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_profile_that_cannot_be_compared_with_is_refused(
    cfg: Config, env: Environment, data: Prepared, change: dict[str, Any], said: str
) -> None:
    """With NaN in it every test would say "no drift"."""
    profile = training_profile(cfg, data, env.model_dir)
    (env.model_dir / FILE).write_text(json.dumps(profile.model_dump(mode="json") | change))
    with pytest.raises(UserError, match=said):
        read_profile(env.model_dir)


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    return scale_intensity(make_phantom(5, 0).image[0], "phantom")


def test_figures_follow_what_is_done_to_a_volume(brain: np.ndarray) -> None:
    spacing = (3.2, 3.2, 3.2)
    plain = image_features(brain, spacing)
    assert tuple(plain) == IMAGE_FEATURES and all(np.isfinite(value) for value in plain.values())
    random = np.random.default_rng(0)
    noisy = image_features(np.where(brain > 0, brain + random.normal(0, 0.05, brain.shape), 0).clip(0), spacing)
    assert noisy["noise"] == pytest.approx(np.hypot(plain["noise"], 0.05), rel=0.15)
    ramp = np.linspace(0.6, 1.4, brain.shape[0])[:, None, None]
    assert image_features(brain * ramp, spacing)["shading"] > 2 * plain["shading"]
    double = image_features(brain, (6.4, 6.4, 6.4))
    assert double["brain_volume_ml"] == pytest.approx(8 * plain["brain_volume_ml"], rel=1e-3)
    assert double["brain_spread_y_mm"] == pytest.approx(2 * plain["brain_spread_y_mm"], rel=1e-3)
    mirrored = image_features(brain[:, ::-1], spacing)
    assert mirrored["brain_skew_y"] == pytest.approx(-plain["brain_skew_y"], rel=1e-3)
    assert mirrored["brain_skew_z"] == pytest.approx(plain["brain_skew_z"], rel=1e-3)
    image = coarse(brain)
    assert match(image, image) == pytest.approx(1)
    assert match(coarse(brain[:, :, ::-1]), image) < 0.95


BARELY_UNEVEN = 1 - 1e-5 * np.random.default_rng(0).random((16, 16, 16))


@pytest.mark.parametrize("volume", [np.zeros((16, 16, 16)), np.ones((16, 16, 16)), BARELY_UNEVEN])
def test_a_volume_without_a_brain_is_all_zeros(volume: np.ndarray) -> None:
    assert not brain_mask(volume).any()
    assert set(image_features(volume, (1, 1, 1)).values()) == {0.0}


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 17, 30), (3, 20, 1), (48, 64, 48)])
def test_coarse_images_of_any_shape(shape: tuple[int, int, int]) -> None:
    assert coarse(np.full(shape, 0.5)) == pytest.approx(np.full((8, 8, 8), 0.5))
    ramp = np.broadcast_to(np.arange(shape[1])[:, None], shape)
    assert (np.diff(coarse(ramp), axis=1) >= 0).all()

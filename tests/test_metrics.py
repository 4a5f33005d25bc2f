import json

import numpy as np
import pytest
import torch
from monai.metrics import SSIMMetric
from scipy import ndimage
from torchmetrics.image.kid import poly_mmd

from ldm3d.brain import brain_mask
from ldm3d.copies import TrainingSet, copy_check
from ldm3d.errors import DataError
from ldm3d.features import FeatureSpace, extract
from ldm3d.interior import interior
from ldm3d.metrics import TooFewVolumes, diversity, fidelity, ms_ssim, ms_ssim_settings, reconstruction
from ldm3d.phantom import make_phantom


@pytest.fixture(scope="module")
def brains():
    """22 brains (N, 48, 64, 48) of the embedded data set, FLAIR in [0, 1]."""
    images = (make_phantom(0, index).image[0] for index in range(22))
    return np.stack([(image / np.percentile(image, 99.5)).clip(0, 1) for image in images])


@pytest.fixture(scope="module")
def sets(brains):
    """(training, held out, fresh) volumes: three samples of the same distribution."""
    return brains[:8], brains[8:15], brains[15:]


def blurred(volumes, sigma):
    return np.stack([ndimage.gaussian_filter(volume, sigma) for volume in volumes])


def blobs(volumes):
    """The right outline with nothing in it."""
    masks = [brain_mask(volume) for volume in volumes]
    return np.stack([ndimage.gaussian_filter(m * v[m].mean(), 0.7) for v, m in zip(volumes, masks, strict=True)])


def random_noise(shape):
    return np.random.default_rng(0).random(shape, dtype=np.float32)


class TestReconstruction:
    def test_of_a_known_error(self):
        volume = np.full((1, 16, 16, 16), 0.5, dtype=np.float32)
        found = reconstruction(volume, volume + 0.1)
        assert found["psnr_db"]["value"] == pytest.approx(20, abs=1e-4)
        assert found["l1"]["value"] == pytest.approx(0.1, abs=1e-6)
        noisy = volume + np.random.default_rng(0).normal(0, 0.05, volume.shape)
        assert reconstruction(volume, noisy)["psnr_db"]["value"] == pytest.approx(26.02, abs=0.3)

    def test_of_the_same_volume(self, brains):
        found = reconstruction(brains[:2], torch.from_numpy(brains[:2]))
        assert found["ssim"]["value"] == pytest.approx(1, abs=1e-6)
        assert found["l1"]["value"] == 0
        assert found["psnr_db"]["value"] is None  # infinite, which JSON cannot say
        assert found["psnr_db"]["n"] == {"volumes": 2}

    def test_ssim_is_monais(self, brains):
        a, b = brains[:1], blurred(brains[:1], 1)
        expected = SSIMMetric(spatial_dims=3)(torch.from_numpy(a)[None], torch.from_numpy(b)[None]).item()
        assert reconstruction(a, b)["ssim"]["value"] == pytest.approx(expected, abs=1e-6)
        assert 0.3 < expected < 0.95

    def test_takes_mirrored_views_and_small_volumes(self):
        volume = random_noise((1, 7, 9, 8))
        assert reconstruction(volume, volume[:, ::-1])["ssim"]["value"] < 0.5

    def test_refuses_what_does_not_belong_together(self):
        with pytest.raises(DataError, match=r"\(8, 8, 9\).*\(8, 8, 8\)"):
            reconstruction(np.zeros((1, 8, 8, 8)), np.zeros((1, 8, 8, 9)))
        with pytest.raises(TooFewVolumes):
            reconstruction([], [])


class TestFidelity:
    def test_real_is_near_zero_and_worse_is_farther(self, sets):
        training, held_out, fresh = sets
        worse = {
            "real": fresh,
            "blurred": blurred(fresh, 0.7),
            "mean image": np.repeat(training.mean(0)[None], 7, axis=0),
            "noise": random_noise(fresh.shape),
        }
        found = {name: fidelity(held_out, volumes) for name, volumes in worse.items()}
        for metric in ("kid", "mmd"):
            values = [f[metric]["value"] for f in found.values()]
            floor = found["real"][metric]["references"]["real_halves"]
            assert abs(values[0]) < 3 * floor["std"]
            assert values == sorted(values), (metric, values)
            assert values[1] > 3 * floor["std"]
        assert found["noise"]["mmd"]["value"] <= 2

    def test_fog_is_as_far_as_the_mean_image(self, sets):
        training, held_out, fresh = sets
        found = fidelity(held_out, blurred(fresh, 2), fresh, training.mean(0))
        for metric in ("kid", "mmd"):
            references = found[metric]["references"]
            assert found[metric]["value"] > 0.8 * references["mean_image"] > 5 * abs(references["reconstructions"])

    def test_one_image_again_and_again_is_not_a_distribution(self, sets):
        _, held_out, fresh = sets
        repeated = np.repeat(fresh[:1], 7, axis=0)
        assert fidelity(held_out, repeated)["mmd"]["value"] > 0.2

    def test_kid_is_torchmetrics_estimator(self, sets):
        _, held_out, fresh = sets
        features = extract(held_out)
        space = FeatureSpace(features)
        real, other = space(features), space(extract(blurred(fresh, 0.5)))
        expected = poly_mmd(torch.from_numpy(real), torch.from_numpy(other)).item()
        assert space.kid(real, other) == pytest.approx(expected, rel=1e-9)

    def test_points_do_not_depend_on_the_rest_of_their_set(self, sets):
        _, held_out, fresh = sets
        space = FeatureSpace(extract(held_out))
        together = space(extract(fresh))
        assert np.array_equal(together[2:3], space(extract(fresh[2:3])))
        assert (space(extract(held_out)) ** 2).sum(1).mean() == pytest.approx(together.shape[1])

    def test_figures_carry_what_is_needed_to_read_them(self, sets):
        _, held_out, fresh = sets
        found = fidelity(held_out, fresh[:5])["kid"]
        assert found["direction"] == "lower is better"
        assert found["n"] == {"real": 7, "synthetic": 5}
        assert "ldm3d-image-features-1" in found["how"]
        assert found["references"]["real_halves"]["n"] == 3
        json.dumps(found, allow_nan=False)

    def test_too_few_or_too_small_volumes(self):
        volumes = random_noise((3, 16, 16, 16))
        with pytest.raises(TooFewVolumes, match="there are 3 and 1"):
            fidelity(volumes, volumes[:1])
        with pytest.raises(DataError, match="too small"):
            fidelity(volumes[:, :6], volumes[:, :6])
        assert fidelity(volumes, volumes)["kid"]["references"]["real_halves"] is None


class TestInterior:
    def test_mask_is_the_head(self, brains):
        for volume in brains[:4]:
            mask, head = brain_mask(volume), ndimage.binary_fill_holes(volume > 0)
            assert 2 * (mask & head).sum() / (mask.sum() + head.sum()) > 0.95

    def test_mask_of_nothing_is_empty(self):
        assert not brain_mask(np.zeros((8, 8, 8))).any()

    def test_fresh_brains_are_like_real(self, sets):
        _, held_out, fresh = sets
        found = interior(held_out, fresh)
        for name in ("sharpness", "interior_contrast", "interior_spread"):
            assert found[name]["value"] == pytest.approx(1, abs=0.2), name
        assert 0.5 < found["central_dark"]["value"] < 2

    def test_fog_fails(self, sets):
        _, held_out, fresh = sets
        found = interior(held_out, blurred(fresh, 2))
        assert found["sharpness"]["value"] < 0.4
        assert found["interior_contrast"]["value"] < 0.7
        assert found["central_dark"]["value"] < 0.5
        assert found["sharpness"]["references"]["synthetic_within_real"] == 0

    def test_the_right_outline_alone_fails(self, sets):
        _, held_out, fresh = sets
        found = interior(held_out, blobs(fresh), reconstructed=fresh)
        for name in ("sharpness", "interior_contrast", "interior_spread", "central_dark"):
            assert found[name]["value"] < 0.05, name
            assert found[name]["references"]["reconstructions"] > 0.5, name

    def test_noise_is_sharper_than_real(self, sets):
        _, held_out, fresh = sets
        noisy = fresh + np.random.default_rng(0).normal(0, 0.15, fresh.shape) * (fresh > 0)
        assert interior(held_out, noisy)["sharpness"]["value"] > 1.5

    def test_empty_volumes_are_zero_not_nan(self, sets):
        _, held_out, fresh = sets
        found = interior(held_out, np.zeros_like(fresh[:2]))
        assert all(metric["value"] == 0 for metric in found.values())
        without_unit = interior(np.zeros_like(fresh[:2]), fresh[:2])
        assert all(metric["value"] is None for metric in without_unit.values())
        with pytest.raises(TooFewVolumes):
            interior(held_out, [])


class TestDiversity:
    def test_identical_volumes_have_ms_ssim_1(self, brains):
        assert ms_ssim(brains[0], brains[0]) == pytest.approx(1, abs=1e-5)
        found = diversity(brains[:3], np.repeat(brains[:1], 3, axis=0))["ms_ssim_pairs"]
        assert found["value"] == pytest.approx(1, abs=1e-5)
        assert found["references"]["real"] < 0.8
        assert found["n"] == {"real": 3, "synthetic": 3, "real_pairs": 3, "synthetic_pairs": 3}

    def test_as_varied_as_real(self, sets):
        _, held_out, fresh = sets
        found = diversity(held_out, fresh, pairs=10)["ms_ssim_pairs"]
        assert found["value"] == pytest.approx(found["references"]["real"], abs=0.08)
        assert found["n"]["real_pairs"] == 10

    @pytest.mark.parametrize(("side", "scales"), [(9, 1), (16, 1), (24, 2), (48, 3), (112, 4), (176, 5)])
    def test_scales_fit_the_volume(self, side, scales):
        kernel, weights = ms_ssim_settings((side, 200, 200))
        assert len(weights) == scales and sum(weights) == pytest.approx(1)
        assert kernel == min(11, side)
        if side <= 48:
            volume = random_noise((side, side, side))
            assert ms_ssim(volume, volume) == pytest.approx(1, abs=1e-5)

    def test_needs_pairs(self, brains):
        with pytest.raises(TooFewVolumes):
            diversity(brains[:2], brains[:1])


class TestCopies:
    def check(self, sets, samples):
        training, held_out, _ = sets
        names = [f"case_{i}" for i in range(len(training))]
        return copy_check(TrainingSet(iter(training)), names, samples, [f"s{i}" for i in range(len(samples))], held_out)

    def test_planted_copies_are_found(self, sets):
        training, _, fresh = sets
        noise = np.random.default_rng(0).normal(0, 0.05, fresh[0].shape)
        planted = [
            (0.8 * training[3] + noise).clip(0, 1),
            training[5][::-1],
            blurred(training[6:7], 1.5)[0],
            np.roll(training[7], 1, axis=1),
        ]
        metric, samples = self.check(sets, planted)
        assert [s["nearest"] for s in samples] == ["case_3", "case_5", "case_6", "case_7"]
        assert [s["mirrored"] for s in samples] == [False, True, False, False]
        assert all(s["closer_than_all_real"] and s["relative_distance"] < 0.25 for s in samples)
        assert metric["value"] == 1 and metric["references"]["closer_than_real_min"] == 4

    def test_new_brains_and_averages_are_no_copies(self, sets):
        training, _, fresh = sets
        metric, samples = self.check(sets, [*fresh, training.mean(0), random_noise(fresh[0].shape)])
        relative = [s["relative_distance"] for s in samples]
        assert min(relative) > 0.5  # copies: below 0.2
        assert relative[-1] > 0.9 and not samples[-1]["closer_than_all_real"]
        assert metric["value"] < 0.5
        json.dumps([metric, samples], allow_nan=False)

    def test_large_volumes_are_kept_small(self):
        volumes = np.repeat(random_noise((3, 16, 16, 5)), 10, axis=1)  # 160 voxels, averaged to 54
        training = TrainingSet(volumes)
        assert training.nearest(volumes[1]).index == 1
        with pytest.raises(DataError, match="grid"):
            training.nearest(volumes[1][:50])

    def test_needs_something_to_compare_with(self, sets):
        training, _, fresh = sets
        with pytest.raises(TooFewVolumes, match="held-out"):
            copy_check(TrainingSet(training[:2]), ["a", "b"], fresh[:1], ["s"], [])
        with pytest.raises(TooFewVolumes):
            TrainingSet(training[:1])
        with pytest.raises(DataError, match="empty"):
            TrainingSet(np.zeros((2, 8, 8, 8)))

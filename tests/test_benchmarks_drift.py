"""benchmarks.drift: it counts alarms as they are, and names what raised them."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from benchmarks import drift
from benchmarks.drift_cases import CHANGES
from ldm3d.reference_profile import FEATURES, ReferenceProfile, read_profile
from mlops.monitoring.drift_folder import NewVolume


@pytest.fixture(scope="module")
def profile() -> ReferenceProfile:
    return read_profile(drift.MODEL)


def volumes(profile: ReferenceProfile, count: int, **changed: float) -> list[drift.Measured]:
    """Volumes drawn from the profile itself, each as it is and with some features changed."""
    random = np.random.default_rng(0)
    assert profile.latents
    rows = []
    for _ in range(count):
        features = {name: float(random.choice(profile.features[name])) for name in FEATURES}
        latent = profile.latents.rows[random.integers(len(profile.latents.rows))]
        other = NewVolume({**features, **changed}, "RAS", "unknown", latent)
        rows.append(dict.fromkeys(CHANGES, other) | {drift.UNCHANGED: NewVolume(features, "RAS", "unknown", latent)})
    return rows


def test_alarms_are_counted_and_named(profile: ReferenceProfile) -> None:
    rows = volumes(profile, 24, noise=0.5)
    quiet = drift.alarms(profile, [row[drift.UNCHANGED] for row in rows], drift.UNCHANGED, 8, 3)
    assert (quiet["folders"], quiet["alarms"], quiet["by"], quiet["first cause"]) == (3, 0, {}, {})
    loud = drift.alarms(profile, [row["noise"] for row in rows], "noise", 8, 3)
    assert (loud["alarms"], loud["by"], loud["first cause"]) == (3, {"noise": 3}, {"noise": 3})


def test_it_goes_on_from_what_was_measured(
    profile: ReferenceProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, output = tmp_path / "measured.pickle", tmp_path / "drift.json"
    kept.write_bytes(pickle.dumps(volumes(profile, 8, noise=0.5)))
    monkeypatch.setattr("sys.argv", ["drift.py", "--tiny", "--measured", str(kept), "--output", str(output)])
    drift.main()
    result = json.loads(output.read_text())
    assert [row["alarms"] for row in result["false_alarms"]] == [0]
    assert [row["change"] for row in result["changed"]] == [change for change in CHANGES if change != drift.UNCHANGED]
    assert {"command", "date", "commit", "machine"} == result["made"].keys()

"""data_drift: silent on fresh phantoms, loud on each change, exact about files it cannot read, and on the wire."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest

from benchmarks.drift_cases import CHANGES
from ldm3d.phantom import Phantom, make_phantom
from ldm3d.reference_profile import FILE
from mlops.commands import run_command
from mlops.monitoring import data_drift

DEMO = Path(__file__).resolve().parents[1] / "checkpoints" / "demo"
SEED, COUNT = 4711, 8


class Ran(NamedTuple):
    code: int
    out: str
    err: str
    result: dict[str, Any]


Drift = Callable[..., Ran]


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(SEED, index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's profile without its weights: nothing is encoded."""
    return Path(shutil.copy(DEMO / FILE, tmp_path_factory.mktemp("profile")))


@pytest.fixture
def drift(tmp_path: Path, profile: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Drift:
    """Run the command as a user does, but in this process."""

    def call(data: Path, *more: str, reference: Path = profile) -> Ran:
        output = tmp_path / "out"
        arguments = ["--reference", reference, "--data", data, "--output", output, *more]
        monkeypatch.setattr("sys.argv", ["data_drift", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_command(data_drift.main)
        out, err = capsys.readouterr()
        file = output / "drift.json"
        return Ran(int(ended.value.code or 0), out, err, json.loads(file.read_text()) if file.is_file() else {})

    return call


@pytest.fixture
def fresh(tmp_path: Path, phantoms: list[Phantom]) -> Path:
    return write(tmp_path / "fresh", phantoms, "as it is")


def write(folder: Path, phantoms: list[Phantom], change: str, axes: str = "RAS") -> Path:
    folder.mkdir()
    for number, phantom in enumerate(phantoms):
        raw, affine = CHANGES[change](phantom, np.random.default_rng(number))
        image = nib.Nifti1Image(raw, affine)
        turned = image.as_reoriented(
            nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(axes))
        )
        nib.save(turned, folder / f"brain_{number}.nii")
    return folder


def require_one_line(ran: Ran, *words: str) -> None:
    assert ran.code == 2
    (line,) = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ran.err
    for word in words:
        assert word in line


def test_fresh_phantoms_are_no_drift(drift: Drift, fresh: Path) -> None:
    ran = drift(fresh, reference=DEMO)
    assert (ran.code, ran.result["status"], ran.result["drifted"]) == (0, "no drift", [])
    assert ran.result["volumes"] == {"found": COUNT, "judged": COUNT, "unreadable": {}}
    assert "latents" in [comparison["name"] for comparison in ran.result["comparisons"]]
    assert ran.result["not_compared"] == {} and ran.result["probable_causes"] == []


CAUSES = {
    "contrast T1": "another contrast",
    "contrast T1 with gadolinium": "another contrast",
    "contrast T2": "another contrast",
    "blur": "blur",
    "noise": "noise",
    "bias field": "bias field",
    "spacing": "voxel size",
    "intensity scale": "intensity scale",
    "front to back": "turned or mirrored",
    "upside down": "turned or mirrored",
    "axes exchanged": "turned or mirrored",
}


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "as it is"])
def test_each_change_is_found_and_named(drift: Drift, tmp_path: Path, phantoms: list[Phantom], change: str) -> None:
    ran = drift(write(tmp_path / "changed", phantoms, change))
    assert (ran.code, ran.result["status"]) == (1, "drift")
    assert ran.result["probable_causes"][0].split(":")[0] == CAUSES[change]
    assert f"probably: {CAUSES[change]}" in ran.out

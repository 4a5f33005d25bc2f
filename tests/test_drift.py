"""data_drift: silent on fresh phantoms, loud on each change, exact about files it cannot read, and on the wire."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

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
    "front to back": "turned, mirrored or shifted",
    "upside down": "turned, mirrored or shifted",
    "axes exchanged": "turned, mirrored or shifted",
}


@pytest.mark.parametrize("change", [change for change in CHANGES if change != "as it is"])
def test_each_change_is_found_and_named(drift: Drift, tmp_path: Path, phantoms: list[Phantom], change: str) -> None:
    ran = drift(write(tmp_path / "changed", phantoms, change))
    assert (ran.code, ran.result["status"]) == (1, "drift")
    assert ran.result["probable_causes"][0].split(":")[0] == CAUSES[change]
    assert f"probably: {CAUSES[change]}" in ran.out


def test_stored_orientation_is_a_drift_that_does_no_harm(drift: Drift, tmp_path: Path, phantoms: list[Phantom]) -> None:
    ran = drift(write(tmp_path / "turned", phantoms, "as it is", axes="LPS"))
    assert (ran.code, ran.result["drifted"]) == (1, ["orientation"])
    assert ran.result["facts"]["orientation"] == {"training": {"RAS": 256}, "new": {"LPS": COUNT}}
    assert "files are stored LPS, in training RAS" in ran.out


def test_another_scanner_is_named(drift: Drift, fresh: Path) -> None:
    sidecar = {"Manufacturer": "Acme", "ManufacturersModelName": "M1", "MagneticFieldStrength": 3, "PatientName": "X"}
    for number in range(COUNT):
        (fresh / f"brain_{number}.json").write_text(json.dumps(sidecar))
    ran = drift(fresh)
    assert (ran.code, ran.result["drifted"]) == (1, ["scanner"])
    assert ran.result["facts"]["scanner"]["new"] == {"Acme M1 3": COUNT}


# What cannot be judged.


def test_few_volumes_clear_nobody(drift: Drift, fresh: Path) -> None:
    for number in range(3, COUNT):
        (fresh / f"brain_{number}.nii").unlink()
    ran = drift(fresh)
    require_one_line(ran, "3 volumes are too few", "8 are needed")
    assert ran.result["status"] == "too few"
    assert not (fresh.parent / "out" / "drift.prom").exists()  # an old judgement must be seen to be old


def test_few_volumes_can_show_a_drift(drift: Drift, tmp_path: Path, phantoms: list[Phantom]) -> None:
    assert drift(write(tmp_path / "changed", phantoms[:4], "contrast T2")).code == 1


def test_a_small_profile_clears_nobody(drift: Drift, fresh: Path, profile: Path, tmp_path: Path) -> None:
    content = json.loads(profile.read_text())
    content["features"] = {name: values[::50] for name, values in content["features"].items()}
    small = tmp_path / "small.json"
    small.write_text(json.dumps(content))
    require_one_line(drift(fresh, reference=small), "the profile was made of 6 volumes")


def test_an_unreadable_file_is_named_and_counted(drift: Drift, fresh: Path) -> None:
    whole = (fresh / "brain_0.nii").read_bytes()
    (fresh / "cut.nii").write_bytes(whole[: len(whole) // 2])
    nib.save(nib.Nifti1Image(np.full((8, 8, 8), np.nan, np.float32), np.eye(4)), fresh / "nan.nii")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 4), np.float32), np.eye(4)), fresh / "four.nii")
    ran = drift(fresh)
    assert ran.code == 0
    assert set(ran.result["volumes"]["unreadable"]) == {"cut", "nan", "four"}
    assert (ran.result["volumes"]["found"], ran.result["volumes"]["judged"]) == (COUNT + 3, COUNT)
    assert "unreadable: cut: " in ran.out and "cut.nii" in (fresh.parent / "out" / "drift.html").read_text()
    assert 'ldm3d_drift_volumes{state="unreadable"} 3.0' in (fresh.parent / "out" / "drift.prom").read_text()


def test_folders_that_hold_nothing(drift: Drift, tmp_path: Path) -> None:
    require_one_line(drift(tmp_path / "none"), "there is no such folder")
    (tmp_path / "empty").mkdir()
    require_one_line(drift(tmp_path / "empty"), "no cases found")
    (tmp_path / "empty" / "broken.nii.gz").write_bytes(b"nonsense")
    require_one_line(drift(tmp_path / "empty"), "none of 1 volumes can be read", "broken.nii.gz")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.pop("features"), "features"),
        (lambda content: content.update(format_version=2), "format version 2"),
        (lambda content: content["features"]["noise"].pop(), "255 and 256"),
        (lambda content: content.update(features={}), "features are others"),
        (lambda content: content["features"].pop("noise"), "noise"),
        (lambda content: content["features"].update(other=content["features"]["noise"]), "other"),
        (lambda content: content["mean_image"].pop(), "511"),
        (lambda content: content["facts"].pop("scanner"), "scanner"),
    ],
)
def test_a_damaged_profile_is_refused(
    drift: Drift, tmp_path: Path, profile: Path, change: Callable[[dict[str, Any]], Any], words: str
) -> None:
    content = json.loads(profile.read_text())
    change(content)
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(content))
    require_one_line(drift(tmp_path, reference=damaged), "damaged.json", words)


def test_a_profile_that_is_not_there_or_of_other_weights(drift: Drift, tmp_path: Path) -> None:
    require_one_line(drift(tmp_path, reference=tmp_path), "no such profile", "make_profile")
    (tmp_path / FILE).write_text("{")
    require_one_line(drift(tmp_path, reference=tmp_path), "cannot be read as a profile")
    shutil.copy(DEMO / "autoencoder.safetensors", tmp_path)
    content = json.loads((DEMO / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**content, "trained_on": "0" * 16}))
    require_one_line(drift(tmp_path, reference=tmp_path), "was trained on other data")


@pytest.mark.parametrize("alpha", ["0", "1", "-1", "nan", "much", "0.003"])
def test_senseless_alpha(drift: Drift, tmp_path: Path, alpha: str) -> None:
    require_one_line(drift(tmp_path, "--alpha", alpha), "must be a number between 0.0033 and 1")


def test_latents_of_other_weights_are_not_compared(drift: Drift, fresh: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    content = json.loads((model / FILE).read_text())
    content["latents"]["autoencoder_sha256"] = "0" * 64
    (model / FILE).write_text(json.dumps(content))
    ran = drift(fresh, reference=model)
    assert ran.code == 0 and "not compared: latents: the profile's latents are of another" in ran.out


def test_a_fault_of_ours_is_no_drift(drift: Drift, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ends with 1 on an exception, which a pipeline would take for drift."""

    def fault(*args: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(data_drift, "compare", fault)
    ran = drift(fresh)
    assert ran.code == 2 and "ZeroDivisionError: ours" in ran.err


def test_nobody_reads_what_it_prints(fresh: Path, profile: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlops.monitoring.data_drift", "--reference", profile, "--data", fresh]
    process = subprocess.Popen(
        [*map(str, command), "--output", str(tmp_path / "out")],
        cwd=DEMO.parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.close()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2 and b"Traceback" not in err


# Metrics and report.


class Gateway(BaseHTTPRequestHandler):
    """Takes what is pushed, as a pushgateway does."""

    taken: list[tuple[str, str, str]]
    answer = 200

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.taken.append((self.command, self.path, body))
        self.send_response(self.answer)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def gateway() -> Iterator[type[Gateway]]:
    handler = type("Taking", (Gateway,), {"taken": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler
    server.shutdown()
    server.server_close()


def test_metrics_are_written_and_pushed(drift: Drift, tmp_path: Path, phantoms: list[Phantom], gateway: Any) -> None:
    folder = write(tmp_path / "changed", phantoms, "noise")
    ran = drift(folder, "--push", gateway.url)
    assert ran.code == 1
    ((method, path, body),) = gateway.taken
    assert (method, path) == ("PUT", "/metrics/job/ldm3d_drift")
    assert body == (tmp_path / "out" / "drift.prom").read_text()
    families = {family.name: family for family in text_string_to_metric_families(body)}
    assert all(family.type == "gauge" for family in families.values())
    assert set(families) == documented_metrics() - {"ldm3d_drift_latent_mmd"}
    values = {name: family.samples[0].value for name, family in families.items() if len(family.samples) == 1}
    assert (values["ldm3d_drift_detected"], values["ldm3d_drift_alpha"]) == (1, 0.01)
    detected = {s.labels["feature"]: s.value for s in families["ldm3d_drift_feature_detected"].samples}
    assert detected["noise"] == 1 and detected["spacing_x_mm"] == 0
    p_values = {s.labels["feature"]: s.value for s in families["ldm3d_drift_feature_p_value"].samples}
    assert p_values.keys() == detected.keys() and p_values["noise"] < 0.01 < p_values["spacing_x_mm"]


def documented_metrics() -> set[str]:
    text = (data_drift.__doc__ or "").split("Metrics, each")[1]
    return {line.split()[0].split("{")[0] for line in text.splitlines() if line.startswith("    ldm3d_")}


def test_a_gateway_that_does_not_take_them_is_an_error(drift: Drift, fresh: Path, gateway: Any) -> None:
    gateway.answer = 500
    require_one_line(drift(fresh, "--push", gateway.url), "--push", "500")
    require_one_line(drift(fresh, "--push", "http://127.0.0.1:1"), "--push", "refused")
    require_one_line(drift(fresh, "--push", "gopher://x"), "--push")


class Page(HTMLParser):
    """Collects what a page refers to, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.links, self.text = list[str](), list[str](), ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_file_that_shows_everything(drift: Drift, tmp_path: Path, phantoms: list[Phantom]) -> None:
    folder = write(tmp_path / "<script>alert(1)<", phantoms, "noise")
    ran = drift(folder)
    text = (tmp_path / "out" / "drift.html").read_text()
    page = Page()
    page.feed(text)
    assert page.links == [] and "script" not in page.tags and "url(" not in text and "@import" not in text
    assert "Drift: the new volumes differ" in page.text and str(folder) in page.text
    for comparison in ran.result["comparisons"]:
        assert comparison["name"] in page.text
    assert page.tags.count("svg") >= 20
    assert page.tags.count("tr") == len(ran.result["comparisons"]) + 1

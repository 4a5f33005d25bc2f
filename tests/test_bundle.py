"""mlops.deployment.bundle: what goes into the archive, what does not. tests_ops/real tries that it installs."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.errors import ConfigError, UserError, WeightsError
from ldm3d.files import sha256
from mlops.api.models_file import read_models
from mlops.deployment import bundle

ROOT = Path(__file__).resolve().parents[1]
DEMO, WEIGHTS = ROOT / "config/config_demo.json", ROOT / "checkpoints/demo"


def test_weights_and_configuration_must_belong_together(tmp_path: Path) -> None:
    bundle.check(DEMO, WEIGHTS)
    with pytest.raises(ConfigError, match="describes other networks"):
        bundle.check(ROOT / "config/config_train_16g.json", WEIGHTS)
    with pytest.raises(WeightsError, match="no such weights"):
        bundle.check(DEMO, tmp_path)
    shutil.copyfile(WEIGHTS / UNET, tmp_path / UNET)
    content = (WEIGHTS / AUTOENCODER).read_bytes()
    (tmp_path / AUTOENCODER).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(WeightsError, match="another autoencoder"):
        bundle.check(DEMO, tmp_path)


@pytest.mark.parametrize("name", ["Demo", "my model", "a: b", "x" * 65])
def test_a_name_that_the_service_does_not_take_is_refused_here(tmp_path: Path, name: str) -> None:
    shutil.copytree(WEIGHTS, tmp_path / name)
    with pytest.raises(ConfigError, match="rename it to small letters, digits"):
        bundle.check(DEMO, tmp_path / name)


@pytest.mark.parametrize("name", ["20261122", "1.0", "null", "brains"])
def test_every_name_that_passes_is_one_to_the_service(tmp_path: Path, name: str) -> None:
    shutil.copytree(WEIGHTS, tmp_path / name)
    bundle.check(DEMO, tmp_path / name)
    (tmp_path / "bundle").mkdir()
    bundle.add_models(tmp_path / "bundle", DEMO, tmp_path / name)
    assert list(read_models(tmp_path / "bundle/models.yaml").models) == [name]


def test_of_the_weights_folder_only_what_is_published_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, folder = tmp_path / "brains", tmp_path / "bundle"
    shutil.copytree(WEIGHTS, weights)
    for private in ("split.json", "diffusion_last.pt"):
        (weights / private).write_text("names of cases")
    (folder / "app").mkdir(parents=True)
    bundle.add_models(folder, DEMO, weights)
    assert {path.name for path in (folder / "models").iterdir()} == set(bundle.PUBLISHED)
    monkeypatch.chdir(folder / "app")
    models = read_models(folder / "models.yaml")
    assert "brains" in str(models)
    assert "../models" in str(models)


def test_the_code_is_the_last_commit_without_tests_and_weights(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    bundle.add_code(tmp_path)
    assert (tmp_path / "inference.py").is_file()
    assert (tmp_path / "docs/API.md").is_file()
    assert (tmp_path / "mlops/docker/api_server.py").is_file()
    assert not {"tests", "tests_ops", "checkpoints", ".github", ".git"} & {path.name for path in tmp_path.iterdir()}


def test_an_archive_depends_on_its_content_alone(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/file").write_text("text")
    (folder / "install.sh").write_text("#!/bin/sh\n")
    (folder / "install.sh").chmod(0o700)
    bundle.pack(folder, tmp_path / "one.tar")
    (folder / "inner/file").touch()
    bundle.pack(folder, tmp_path / "two.tar")
    assert sha256(tmp_path / "one.tar") == sha256(tmp_path / "two.tar")
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [(entry.name, oct(entry.mode)) for entry in tar] == [
            ("bundle/inner/file", "0o644"),
            ("bundle/install.sh", "0o755"),
        ]


def test_what_a_command_says_last_is_what_the_user_reads() -> None:
    with pytest.raises(UserError, match=r"failed: no wheels today$"):
        bundle.run(sys.executable, "-c", "import sys; sys.exit('first\\nno wheels today')")
    with pytest.raises(UserError, match="no such program"):
        bundle.run("no-such-program")


def test_the_platform_is_asked_as_the_installer_asks_it() -> None:
    script = (bundle.HERE / "install.sh").read_text()
    question = script[script.index("'import platform, sys") + 1 : script.index("machine()))'") + len("machine()))")]
    said = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, check=True).stdout
    assert said.split() == list(bundle.this_platform())

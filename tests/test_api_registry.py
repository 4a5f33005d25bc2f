"""mlops.api.registry: weights from an MLflow registry. A stub stands for MLflow; a real one, where it is installed."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import served

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.errors import ConfigError, WeightsError
from ldm3d.files import sha256
from mlops.api.catalogue import activate, prepare, read_active
from mlops.api.settings import Settings
from mlops.api.weights_store import FILES, StoredVersion, store, store_dir

MANY = 512**3
URI = "http://user:secret@registry.example:5000"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.publish(tmp_path_factory.mktemp("published"))


class Registry:
    """What `mlflow` is to the service: a registry with versions 1 and 2 of `ldm3d-diffusion`, the second `champion`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tags = {"sha256": sha256(folder / UNET)}
        self.down = False
        self.asked: list[tuple[str, str]] = []
        self.artifacts = SimpleNamespace(download_artifacts=self._download)

    def MlflowClient(self, tracking_uri: str, registry_uri: str) -> "Registry":
        assert tracking_uri == registry_uri == URI
        return self

    def get_model_version_by_alias(self, name: str, alias: str) -> Any:
        return self.get_model_version(name, {"champion": "2"}.get(alias, "none"))

    def get_model_version(self, name: str, version: str) -> Any:
        if self.down:
            raise ConnectionError(f"cannot reach {URI}\nand so on")
        if name != "ldm3d-diffusion" or version not in ("1", "2"):
            raise LookupError("RESOURCE_DOES_NOT_EXIST")
        self.asked.append((name, version))
        return SimpleNamespace(source=f"stub:/{version}/weights", tags=self.tags)

    def _download(self, artifact_uri: str, dst_path: str, tracking_uri: str) -> str:
        assert tracking_uri == URI and artifact_uri.startswith("stub:/")
        return str(shutil.copy(self.folder / artifact_uri.rpartition("/")[2], dst_path))


@pytest.fixture
def registry(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    stub = Registry(Path(shutil.copytree(published, tmp_path / "registered")))
    monkeypatch.setitem(sys.modules, "mlflow", stub)  # type: ignore[arg-type]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    return stub


def require_stored(stored: StoredVersion, published: Path, data: Path) -> None:
    assert stored.weights_sha256 == {name: sha256(published / name) for name in FILES}
    assert sorted(path.name for path in store_dir(data).iterdir()) == [".lock", stored.digest]
    assert sorted(path.name for path in stored.folder.iterdir()) == sorted(FILES)


@pytest.mark.parametrize(
    ("source", "version"),
    [
        ("mlflow:ldm3d@champion", "2"),
        ("mlflow:ldm3d-diffusion@champion", "2"),
        ("mlflow:ldm3d/1", "1"),
        ("mlflow:ldm3d-diffusion/2", "2"),
    ],
)
def test_registered_weights_are_stored(
    source: str, version: str, registry: Registry, published: Path, tmp_path: Path
) -> None:
    require_stored(store(source, tmp_path / "data", MANY), published, tmp_path / "data")
    assert registry.asked == [("ldm3d-diffusion", version)]


def test_versions_of_other_tools_have_no_digest(registry: Registry, published: Path, tmp_path: Path) -> None:
    registry.tags = {}
    require_stored(store("mlflow:ldm3d@champion", tmp_path / "data", MANY), published, tmp_path / "data")


def test_what_is_not_there_is_said_without_a_password(registry: Registry, tmp_path: Path) -> None:
    def said(source: str) -> str:
        with pytest.raises(WeightsError) as caught:
            store(source, tmp_path / "data", MANY)
        assert [path.name for path in store_dir(tmp_path / "data").iterdir()] == [".lock"]
        return str(caught.value)

    at = "MLflow at http://registry.example:5000"
    assert said("mlflow:ldm3d@nobody") == f"{at} does not give it: LookupError: RESOURCE_DOES_NOT_EXIST"
    (registry.folder / AUTOENCODER).unlink()
    assert said("mlflow:ldm3d@champion").startswith(f"{at} does not give it: FileNotFoundError: ")
    registry.down = True
    assert said("mlflow:ldm3d/1") == (
        f"{at} does not give it: ConnectionError: cannot reach http://registry.example:5000"
    )


def test_other_weights_than_were_registered_are_refused(registry: Registry, tmp_path: Path) -> None:
    served.publish(registry.folder, seed=1)
    with pytest.raises(WeightsError, match=r"gives another diffusion_unet.safetensors than was registered"):
        store("mlflow:ldm3d@champion", tmp_path / "data", MANY)


def test_without_mlflow_or_its_address(
    registry: Registry, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match="MLflow is not installed: pip install mlflow"):
        store("mlflow:ldm3d@champion", tmp_path / "data", MANY)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI is not set: it must name the MLflow server"):
        store("mlflow:ldm3d@champion", tmp_path / "data", MANY)
    assert store(str(published), tmp_path / "data", MANY).weights_sha256  # folders need neither


def test_a_registry_that_is_away_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data")
    (tmp_path / "models.yaml").write_text('models: {brains: {versions: {"1": {weights: "mlflow:ldm3d@champion"}}}}')
    active = prepare(tmp_path / "models.yaml", settings)
    activate(active, settings.data_dir)
    registry.down = True
    with pytest.raises(WeightsError, match=r"models.brains.versions.1.weights 'mlflow:ldm3d@champion': MLflow at"):
        prepare(tmp_path / "models.yaml", settings)
    assert read_active(settings.data_dir) == active
    assert sha256(active.versions[0].folder(settings.data_dir) / UNET) == active.versions[0].weights_sha256[UNET]


# A real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("mlflow", reason="needs mlflow: pip install mlflow")
    import test_mlflow

    yield from test_mlflow.server.__wrapped__(tmp_path_factory)


def test_what_a_training_registers_is_served(
    server: str, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_mlflow import begun, config, free_port

    from ldm3d.mlflow_tracking import ALIAS

    folder = Path(shutil.copytree(published, tmp_path / "model"))
    begun(config(server, mlflow_experiment="served", mlflow_model="served"), folder).publish()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    data = tmp_path / "data"
    for source in (f"mlflow:served@{ALIAS}", "mlflow:served-diffusion/1"):
        require_stored(store(source, data, MANY), published, data)
    for source in ("mlflow:served@nobody", "mlflow:served/2", "mlflow:other@candidate"):
        with pytest.raises(WeightsError, match=f"MLflow at {server} does not give it: "):
            store(source, data, MANY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(WeightsError, match="does not give it: "):
        store("mlflow:served/1", data, MANY)

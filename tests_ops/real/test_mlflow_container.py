"""MLflow's image of compose, and a training in the project's image that reports to it."""

import time
import uuid
from collections.abc import Iterator

import httpx
import images
import programs
import pytest
from containers import Running, free_port, run
from images import podman

pytestmark = pytest.mark.timeout(2400)

NAME = "localhost/ldm3d-test:mlflow"


@pytest.fixture(scope="module")
def volume() -> Iterator[str]:
    name = f"ldm3d-test-{uuid.uuid4().hex[:8]}"
    yield name
    listed = podman("volume", "ls", "--quiet", "--filter", f"name={name}").stdout.split()
    podman("volume", "rm", "--force", *listed)


def test_a_training_registers_its_weights_on_the_server(volume: str) -> None:
    image, port = images.service_image(), free_port()
    base = f"--build-arg=BASE_IMAGE={images.base_image()}"
    images.build(NAME, programs.ROOT / "mlops/docker/mlflow.Dockerfile", programs.ROOT, base)
    mounts = [f"--volume={volume}-{folder}:/{folder}" for folder in ("datasets", "models", "outputs")]
    data = ("download_brats_data.py", "-e", "mlops/docker/environment.json", "--phantom=12", "--workers=1")
    run(image, *mounts, "--entrypoint=python", "--", *data)
    address = f"http://127.0.0.1:{port}"
    given = ("--", f"--port={port}", f"--allowed-hosts=127.0.0.1:{port}")
    with Running(NAME, f"--volume={volume}-mlflow:/mlflow", *given) as server:
        server.until(lambda: answers(f"{address}/health"), "MLflow answers", 300)
        assert server.state()["Running"]
        files = ("-c", "config/config_demo.json", "-e", "mlops/docker/environment.json")
        sets = ("--set", "autoencoder_train.max_epochs=1", "--set", f"tracking.mlflow_uri={address}")
        run(image, *mounts, "--", *files, *sets, MODE="train", STAGE="autoencoder", OMP_NUM_THREADS=1)
        api = f"{address}/api/2.0/mlflow"
        (version,) = httpx.get(f"{api}/model-versions/search").json()["model_versions"]
        assert version["name"] == "ldm3d-autoencoder"
        shown = httpx.get(f"{api}/runs/get", params={"run_id": version["run_id"]}).json()["run"]
        assert shown["info"]["status"] == "FINISHED" and shown["data"]["metrics"]
        refused = httpx.get(f"{api}/model-versions/search", headers={"Host": "elsewhere.example"})
        assert refused.status_code == 403, "a page of another name may read it"


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10).status_code == 200
    except httpx.TransportError:
        time.sleep(1)
        return False

"""The Jobs of the manifests run for real: data, both stages on two pods, a batch of four shards; and evictions."""

import json
import re
import signal
import sys
from pathlib import Path

import programs
import pytest
from containers import free_port
from kubernetes_jobs import job_spec
from kubernetes_objects import get, render
from kubernetes_processes import Job, exchanged

sys.path.append(str(programs.ROOT / "tests"))
from scripts import CONFIG, NUM_CASES  # tiny networks, seconds a stage

pytestmark = pytest.mark.timeout(900)


class Cluster:
    """Folders where a cluster has PersistentVolumeClaims, and its Jobs."""

    def __init__(self, folder: Path, datasets: Path):
        programs.need("kubectl")
        self.folder, self.objects = folder, render("cpu")
        self.replaced = {f"/{name}": str(folder / name) for name in ("models", "outputs")} | {
            "/datasets": str(datasets)
        }
        environment = get(self.objects, "ConfigMap", "ldm3d-training")["data"]["environment.json"]
        folder.mkdir(exist_ok=True)
        (folder / "environment.json").write_text(exchanged(environment, self.replaced))
        config = CONFIG | {"checkpoint_every_minutes": 0}
        config["autoencoder_train"] = CONFIG["autoencoder_train"] | {"max_epochs": 8, "batch_size": 1}
        (folder / "config.json").write_text(json.dumps(config))
        self.model = folder / "models/brains"

    def job(self, template: str, name: str) -> Job:
        """As `kubectl create job NAME --from=cronjob/TEMPLATE` makes it."""
        spec = job_spec(get(self.objects, "CronJob", template))
        assert spec
        here = {
            "/etc/ldm3d/environment.json": str(self.folder / "environment.json"),
            "config/config_demo.json": str(self.folder / "config.json"),
            f"{name}-0.ldm3d-train:29500": f"127.0.0.1:{free_port()}",
        }
        return Job(spec, name, self.folder / f"logs-{name}", here | self.replaced)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the Job ldm3d-data makes, smaller."""
    folder = tmp_path_factory.mktemp("datasets")
    job = Cluster(folder / "cluster", folder).job("ldm3d-data", "data")
    job.spec["completions"] = 1
    [container] = job.spec["template"]["spec"]["containers"]
    assert container["args"][-1] == "--phantom=60"
    small = f"--phantom={NUM_CASES} --size 24 32 24 --spacing 6 --workers 1"
    container["args"][-1:] = small.split()
    job.run()
    assert (folder / "brains/Task01_BrainTumour/dataset.json").is_file()
    return folder


@pytest.fixture(scope="module")
def trained(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Both stages, undisturbed."""
    cluster = Cluster(tmp_path_factory.mktemp("undisturbed"), datasets)
    for stage in ("autoencoder", "diffusion"):
        job = cluster.job(f"ldm3d-train-{stage}", f"brains-{stage}")
        job.run()
        assert job.codes == [0, 0]
        assert "2 process(es)" in job.log(0) + job.log(1)
    return cluster


def test_two_pods_train_both_stages(trained: Cluster) -> None:
    assert {path.name for path in trained.model.glob("*.safetensors")} >= {
        "autoencoder.safetensors",
        "diffusion_unet.safetensors",
    }
    assert [*(trained.folder / "outputs/runs").iterdir()]


@pytest.mark.parametrize("evicted", [0, 1])
def test_a_training_goes_on_after_an_eviction_as_if_nothing_had_been(
    evicted: int, trained: Cluster, datasets: Path, tmp_path: Path
) -> None:
    """Pod 0 is where they meet: without it the other cannot wait, fails, and is started again too."""
    cluster = Cluster(tmp_path / "evicted", datasets)
    job = cluster.job("ldm3d-train-autoencoder", "brains")
    job.run(evicted, when=(cluster.model / "autoencoder_last.1.pt").exists)
    logs = job.log(0) + job.log(1)
    assert "resuming from" in logs, logs
    assert len(job.codes) > 2
    assert (cluster.model / "autoencoder.safetensors").read_bytes() == (
        trained.model / "autoencoder.safetensors"
    ).read_bytes()


def test_a_training_that_was_done_is_not_done_again(trained: Cluster) -> None:
    before = (trained.model / "autoencoder.safetensors").read_bytes()
    job = trained.job("ldm3d-train-autoencoder", "again")
    job.run()
    assert job.codes == [0, 0]
    assert "resuming from" in job.log(0) + job.log(1)
    assert (trained.model / "autoencoder.safetensors").read_bytes() == before


def batch(folder: Path, name: str, evicted: int | None = None) -> dict[str, str]:
    """Digests of a batch's volumes, of the demo weights; a pod is evicted when it has made one of three."""
    cluster = Cluster(folder, folder / "datasets")
    job = cluster.job("ldm3d-batch", name)
    [container] = job.spec["template"]["spec"]["containers"]
    container["args"] += ["--num=12", "--steps=30"]  # so that it lasts
    output = folder / "outputs" / name
    job.run(evicted, when=(output / f"synimg_0_{evicted}.nii.gz").exists)
    if evicted is not None:
        assert 128 + signal.SIGTERM in job.codes
        assert re.search(rf"shard {evicted} of 4: [12] of 3 volumes are there", job.log(evicted))
    files = json.loads((output / "manifest.json").read_text())["files"]
    return {file["name"]: file["sha256"] for file in files if file["name"].endswith(".nii.gz")}


def test_a_batch_is_made_by_its_pods_and_goes_on_after_an_eviction(tmp_path: Path) -> None:
    whole = batch(tmp_path, "whole")
    assert len(whole) == 12
    assert batch(tmp_path, "evicted", evicted=3) == whole

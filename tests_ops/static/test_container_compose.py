"""docker-compose.yml, and the Prometheus and Grafana that it starts."""

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import yaml
from programs import ROOT, tool

from mlops.api.settings import PREFIX, Settings

DOCKER = ROOT / "mlops/docker"
FILES = [DOCKER / "docker-compose.yml", DOCKER / "docker-compose.cuda.yml"]
COMPOSE = yaml.safe_load(FILES[0].read_text())
PROMETHEUS = yaml.safe_load((ROOT / "mlops/monitoring/prometheus.yml").read_text())
SERVICES = {"api", "worker", "monitor", "redis", "prometheus", "alertmanager", "pushgateway", "grafana", "mlflow"}
MODES = {"api", "worker", "monitor"}
KNOWN = {PREFIX + name.upper() for name in Settings.model_fields}


def schema_says(file: Path) -> str:
    return programs.run(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", file).stdout


def test_the_specifications_schema_accepts_it(tmp_path: Path) -> None:
    assert [schema_says(file) for file in FILES] == ["ok -- validation done\n"] * 2
    broken = tmp_path / "broken.yml"
    broken.write_text(FILES[0].read_text().replace("mem_limit: 1g", "memory_limit: 1g"))
    assert "memory_limit" in schema_says(broken)


def faults(compose: dict[str, Any]) -> list[str]:
    """What the schema does not know: names that must agree, and what every container must be."""
    found, services = [], compose["services"]
    if set(services) != SERVICES:
        found.append(f"services: {sorted(services)}")
    for name, service in services.items():
        found += [f"{name}: {fault}" for fault in service_faults(service, compose)]
    images = {name: services[name]["image"] for name in MODES & set(services)}
    if len(set(images.values())) > 1:
        found.append(f"images differ: {images}")
    if services["api"]["environment"]["LDM3D_QUEUE_URL"] != services["worker"]["environment"]["LDM3D_QUEUE_URL"]:
        found.append("api and worker have different queues")
    found += [f"{name} does not see the data" for name in sorted(MODES) if not sees_data(services[name])]
    near = {name for name, service in services.items() if "queue" in service["networks"]}
    alone = near == {"api", "worker", "redis"} and services["redis"]["networks"] == ["queue"]
    if not (alone and compose["networks"]["queue"].get("internal")):
        found.append("the queue has no password, and so must have a network of its own, without a way out")
    return found


def sees_data(service: dict[str, Any]) -> bool:
    folder = service["environment"]["LDM3D_DATA_DIR"]
    return any(volume.split(":")[:2] == ["data", folder] for volume in service["volumes"])


def service_faults(service: dict[str, Any], compose: dict[str, Any]) -> list[str]:
    found = []
    tag = service["image"].rpartition(":")[2] if ":" in service["image"] else ""
    if not re.match(r"v?\d+\.\d+", tag):
        found.append("the image has no version")
    if not re.match(r"[1-9]\d*:\d+$", service.get("user", "")):
        found.append("runs as root")
    if not service.get("read_only") or service.get("cap_drop") != ["ALL"]:
        found.append("can write to its image, or has capabilities")
    if service.get("security_opt") != ["no-new-privileges:true"]:
        found.append("may gain privileges")
    if "mem_limit" not in service or "pids_limit" not in service or "healthcheck" not in service:
        found.append("no limit, or no health check")
    for address in service.get("ports", []):
        if not re.match(r"127\.0\.0\.1:\d+:\d+$", address):
            found.append(f"{address} is open to other machines")
    for variable in service.get("environment", {}):
        if variable.startswith(PREFIX) and variable not in KNOWN:
            found.append(f"{variable}: no such setting")
    for network in service["networks"]:
        if network not in compose["networks"]:
            found.append(f"no network {network}")
    for mount in service.get("volumes", []):
        source = mount.split(":")[0]
        if source.startswith("."):
            if not (DOCKER / source).exists() or not mount.endswith(":ro"):
                found.append(f"{source} is not there, or not mounted read-only")
        elif source not in compose["volumes"]:
            found.append(f"no volume {source}")
    for other in service.get("depends_on", {}):
        if other not in compose["services"]:
            found.append(f"waits for {other}, which is not there")
    return found


def test_it_keeps_the_projects_rules() -> None:
    assert faults(COMPOSE) == []


def change(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda compose: compose["services"][name].update(values)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (change("redis", image="redis"), "redis: the image has no version"),
        (change("grafana", image="grafana/grafana:latest"), "grafana: the image has no version"),
        (change("mlflow", user="0:0"), "mlflow: runs as root"),
        (change("api", read_only=False), "api: can write"),
        (change("worker", cap_drop=["NET_RAW"]), "worker: can write"),
        (change("worker", security_opt=[]), "worker: may gain"),
        (lambda compose: compose["services"]["prometheus"].pop("mem_limit"), "prometheus: no limit"),
        (lambda compose: compose["services"]["redis"].pop("healthcheck"), "redis: no limit, or no health check"),
        (change("grafana", networks=["queue"]), "a network of its own"),
        (change("api", ports=["8000:8000"]), "api: 8000:8000 is open"),
        (
            change("api", environment=COMPOSE["services"]["api"]["environment"] | {"LDM3D_HOSTS": "x"}),
            "LDM3D_HOSTS: no",
        ),
        (change("api", networks=["front"]), "api: no network front"),
        (change("api", volumes=["date:/data"]), "api: no volume date"),
        (change("prometheus", volumes=["../monitoring/prometheus.yaml:/p.yml:ro"]), "prometheus.yaml is not there"),
        (change("prometheus", volumes=["../monitoring/prometheus.yml:/p.yml"]), "not mounted read-only"),
        (change("api", depends_on={"rediss": {}}), "api: waits for rediss"),
        (change("worker", image="ldm3d:0.0.9-cpu"), "images differ"),
        (change("monitor", volumes=["models:/data:ro"]), "monitor does not see the data"),
        (lambda compose: compose["networks"].update(queue={}), "a network of its own"),
        (lambda compose: compose["services"].pop("mlflow"), "services:"),
        (
            lambda compose: compose["services"]["worker"]["environment"].update(LDM3D_QUEUE_URL="redis://other:6379/0"),
            "different queues",
        ),
    ],
)
def test_a_broken_one_is_found(spoil: Callable[[dict[str, Any]], None], fault: str) -> None:
    compose = copy.deepcopy(COMPOSE)
    spoil(compose)
    assert any(fault in found for found in faults(compose))


def mounts(service: str) -> dict[str, Path]:
    """What this repository puts into a container: files and folders by where they stand there."""
    pairs = [mount.split(":")[:2] for mount in COMPOSE["services"][service]["volumes"]]
    return {target: (DOCKER / source).resolve() for source, target in pairs if source.startswith(".")}


def test_prometheus_reads_its_configuration_and_the_alerts(tmp_path: Path) -> None:
    programs.need("promtool")
    for target, source in mounts("prometheus").items():
        shutil.copy(source, tmp_path / Path(target).name)
    config = tmp_path / "prometheus.yml"
    done = programs.run("promtool", "check", "config", config)
    assert done.returncode == 0 and "1 rule files found" in done.stdout, done.stdout + done.stderr
    config.write_text(config.read_text().replace("job_name:", "job:", 1))
    assert programs.run("promtool", "check", "config", config).returncode != 0


def target_faults(prometheus: dict[str, Any]) -> list[str]:
    """Targets at which nothing answers, and services that nobody asks."""
    services = COMPOSE["services"]
    ports = {
        "api": services["api"]["ports"][0].rpartition(":")[2],
        "worker": services["worker"]["environment"]["LDM3D_WORKER_METRICS_PORT"],
        "monitor": services["monitor"]["command"][1].removeprefix("--port="),
        "pushgateway": "9091",
    }
    jobs = prometheus["scrape_configs"]
    asked = {target for job in jobs for one in job.get("static_configs", []) for target in one["targets"]}
    # A name that is looked up stands for all containers of the service; one that is not, for any of them.
    looked_up = {f"{name}:{it['port']}" for job in jobs for it in job.get("dns_sd_configs", []) for name in it["names"]}
    if not any(target.startswith("worker:") for target in looked_up):
        return ["of several workers, only one is asked"]
    asked |= looked_up
    told = {
        target
        for one in prometheus["alerting"]["alertmanagers"]
        for it in one["static_configs"]
        for target in it["targets"]
    }
    there = {f"{name}:{port}" for name, port in ports.items()}
    return sorted(asked ^ there) + sorted(told ^ {"alertmanager:9093"})


def test_prometheus_asks_every_service_at_its_port() -> None:
    assert target_faults(PROMETHEUS) == []
    wrong = copy.deepcopy(PROMETHEUS)
    wrong["scrape_configs"][1]["dns_sd_configs"][0]["port"] = 9102
    assert target_faults(wrong) == ["worker:9101", "worker:9102"]
    wrong["scrape_configs"][1] = {"job_name": "ldm3d-worker", "static_configs": [{"targets": ["worker:9101"]}]}
    assert target_faults(wrong) == ["of several workers, only one is asked"]


def test_grafana_finds_its_dashboards_and_prometheus() -> None:
    provisioning = "/etc/grafana/provisioning"
    paths = mounts("grafana")
    (provider,) = yaml.safe_load(paths[f"{provisioning}/dashboards/ldm3d.yml"].read_text())["providers"]
    assert [*paths[provider["options"]["path"]].glob("*.json")]
    (source,) = yaml.safe_load(paths[f"{provisioning}/datasources/ldm3d.yml"].read_text())["datasources"]
    assert (source["uid"], source["url"]) == ("prometheus", "http://prometheus:9090")

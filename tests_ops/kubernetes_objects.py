"""The objects that the overlays make, and what is in them: the pods, whoever makes them."""

import json
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import programs
import yaml

BASE, OVERLAYS = programs.ROOT / "mlops/kubernetes", programs.ROOT / "mlops/kubernetes-overlays"
SERVICE_OVERLAYS = ("cpu", "gpu", "azure-keyvault")
"""Those that make the whole service; the others add to them."""
ALL_OVERLAYS = (*SERVICE_OVERLAYS, "kubeflow-pytorchjob", "kubeflow-trainjob")
COMPONENT = "app.kubernetes.io/component"

Object = dict[str, Any]


@cache
def _rendered(overlay: str) -> str:
    done = programs.run("kubectl", "kustomize", OVERLAYS / overlay)
    assert done.returncode == 0, done.stderr
    return json.dumps([document for document in yaml.safe_load_all(done.stdout) if document])


def render(overlay: str) -> list[Object]:
    """What `kubectl kustomize` makes of an overlay; with the service's objects, where it only adds to them."""
    objects: list[Object] = json.loads(_rendered(overlay))
    return objects if overlay in SERVICE_OVERLAYS else render("gpu") + objects


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [found for found in objects if found["kind"] in kinds]


def get(objects: list[Object], kind: str, name: str) -> Object:
    """The object of this kind and name."""
    return next(found for found in of_kind(objects, kind) if found["metadata"]["name"] == name)


def title(found: Object) -> str:
    return f"{found['kind']} {found['metadata']['name']}"


class Pod(NamedTuple):
    """A template of pods."""

    owner: Object
    template: Object

    @property
    def title(self) -> str:
        return title(self.owner)

    @property
    def labels(self) -> dict[str, str]:
        return self.template["metadata"].get("labels", {})

    @property
    def spec(self) -> Object:
        return self.template["spec"]

    @property
    def containers(self) -> list[Object]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    @property
    def ports(self) -> dict[str, int]:
        """Of all containers, by name."""
        return {port["name"]: port["containerPort"] for c in self.containers for port in c.get("ports", [])}


def job_spec(found: Object) -> Object | None:
    """The Job's part of a CronJob."""
    return found["spec"]["jobTemplate"]["spec"] if found["kind"] == "CronJob" else None


def pods(objects: list[Object]) -> Iterator[Pod]:
    """All templates of pods."""
    for found in objects:
        spec = found.get("spec", {})
        match found["kind"]:
            case "Deployment":
                yield Pod(found, spec["template"])
            case "CronJob":
                yield Pod(found, spec["jobTemplate"]["spec"]["template"])
            case "PyTorchJob":
                for replica in spec["pytorchReplicaSpecs"].values():
                    yield Pod(found, replica["template"])
            case "TrainingRuntime":
                for replicated in spec["template"]["spec"]["replicatedJobs"]:
                    yield Pod(found, replicated["template"]["spec"]["template"])


def matches(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector, `matchLabels` and `matchExpressions` with In, selects what has these labels."""
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        labels.get(part["key"]) in part["values"] and part["operator"] == "In"
        for part in selector.get("matchExpressions", [])
    )


def value_of(container: Object, variable: str) -> str | None:
    """A container's environment variable, if it is given as text."""
    return next((entry.get("value") for entry in container.get("env", []) if entry["name"] == variable), None)

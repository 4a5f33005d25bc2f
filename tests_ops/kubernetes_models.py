"""Objects against their schemas: Kubernetes' own for several versions, and models of the custom resources."""

import json
from functools import cache
from typing import Any

import kubernetes_validate
from cloudcoil.models.prometheus_operator import v1 as prometheus
from kubeflow.training import models as training
from kubeflow_trainer_api import models as trainer
from kubernetes_objects import Object, pods, title

VERSIONS = ("1.31", "1.34", "1.37")
"""Of Kubernetes: the oldest that clouds still offer, one between, the newest that is known here."""
MONITORING = {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
TRAINER = {
    "TrainJob": trainer.TrainerV1alpha1TrainJob,
    "TrainingRuntime": trainer.TrainerV1alpha1TrainingRuntime,
}
UNCHECKED = ("SecretProviderClass",)
"""There is no model of it; `kubernetes_links.vault` looks at what we use."""


def schema_faults(objects: list[Object]) -> list[str]:
    """What is wrong with these objects; an API that a version does not know counts as wrong."""
    faults = []
    for found in objects:
        kind = found["kind"]
        if kind in UNCHECKED:
            continue
        if kind in MONITORING:
            faults += _monitoring_faults(found)
        elif kind in TRAINER:
            faults += _trainer_faults(found, TRAINER[kind])
        elif kind == "PyTorchJob":
            faults += [
                f"{title(found)}: {fault}"
                for fault in _swagger_faults(found, training.KubeflowOrgV1PyTorchJob.openapi_types, "")
            ]
        else:
            faults += _kubernetes_faults(title(found), found)
            continue
        for pod in pods([found]):
            as_pod = {"apiVersion": "v1", "kind": "Pod", **pod.template}
            faults += _kubernetes_faults(title(found), as_pod)
    return faults


def _kubernetes_faults(name: str, found: Object) -> list[str]:
    text = json.dumps(found, sort_keys=True)
    return [f"{name}: {fault}" for version in VERSIONS for fault in _version_faults(text, version)]


@cache
def _version_faults(text: str, version: str) -> list[str]:
    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}"]
    except kubernetes_validate.SchemaNotFoundError as error:
        return [error.message]
    return []


def _monitoring_faults(found: Object) -> list[str]:
    try:
        read = getattr(prometheus, found["kind"]).model_validate(found)
    except ValueError as error:
        return [f"{title(found)}: {error}"]
    back = json.loads(read.model_dump_json(by_alias=True, exclude_none=True))
    return [f"{title(found)}: {place}: unknown field" for place in lost(found, back)]


def _trainer_faults(found: Object, model: Any) -> list[str]:
    try:
        back = model.from_dict(found).to_dict()
    except ValueError as error:
        return [f"{title(found)}: {error}"]
    return [f"{title(found)}: {place}: unknown field" for place in lost(found, back)]


def _swagger_faults(value: Any, types: dict[str, str], place: str) -> list[str]:
    """Swagger's models take anything, so each level is compared with what its model says of itself."""
    fields = {name.split("_")[0] + "".join(map(str.title, name.split("_")[1:])): kind for name, kind in types.items()}
    faults = []
    for key, inner in value.items():
        if key not in fields:
            faults.append(f"{place}{key}: unknown field")
            continue
        is_dict = fields[key].startswith("dict(str, ")
        model = getattr(training, fields[key].removeprefix("dict(str, ").removesuffix(")"), None)
        if model is None or not model.__name__.startswith("Kubeflow"):  # text, numbers, and Kubernetes' own
            continue
        for part, one in inner.items() if is_dict else [("", inner)]:
            faults += _swagger_faults(one, model.openapi_types, f"{place}{key}.{part}{'.' if part else ''}")
    return faults


def lost(given: Any, back: Any, place: str = "") -> list[str]:
    """Places of `given` that `back` does not have."""
    if isinstance(given, dict):
        gone = [f"{place}{key}" for key in given if key not in back]
        kept = [key for key in given if key in back]
        return gone + [fault for key in kept for fault in lost(given[key], back[key], f"{place}{key}.")]
    if isinstance(given, list):
        return [fault for n, (g, b) in enumerate(zip(given, back, strict=True)) for fault in lost(g, b, f"{place}{n}.")]
    return []

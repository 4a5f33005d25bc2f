"""All that can be found wrong with objects of Kubernetes."""

from kubernetes_jobs import job_faults
from kubernetes_links import link_faults
from kubernetes_models import schema_faults
from kubernetes_objects import Object
from kubernetes_pods import pod_faults


def faults(objects: list[Object]) -> list[str]:
    """What is wrong with them; nothing, where they are right."""
    return [fault for check in (schema_faults, pod_faults, link_faults, job_faults) for fault in check(objects)]

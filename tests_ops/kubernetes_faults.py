"""All that can be found wrong with objects of Kubernetes."""

from kubernetes_jobs import job_faults
from kubernetes_links import link_faults
from kubernetes_models import schema_faults
from kubernetes_network import network_faults
from kubernetes_objects import Object
from kubernetes_pods import pod_faults


def faults(objects: list[Object]) -> list[str]:
    """What is wrong with them; nothing, where they are right."""
    checks = (schema_faults, pod_faults, link_faults, network_faults, job_faults)
    return [fault for check in checks for fault in check(objects)]

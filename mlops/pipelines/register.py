"""Register a candidate as the champion, if the gate lets it through.

python -m mlops.pipelines.register --model MODEL --metrics METRICS --assets SPLIT VOLUMES --name ldm3d \
    --decision decision.json

The registry is MLflow's, at MLFLOW_TRACKING_URI, which Azure ML sets in its jobs. The alias `champion` names the
version that the service may follow; the metrics that it was judged by lie beside its weights.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from ldm3d.cards import AUTOENCODER, UNET
from ldm3d.errors import DataError, WeightsError
from ldm3d.files import sha256, write_text
from mlops.api.registry import SUFFIX, mlflow_client
from mlops.commands import Parser, run_command
from mlops.pipelines.gate import decide
from mlops.pipelines.lineage import Lineage, read_lineage, verify
from mlops.pipelines.metrics_file import Metrics, read_metrics
from mlops.pipelines.workspace import connect_from_job, tag_assets

ALIAS = "champion"
METRICS = "metrics.json"
PROFILE = "reference_profile.json"
"""What the training data were like, if the training has noted it: whoever watches for drift needs the model's own."""
FOLDER = "weights"
"""Of a run's artifacts, as `ldm3d.mlflow_tracking` names it."""
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow answers where a model, or its alias, is not known. Anything else is a registry that does not answer."""


class Registry:
    """Versions of one model in MLflow's registry.

    Args:
        name: of the model, without `-diffusion`.

    Raises:
        ConfigError: MLflow is not installed, or its address is not set.
    """

    def __init__(self, name: str):
        self.name, self.model = name, name + SUFFIX
        self.uri, self._mlflow = mlflow_client()
        self.client = self._mlflow.MlflowClient(self.uri, self.uri)

    def champion(self) -> Any:
        """The version that has the alias, or None. Raises what MLflow raises where it does not answer."""
        try:
            return self.client.get_model_version_by_alias(self.model, ALIAS)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code not in NOT_THERE:
                raise
            return None

    def metrics_of(self, version: Any) -> Metrics:
        """What a version was judged by. Raises `DataError` where it has none."""
        with tempfile.TemporaryDirectory() as folder:
            address = f"{version.source.rstrip('/')}/{METRICS}"
            try:
                path = self._mlflow.artifacts.download_artifacts(
                    artifact_uri=address, dst_path=folder, tracking_uri=self.uri
                )
            except Exception as error:  # each kind of store raises its own
                raise DataError(
                    f"{self.model} version {version.version}, the {ALIAS}, has no {METRICS} beside its weights; "
                    "evaluate it and register it again, or take the alias from it"
                ) from error
            return read_metrics(Path(path))

    def promote(self, model_dir: Path, metrics: Path, tags: dict[str, str]) -> str:
        """Make a version of the weights, unless there is one, and give it the alias; its number."""
        digest = sha256(model_dir / UNET)
        if not self.client.search_registered_models(f"name = '{self.model}'"):
            self.client.create_registered_model(self.model)
        versions = self.client.search_model_versions(f"name = '{self.model}'")
        # A training that tracks with MLflow has registered them already, as its candidate.
        version = next((v for v in versions if v.tags.get("sha256") == digest), None)
        run_id = version.run_id if version else self._run()
        for path in (metrics, model_dir / PROFILE):
            if path.is_file():
                self.client.log_artifact(run_id, str(path), FOLDER)
        if version is None:
            for name in (UNET, AUTOENCODER):
                self.client.log_artifact(run_id, str(model_dir / name), FOLDER)
            source = f"{self.client.get_run(run_id).info.artifact_uri}/{FOLDER}"
            version = self.client.create_model_version(self.model, source, run_id, tags=tags | {"sha256": digest})
        else:
            for key, value in tags.items():
                self.client.set_model_version_tag(self.model, version.version, key, value)
        self.client.set_registered_model_alias(self.model, ALIAS, version.version)
        return str(version.version)

    def _run(self) -> str:
        """The run of this job, or a new one."""
        given = os.environ.get("MLFLOW_RUN_ID")
        if given:
            return given
        found = self.client.get_experiment_by_name(self.name)
        experiment = found.experiment_id if found else self.client.create_experiment(self.name)
        run_id = str(self.client.create_run(experiment, run_name="register").info.run_id)
        self.client.set_terminated(run_id)
        return run_id


def register(args: argparse.Namespace) -> str:
    """What became of the candidate, as a line."""
    lineages = verify([*args.assets, args.model, args.metrics])
    _require_measured(lineages, args)
    registry, candidate = Registry(args.name), read_metrics(args.metrics / METRICS)
    try:
        champion = registry.champion()
        decision = decide(candidate, registry.metrics_of(champion) if champion else None)
        print(decision.table())
        content = {"champion": champion and str(champion.version), **decision.content()}
        write_text(args.decision, json.dumps(content, indent=2) + "\n")
        workspace = connect_from_job()
        if workspace:
            tag_assets(workspace, lineages.values())
        if not decision.promote:
            return f"{registry.model}: the {ALIAS} stays"
        tags = lineages["diffusion"].tags() | {f"asset.{kind}": str(lineage) for kind, lineage in lineages.items()}
        tags.pop("sha256")  # of a registered version this is the digest of the U-Net's file alone
        version = registry.promote(args.model, args.metrics / METRICS, tags)
        return f"{registry.model}: version {version} is the {ALIAS} now"
    except registry._mlflow.exceptions.MlflowException as error:
        raise WeightsError(f"the registry does not answer: {(str(error).splitlines() or [''])[0][:200]}") from error


def _require_measured(lineages: dict[str, Lineage], args: argparse.Namespace) -> None:
    """Raises `DataError` where the figures are not said to be this model's: those of another could promote it."""
    model, metrics = lineages.get("diffusion"), lineages.get("metrics")
    if model is None or read_lineage(args.model) != model:
        raise DataError(f"{args.model}: is no diffusion model of a pipeline, or not the only one")
    if metrics is None or read_lineage(args.metrics) != metrics:
        raise DataError(f"{args.metrics}: holds no metrics of a pipeline, or not the only ones")
    if model.digest not in {parent.digest for parent in metrics.parents}:
        raise DataError(f"{args.metrics}: its lineage does not name {model}: another model was evaluated")


def main() -> int:
    print(register(parse()))
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.pipelines.register", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="model_dir of stage 2, with its lineage.json")
    parser.add_argument("--metrics", type=Path, required=True, help="folder with metrics.json and its lineage.json")
    parser.add_argument("--assets", type=Path, nargs="*", default=[], help="folders of what the model was made of")
    parser.add_argument("--name", required=True, help="of the model, without -diffusion")
    parser.add_argument("--decision", type=Path, required=True, help="JSON file for the decision and its reasons")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)

"""The training pipeline on Azure ML: prepare, autoencoder, diffusion, evaluate, register if better.

python -m mlops.pipelines.training_pipeline show
python -m mlops.pipelines.training_pipeline submit --environment dev

`--config` and `--workspaces` name other files than pipeline_config.yml beside it and mlops/azure/workspace_config.yml.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ldm3d.errors import ConfigError
from mlops.commands import Parser, run_command
from mlops.pipelines.settings import ROOT, WORKSPACES, PipelineSettings, read_settings, read_workspace
from mlops.pipelines.workspace import NOT_INSTALLED, azure_errors, connect

COMPONENTS = Path(__file__).parent / "components"
STEPS = ("prepare", "autoencoder", "diffusion", "evaluate", "register")
ASSETS = {
    "split": ("prepare", "split"),
    "volumes": ("prepare", "volumes"),
    "autoencoder": ("autoencoder", "model"),
    "latents": ("diffusion", "latents"),
    "diffusion": ("diffusion", "model"),
    "metrics": ("evaluate", "metrics"),
}
"""What is registered, as `NAME-KIND`: the step and the output that it is."""
ON_GPU = ("autoencoder", "diffusion", "evaluate")


def build(settings: PipelineSettings, version: str) -> Any:
    """The pipeline job, not yet submitted.

    Args:
        settings: of pipeline_config.yml.
        version: of all assets that it makes.

    Raises:
        ConfigError: there is no such training configuration (what is in it, the first step checks), or no azure-ai-ml.
    """
    try:
        from azure.ai.ml import Input, dsl, load_component
        from azure.ai.ml.entities import CommandJobLimits, JobResourceConfiguration
    except ImportError as error:
        raise ConfigError(NOT_INSTALLED) from error

    if not (ROOT / settings.config).is_file():
        raise ConfigError(f"config {settings.config}: there is no such file in the repository")
    prepare, autoencoder, diffusion, evaluate, register = (load_component(COMPONENTS / f"{s}.yml") for s in STEPS)
    named: dict[str, Any] = {"name": settings.model, "version": version}
    common: dict[str, Any] = {**named, "config": settings.config}
    given = {
        key: Input(type="uri_folder", path=f"azureml:{asset}")
        for key, asset in (("known_split", settings.split), ("start", settings.start))
        if asset
    }

    @dsl.pipeline(name=f"{settings.model}-training", experiment_name=settings.experiment)  # type: ignore[untyped-decorator]
    def pipeline(data: Input) -> None:
        start = {"start": given["start"]} if "start" in given else {}
        known = {"known_split": given["known_split"]} if "known_split" in given else {}
        one = prepare(data=data, data_asset=settings.data, **known, **common)
        prepared = {"data": data, "volumes": one.outputs.volumes}
        two = autoencoder(split=one.outputs.split, gpus=settings.gpus, **prepared, **start, **common)
        three = diffusion(autoencoder=two.outputs.model, gpus=settings.gpus, **prepared, **start, **common)
        four = evaluate(
            model=three.outputs.model,
            samples=settings.samples,
            seed=settings.seed,
            gpus=settings.gpus,
            **prepared,
            **common,
        )
        five = register(
            split=one.outputs.split,
            volumes=one.outputs.volumes,
            autoencoder=two.outputs.model,
            latents=three.outputs.latents,
            model=three.outputs.model,
            metrics=four.outputs.metrics,
            name=settings.model,
        )
        nodes = dict(zip(STEPS, (one, two, three, four, five), strict=True))
        for step, node in nodes.items():
            node.name = step
            node.compute = settings.compute.gpu if step in ON_GPU else settings.compute.cpu
            node.limits = CommandJobLimits(timeout=int(settings.timeout_hours * 3600))
            node.resources = JobResourceConfiguration(instance_count=1, shm_size=settings.shared_memory)
            for output in node.outputs.values():
                # Mounted, so that what is written is safe at once: a preempted step goes on from it.
                output.mode = "rw_mount"
        for kind, (step, output) in ASSETS.items():
            asset = nodes[step].outputs[output]
            asset.name, asset.version = f"{settings.model}-{kind}", version

    return pipeline(Input(type="uri_folder", path=f"azureml:{settings.data}"))


def main() -> int:
    args = parse()
    settings = read_settings(args.config, PipelineSettings)
    # In its order of time, and allowed in an asset's version.
    version = args.version or f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    job = build(settings, version)
    if args.action == "show":
        print(json.dumps(job._to_dict(), indent=2))
        return 0
    client = connect(read_workspace(args.workspaces, args.environment))
    with azure_errors("the job was not started"):
        made = client.jobs.create_or_update(job)
    print(f"{made.name}\n{made.studio_url}")
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.pipelines.training_pipeline", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("show", "submit"), help="print the job as JSON, or start it")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("pipeline_config.yml"), help="of the pipeline"
    )
    parser.add_argument("--workspaces", type=Path, default=WORKSPACES, help="the list of workspaces")
    parser.add_argument("--environment", default="dev", help="which of the workspaces")
    parser.add_argument("--version", help="of the assets that it makes (default: the time)")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)

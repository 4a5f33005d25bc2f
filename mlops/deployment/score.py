"""Entry script of an Azure ML online endpoint: JSON in, volumes with their provenance out.

azmlinfsrv --entry_script mlops/deployment/score.py --model_dir checkpoints/demo

A request is `{"num": 1, "seed": 7, "steps": 20}`, all of it optional; the answer holds each volume as base64 of a
`.nii.gz` file, which has the very bytes that inference.py writes for the same weights, seed and settings on the same
kind of machine, and what inference.py writes into the `.json` beside it.
"""

import base64
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from ldm3d import distributed
from ldm3d.allocator import free_bytes, keep_freed_memory
from ldm3d.cards import UNET
from ldm3d.errors import UserError, WeightsError
from ldm3d.files import sha256
from ldm3d.nifti import stem_of
from ldm3d.samplers import LARGEST_SEED, choose_sampler
from ldm3d.samples import file_name, write_sample
from ldm3d.sampling import Sampler, VolumeId
from ldm3d.sections import SamplerName
from mlops.api.schemas import Whole, Wire

MODEL_DIR = "AZUREML_MODEL_DIR"
LARGEST_BODY = 4096
"""Bytes; more than all fields together can need."""
log = logging.getLogger("azmlinfsrv.score")


class Limits(BaseSettings):
    """What one request may ask for: environment variables of the deployment."""

    model_config = SettingsConfigDict(env_prefix="LDM3D_", frozen=True)
    max_num: PositiveInt = 4
    """Volumes. An endpoint answers at once and gives up after minutes; many volumes are for mlops.batch."""
    max_steps: PositiveInt = 100
    """Network evaluations for a volume."""


class ScoreRequest(Wire):
    """What to generate. The same request gives the same volumes."""

    num: Annotated[int, Field(ge=1, strict=True), Whole] = 1
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED, strict=True), Whole] = 0
    steps: Annotated[int | None, Field(ge=1, strict=True), Whole] = None
    scheduler: SamplerName | None = None
    dtype: Literal["float32", "int16"] = "float32"


class Refused(Exception):
    """A request that cannot be granted.

    Args:
        status: of the HTTP answer.
        message: what would be right.
    """

    def __init__(self, status: int, message: str):
        self.status = status
        super().__init__(message)


class Scorer:
    """A model that answers requests.

    Args:
        folder: holds published weights, at any depth: Azure ML puts a folder of the model's name around them.
        limits: of a request.

    Raises:
        WeightsError: there are none, several, or they do not belong together.
    """

    def __init__(self, folder: Path, limits: Limits):
        found = sorted(folder.rglob(UNET))
        if len(found) != 1:
            raise WeightsError(f"{folder}: holds {len(found)} files {UNET}; one model is served")
        device = distributed.choose_device()
        self.limits, self.sampler = limits, Sampler.from_folder(found[0].parent, device)
        # Decided once: how a volume is decoded must not depend on what is free at the moment, as its values do.
        self.sampler.decode_bytes = free_bytes(device)
        self.model = sha256(found[0])

    def answer(self, body: str) -> dict[str, Any]:
        """Raises `Refused`."""
        request = self._validated(body)
        try:
            scheduler, steps = choose_sampler(self.sampler.card.schedule, request.scheduler, request.steps)
        except UserError as error:
            raise Refused(400, str(error)) from error
        if steps > self.limits.max_steps:
            raise Refused(400, f"steps {steps}: at most {self.limits.max_steps} here")
        volumes = [self._volume(request, number, scheduler, steps) for number in range(request.num)]
        return {"volumes": volumes, "model_sha256": self.model}

    def _validated(self, body: str) -> ScoreRequest:
        if len(body) > LARGEST_BODY:
            raise Refused(413, f"the request has {len(body)} characters; at most {LARGEST_BODY} are read")
        try:
            request = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise Refused(400, f"{place}: {first['msg']}" if place else first["msg"]) from error
        if request.num > self.limits.max_num:
            raise Refused(400, f"num {request.num}: at most {self.limits.max_num} here; more with mlops.batch")
        return request

    def _volume(self, request: ScoreRequest, number: int, scheduler: SamplerName, steps: int) -> dict[str, Any]:
        volume = VolumeId(request.seed, number)
        values = self.sampler.sample_volumes([volume], scheduler, steps)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / file_name(volume)
            write_sample(path, self.sampler, volume, values[0], scheduler, steps, request.dtype)
            sidecar = json.loads(path.with_name(f"{stem_of(path)}.json").read_text(encoding="utf-8"))
            return {"name": path.name, "data": base64.b64encode(path.read_bytes()).decode(), "sidecar": sidecar}


scorer: Scorer | None = None


def init() -> None:
    """Load the weights, once for each worker of the server. Where it raises, the deployment fails and says why."""
    global scorer
    folder = os.environ.get(MODEL_DIR)
    if not folder:  # else the current folder would be searched, and what lies in it served
        raise WeightsError(f"{MODEL_DIR} is not set: it must name the folder with the model")
    keep_freed_memory()
    scorer = Scorer(Path(folder), Limits())
    log.info("serving %s on %s", scorer.model[:12], scorer.sampler.device)


def run(raw_data: str) -> Any:
    """Answer a request; called by one at a time, as the server's workers have one thread each."""
    from azureml_inference_server_http.api.aml_response import AMLResponse  # type: ignore[import-not-found]

    assert scorer is not None
    try:
        return AMLResponse(scorer.answer(raw_data), 200, json_str=True)
    except Refused as refusal:
        return AMLResponse({"error": str(refusal)}, refusal.status, json_str=True)
    except TimeoutError:  # the server's own
        raise
    except Exception:
        log.exception("a request failed")
        return AMLResponse({"error": "the model failed; the deployment's log says why"}, 500, json_str=True)

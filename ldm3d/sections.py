"""The configuration's sections: the trainings, noise, data, sampling, tracking. `ldm3d.schema` puts them together.

Key names follow the MONAI tutorial `generation/3d_ldm`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ldm3d.definitions import Fraction, NotNegative, Positive, PositiveFloat, Size, Strict, Weight


class Optimization(Strict):
    """What both stages' trainings have in common."""

    batch_size: Positive
    """Volumes of one step on each process."""
    patch_size: Size
    """Voxels a side of what one volume contributes (random crop in stage 1, centre crop in stage 2)."""
    lr: PositiveFloat
    """Highest learning rate of AdamW."""
    max_epochs: Positive
    """Passes through the training set."""
    val_interval: Positive = 1
    """Epochs between validations; the last epoch is always validated."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay at `lr`, or fall to zero along a half cosine."""
    warm_up_steps: NotNegative = 0
    """Steps over which the learning rate rises linearly from zero to `lr`."""
    weight_decay: Weight = 0.0
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are scaled down to this norm where they exceed it."""
    flip: bool = False
    """Mirror left and right at random: doubles the data where the side does not matter."""
    accumulate_steps: Positive = 1
    """Batches on each process whose gradients make one step together: as if `batch_size` were so many times larger, for
    the memory of one batch."""
    scale_lr: Literal["none", "sqrt", "linear"] = "none"
    """How `lr` follows the number of batches in a step (`accumulate_steps` times the number of processes): not at all,
    with its square root, or in proportion."""


class AutoencoderTrain(Optimization):
    """Stage 1."""

    recon_loss: Literal["l1", "l2"] = "l1"
    """Reconstruction term: mean absolute or mean squared difference."""
    kl_weight: Weight = 1e-3
    """Weight of the KL term, which is averaged over the latent's elements (so it does not depend on patch size)."""
    perceptual_weight: Weight = 0.0
    """Weight of the perceptual term; needs pretrained weights."""
    perceptual_network: Literal["squeeze", "alex", "vgg", "radimagenet_resnet50", "medicalnet_resnet10_23datasets"] = (
        "squeeze"
    )
    """MONAI's network for the perceptual term."""
    perceptual_weights: Path | None = None
    """Folder with that network's weights (a torch hub folder); without it they are downloaded."""
    adv_weight: Weight = 0.01
    """Weight of the adversarial term (least squares)."""
    adv_warm_up_epochs: NotNegative = 5
    """Epochs before the adversarial term sets in."""
    val_patch_size: Size | None = None
    """Centre crop for validation where memory forbids whole volumes; null validates whole volumes."""


class DiffusionTrain(Optimization):
    """Stage 2."""

    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the running average of the weights that is validated and published; 0 publishes the weights as such."""
    center_latents: bool = False
    """Subtract the training set's mean latent at each voxel: an easier start where all volumes lie in one template
    space, as BraTS does."""
    sample_interval: NotNegative = 0
    """Epochs between generated volumes in TensorBoard; 0 generates none."""


class DdpmSchedule(Strict):
    """Diffusion with Gaussian noise added in steps (Ho et al. 2020, Denoising Diffusion Probabilistic Models)."""

    type: Literal["ddpm"] = "ddpm"
    """Kind of diffusion."""
    num_train_timesteps: Positive = 1000
    """Noise levels."""
    schedule: Literal["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"] = "scaled_linear_beta"
    """How beta grows between `beta_start` and `beta_end`."""
    beta_start: Fraction = 0.0015
    """Variance of the first step's noise."""
    beta_end: Fraction = 0.0195
    """Variance of the last step's noise."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts: the noise, or v of Salimans and Ho 2022."""


class RFlowSchedule(Strict):
    """Rectified flow: straight paths from noise to data (Liu et al. 2023, Flow Straight and Fast)."""

    type: Literal["rflow"]
    """Kind of diffusion."""
    num_train_timesteps: Positive = 1000
    """Scale of the timestep that the network is given."""
    timesteps: Literal["uniform", "logit-normal"] = "logit-normal"
    """Distribution of training timesteps (Esser et al. 2024, section 3.1)."""


Schedule = DdpmSchedule | RFlowSchedule
SamplerName = Literal["ddpm", "ddim", "pndm", "rflow"]
SAMPLERS: dict[str, tuple[SamplerName, ...]] = {"ddpm": ("ddim", "ddpm", "pndm"), "rflow": ("rflow",)}
"""Which samplers a kind of diffusion allows; the first one is its default."""


class DataConfig(Strict):
    """Which volumes are read, and how they are prepared."""

    layout: Literal["auto", "task01", "brats", "list"] = "auto"
    """How files lie in `data_base_dir`: the Decathlon's Task01_BrainTumour, BraTS case folders, or a plain folder or
    list of NIfTI files; `auto` looks."""
    datalist: Path | None = None
    """JSON or CSV list of files with optional columns modality, age, sex, label, split."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a damaged case does: stop before the first epoch, or be left out with a line that says why."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the cases that are held out for validation."""
    split_seed: int = 0
    """Another seed gives another split; the split depends on the cases' names alone."""
    cache_dir: Path | None = None
    """Where prepared volumes and latents are kept; by default `cache` beside `data_base_dir`'s content."""
    latents_dir: Path | None = None
    """Where latents are kept, if not beside the prepared volumes: those may lie where a run cannot write."""
    num_workers: NotNegative = 2
    """Processes that load batches; 0 loads in the training process."""


class SamplingConfig(Strict):
    """What inference.py does when no flag says otherwise."""

    scheduler: SamplerName | None = None
    """Sampler; by default rflow for rectified flow, ddim for ddpm."""
    steps: Positive | None = None
    """Network evaluations per volume; by default 30 for rflow, 50 for ddim and pndm, all for ddpm."""
    batch_size: Positive = 1
    """Volumes sampled at once; changes speed and memory, never the result."""
    decode_gib: PositiveFloat | None = None
    """GiB that decoding may take on top of the weights, on the GPU or in memory; by default what is free."""


class TrackingConfig(Strict):
    """Where a training's values, pictures and weights go besides TensorBoard."""

    mlflow_uri: str | None = None
    """Address of an MLflow server, as http://127.0.0.1:5000; needs the package mlflow. Null uses none."""
    mlflow_experiment: str = "ldm3d"
    """Experiment that gets the runs; made where it is missing."""
    mlflow_model: str | None = "ldm3d"
    """Model that published weights become a version of, at a training's end: this name with `-autoencoder` or
    `-diffusion`. Null registers none."""

    @field_validator("mlflow_uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri and "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "must not hold a name or password, which would be stored with each run; set them as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return uri

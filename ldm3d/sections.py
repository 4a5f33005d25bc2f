"""The configuration's sections: the trainings, noise, data, sampling, tracking. `ldm3d.schema` puts them together.

Key names follow the MONAI tutorial `generation/3d_ldm`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from ldm3d.definitions import Fraction, NotNegative, Positive, PositiveFloat, Size, Strict, Weight


class Optimization(Strict):
    """What both stages' trainings have in common."""

    batch_size: Annotated[Positive, Field(le=10**6)]
    """Volumes of one step on each process. The first key to lower where memory is short."""
    patch_size: Size
    """Voxels along x, y and z of what one volume contributes: a random crop in stage 1, the crop around its middle in
    stage 2, which is the size that will be generated and so must hold a whole head. Each number must be divisible as
    the networks halve the grid; the refusal names the nearest that is."""
    lr: PositiveFloat
    """Highest learning rate of AdamW, after the warm-up. Lower it where the loss is not finite or jumps."""
    max_epochs: Positive
    """Passes through the training set. A resumed run may have another number."""
    val_interval: Positive = 1
    """Epochs between validations; the last epoch is always validated."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay at `lr`, or fall to zero along half a cosine, which ends with `max_epochs`."""
    warm_up_steps: NotNegative = 0
    """Steps over which the learning rate rises linearly from near zero to `lr`."""
    weight_decay: Annotated[Weight, Field(le=1000)] = 0.0
    """Decoupled weight decay of AdamW; 0 has none."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """The gradients of all weights together are scaled down to this Euclidean norm where they exceed it."""
    flip: bool = False
    """Mirror left and right at random: doubles the data where the side does not matter."""
    accumulate_steps: Annotated[Positive, Field(le=10**6)] = 1
    """Batches on each process whose gradients make one step together: as if `batch_size` were so many times larger, for
    the memory of one batch."""
    scale_lr: Literal["none", "sqrt", "linear"] = "none"
    """How `lr` follows the number of batches in a step (`accumulate_steps` times the number of processes): not at all,
    with its square root, or in proportion."""


class AutoencoderTrain(Optimization):
    """Stage 1: the autoencoder."""

    recon_loss: Literal["l1", "l2"] = "l1"
    """Reconstruction term: mean absolute or mean squared difference."""
    kl_weight: Weight = 1e-3
    """Weight of the KL term, which is averaged over the latent's elements, so it does not depend on the patch size.
    More of it makes latents smoother and reconstructions blurrier. The tutorial's weight is for a sum and far too small
    here."""
    perceptual_weight: Weight = 0.0
    """Weight of the perceptual term, which compares features of a pretrained network; 0 leaves it out. Its weights are
    downloaded if `perceptual_weights` does not name them."""
    perceptual_network: Literal["squeeze", "alex", "vgg", "radimagenet_resnet50", "medicalnet_resnet10_23datasets"] = (
        "squeeze"
    )
    """The network of the perceptual term. `squeeze`, `alex`, `vgg` (photographs) and `radimagenet_resnet50` (radiology)
    see slices, `medicalnet_resnet10_23datasets` whole volumes. The first three need lpips and torchvision."""
    perceptual_weights: Path | None = None
    """Folder with that network's weights (a torch hub folder); without it they are downloaded."""
    adv_weight: Weight = 0.01
    """Weight of the adversarial term (least squares), which sharpens; 0 trains without a discriminator."""
    adv_warm_up_epochs: NotNegative = 5
    """Epochs before the adversarial term sets in: a discriminator of bad reconstructions teaches nothing."""
    val_patch_size: Size | None = None
    """Voxels along x, y and z of the crop around the middle that is validated, where memory forbids whole volumes. Null
    validates whole volumes."""


class DiffusionTrain(Optimization):
    """Stage 2: the diffusion network, on latents."""

    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay, for each step, of the running average of the weights that is validated and published: 0.999 averages over
    about 1000 steps. Use less in a short training; 0 publishes the weights as such."""
    center_latents: bool = False
    """Subtract the training set's mean latent at each voxel: an easier start where all volumes lie in one template
    space, as BraTS does."""
    sample_interval: NotNegative = 0
    """Epochs between generated volumes in TensorBoard; 0 generates none."""


class DdpmSchedule(Strict):
    """Diffusion with Gaussian noise added in steps (Ho et al. 2020, Denoising Diffusion Probabilistic Models)."""

    type: Literal["ddpm"] = "ddpm"
    """Kind of diffusion. May be left out, as in the tutorial's configs."""
    num_train_timesteps: Annotated[Positive, Field(le=10**6)] = 1000
    """Number of noise levels."""
    schedule: Literal["linear_beta", "scaled_linear_beta", "sigmoid_beta", "cosine"] = "scaled_linear_beta"
    """How the variance of a step's noise, beta, grows from `beta_start` to `beta_end`. `cosine` has its own values."""
    beta_start: Fraction = 0.0015
    """Variance of the first step's noise."""
    beta_end: Fraction = 0.0195
    """Variance of the last step's noise."""
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    """What the network predicts: the noise, or v of Salimans and Ho 2022, a mixture of noise and data."""


class RFlowSchedule(Strict):
    """Rectified flow: straight paths from noise to data (Liu et al. 2023, Flow Straight and Fast)."""

    type: Literal["rflow"]
    """Kind of diffusion."""
    num_train_timesteps: Annotated[Positive, Field(le=10**6)] = 1000
    """Scale of the timestep that the network is given; the path itself is continuous."""
    timesteps: Literal["uniform", "logit-normal"] = "logit-normal"
    """Distribution of training timesteps (Esser et al. 2024, section 3.1); `logit-normal` trains the middle of the path
    more often than its ends."""


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
    """JSON or CSV list of files with the column `image` and optional columns `label`, `name`, `modality`, `age`, `sex`,
    `split` and `subject`: who has the same subject is trained on or held out together. The path starts at the current
    folder or at `data_base_dir`."""
    on_error: Literal["fail", "skip"] = "fail"
    """What a damaged case does: stop before the first epoch, or be left out with a line that says why."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the cases that are held out for validation, where a list does not say which. Once trained, the split is
    kept in `model_dir`."""
    split_seed: int = 0
    """Another seed gives another split, until one is kept in `model_dir`. The split depends on this and on the cases'
    names, or their subjects where a list says them."""
    cache_dir: Path | None = None
    """Folder for prepared volumes and latents: a fast local disk is best. Null keeps them in `cache` in
    `data_base_dir`."""
    latents_dir: Path | None = None
    """Folder for latents, if not beside the prepared volumes: those may lie where a run cannot write."""
    num_workers: Annotated[NotNegative, Field(le=1000)] = 2
    """Processes that load batches, for each training process; 0 loads in the training process itself."""


class SamplingConfig(Strict):
    """What `inference.py` does when no option says otherwise."""

    scheduler: SamplerName | None = None
    """Sampler. Null is `rflow` for rectified flow and `ddim` for ddpm, which `ddpm` and `pndm` sample too."""
    steps: Positive | None = None
    """Network evaluations for a volume: time grows with them. Null is 30 for rflow, 50 for ddim and pndm, and
    `num_train_timesteps` for ddpm."""
    batch_size: Positive = 1
    """Volumes sampled at once; changes speed and memory, never the result."""
    decode_gib: Annotated[PositiveFloat, Field(le=10**6)] | None = None
    """GiB that decoding may take on top of the weights, on the GPU or in memory. What does not fit is decoded in
    pieces. Null is what is free."""


class TrackingConfig(Strict):
    """Where a training's values, pictures and weights go besides TensorBoard."""

    mlflow_uri: str | None = None
    """Address of an MLflow server, as http://127.0.0.1:5000; needs the package mlflow. Null uses none."""
    mlflow_experiment: str = "ldm3d"
    """Experiment that gets the runs; made where it is missing."""
    mlflow_model: str | None = "ldm3d"
    """Model that published weights become a version of, at a training's end: `NAME-autoencoder` and
    `NAME-diffusion`. Null registers none."""

    @field_validator("mlflow_uri")
    @classmethod
    def _without_password(cls, uri: str | None) -> str | None:
        if uri and "@" in uri.partition("://")[2].partition("/")[0]:
            raise ValueError(
                "must not hold a name or password, which would be stored with each run; set them as "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return uri

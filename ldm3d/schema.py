"""The configuration: every key, its type, default, unit and meaning, and which values go together.

Files are read by `ldm3d.config`; here is only what a valid configuration is. Key names follow the
MONAI tutorial `generation/3d_ldm`. The networks' own keys are in `ldm3d.definitions`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from ldm3d.definitions import (
    AutoencoderDef,
    DiffusionDef,
    DiscriminatorDef,
    Fraction,
    NotNegative,
    Positive,
    PositiveFloat,
    Size,
    Strict,
    Weight,
)


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


class Config(Strict):
    """A training configuration, the file behind `-c`."""

    channel: Annotated[int, Field(ge=0, le=3)] = 0
    """Contrast: 0 FLAIR, 1 T1, 2 T1 with contrast agent, 3 T2."""
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (1.1, 1.1, 1.1)
    """Voxel size in mm to which volumes are resampled."""
    spatial_dims: Literal[3] = 3
    """Number of spatial dimensions."""
    image_channels: Literal[1] = 1
    """Channels of the image."""
    latent_channels: Positive
    """Channels of the latent."""
    autoencoder_def: AutoencoderDef
    """The autoencoder."""
    discriminator_def: DiscriminatorDef = DiscriminatorDef()
    """The discriminator of the adversarial term."""
    autoencoder_train: AutoencoderTrain
    """Stage 1."""
    diffusion_def: DiffusionDef
    """The diffusion network."""
    diffusion_train: DiffusionTrain
    """Stage 2."""
    noise_schedule: Annotated[Schedule, Field(alias="NoiseScheduler", discriminator="type")] = DdpmSchedule()
    """The diffusion's noise."""
    sampling: SamplingConfig = SamplingConfig()
    """Stage 3."""
    data: DataConfig = DataConfig()
    """The data set."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random in training."""
    amp: bool = True
    """Mixed precision on a GPU: bfloat16 where the GPU has it, else float16. No effect on a CPU, where it is slower."""
    compile: bool = False
    """torch.compile on a GPU. No effect on a CPU, where it brings nothing."""
    sync_bn: bool = False
    """Synchronise batch normalisation over processes."""
    use_checkpointing: Literal[False, True, "blocks", "norms"] = False
    """Compute activations again in the backward pass instead of keeping them: off, "norms" (normalisations and
    activation functions, the convolutions' results are kept) or "blocks" (whole residual blocks; true is the same).
    Kept by the 32g networks under autocast: "norms" 31 %, "blocks" 24 % of the autoencoder's activations, 30 % and 24 %
    of the U-Net's; the peak of a step is nearly the same with both. Speed of forward and backward on a CPU (fp32):
    "norms" 0.99 and 1.01, "blocks" 0.89 and 0.77 for smaller networks of the two kinds."""
    ddp_backend: Literal["nccl", "gloo"] | None = None
    """Communication between processes; by default nccl on GPUs, gloo on CPUs."""
    ddp_timeout_seconds: PositiveFloat = 600.0
    """How long a process waits for the others before the run fails."""
    checkpoint_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between two saved training states; 0 saves after every step. A killed run loses no more than this; one
    that is stopped by Ctrl-C or SIGTERM saves first and loses nothing."""
    keep_last: Positive = 2
    """How many training states are kept: if the newest is damaged, the one before it is used."""
    max_skipped_steps: NotNegative = 10
    """Steps in a row that may be lost to float16's overflows, as loss scaling expects some; one more stops the
    training. Under float32 and bfloat16 nothing is skipped: the first bad step stops it."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        problems = [
            *_channel_problems(self),
            *_level_problems(self),
            *_size_problems(self),
            *_schedule_problems(self.noise_schedule, self.sampling),
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(C, X, Y, Z) of the latent of one `diffusion_train.patch_size` volume."""
        x, y, z = (n // self.autoencoder_def.downsampling for n in self.diffusion_train.patch_size)
        return self.latent_channels, x, y, z


def _channel_problems(cfg: Config) -> list[str]:
    expected = {
        "autoencoder_def.in_channels": (cfg.autoencoder_def.in_channels, "image_channels", cfg.image_channels),
        "autoencoder_def.out_channels": (cfg.autoencoder_def.out_channels, "image_channels", cfg.image_channels),
        "autoencoder_def.latent_channels": (
            cfg.autoencoder_def.latent_channels,
            "latent_channels",
            cfg.latent_channels,
        ),
        "diffusion_def.in_channels": (cfg.diffusion_def.in_channels, "latent_channels", cfg.latent_channels),
        "diffusion_def.out_channels": (cfg.diffusion_def.out_channels, "latent_channels", cfg.latent_channels),
    }
    return [
        f"{key} is {value} but must equal {name}, which is {right}"
        for key, (value, name, right) in expected.items()
        if value != right
    ]


def _level_problems(cfg: Config) -> list[str]:
    problems = []
    for key, net in (("autoencoder_def", cfg.autoencoder_def), ("diffusion_def", cfg.diffusion_def)):
        levels = len(net.channels)
        if len(net.attention_levels) != levels:
            problems.append(f"{key}.attention_levels needs {levels} entries, one for each of channels {net.channels}")
        if isinstance(net.num_res_blocks, tuple) and len(net.num_res_blocks) != levels:
            problems.append(f"{key}.num_res_blocks needs {levels} entries, one for each of channels {net.channels}")
        if any(c % net.norm_num_groups for c in net.channels):
            problems.append(f"{key}.norm_num_groups {net.norm_num_groups} must divide every one of {net.channels}")
    return problems + _head_problems(cfg.diffusion_def)


def _head_problems(net: DiffusionDef) -> list[str]:
    if len(net.head_channels) != len(net.channels):
        return [f"diffusion_def.num_head_channels needs {len(net.channels)} entries, one for each of {net.channels}"]
    return [
        f"diffusion_def.num_head_channels {heads} must divide the {channels} channels of level {level}"
        for level, (attention, heads, channels) in enumerate(
            zip(net.attention_levels, net.head_channels, net.channels, strict=False)
        )
        if attention and (heads == 0 or channels % heads)
    ]


def _size_problems(cfg: Config) -> list[str]:
    stage1 = cfg.autoencoder_def.downsampling
    stage2 = stage1 * cfg.diffusion_def.downsampling
    wanted = {
        "autoencoder_train.patch_size": (cfg.autoencoder_train.patch_size, stage1),
        "autoencoder_train.val_patch_size": (cfg.autoencoder_train.val_patch_size or (stage1,) * 3, stage1),
        "diffusion_train.patch_size": (cfg.diffusion_train.patch_size, stage2),
    }
    return [
        f"{key} {list(size)} must be divisible by {factor} (nearest: {_nearest(size, factor)})"
        for key, (size, factor) in wanted.items()
        if any(n % factor for n in size)
    ]


def _schedule_problems(schedule: Schedule, sampling: SamplingConfig) -> list[str]:
    problems = []
    if isinstance(schedule, DdpmSchedule) and schedule.beta_start >= schedule.beta_end:
        problems.append(
            f"NoiseScheduler.beta_start {schedule.beta_start} must be smaller than beta_end {schedule.beta_end}"
        )
    if sampling.scheduler not in (None, *SAMPLERS[schedule.type]):
        right = " or ".join(SAMPLERS[schedule.type])
        problems.append(f"sampling.scheduler {sampling.scheduler!r}: {schedule.type} is sampled with {right}")
    if (sampling.steps or 1) > schedule.num_train_timesteps:
        problems.append(f"sampling.steps {sampling.steps} must be at most {schedule.num_train_timesteps}")
    return problems


def _nearest(size: Size, factor: int) -> list[int]:
    return [max(factor, round(n / factor) * factor) for n in size]


class Environment(Strict):
    """Where a run reads and writes, the file behind `-e`. Relative paths start at the current folder."""

    model_dir: Path
    """Weights and training state."""
    tfevent_path: Path
    """TensorBoard's event files."""
    output_dir: Path
    """Generated volumes."""
    data_base_dir: Path
    """The data set."""
    resume_ckpt: Literal[False, True, "auto"] = False
    """`true` does the same as `--resume`, `"auto"` the same as `--resume auto`."""

"""The configuration as a whole: every key that is in no section, and which values go together.

Files are read by `ldm3d.config`; here is only what a valid configuration is. Its sections are in `ldm3d.sections`, the
networks' own keys in `ldm3d.definitions`.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ldm3d.definitions import (
    AutoencoderDef,
    DiffusionDef,
    DiscriminatorDef,
    NotNegative,
    Positive,
    PositiveFloat,
    Size,
    Strict,
    VoxelSize,
)
from ldm3d.sections import (
    SAMPLERS,
    AutoencoderTrain,
    DataConfig,
    DdpmSchedule,
    DiffusionTrain,
    SamplingConfig,
    Schedule,
    TrackingConfig,
)


class Config(Strict):
    """A training configuration, the file behind `-c`."""

    channel: Annotated[int, Field(ge=0, le=3)] = 0
    """Contrast that is trained: 0 FLAIR, 1 T1, 2 T1 with contrast agent, 3 T2."""
    spacing: tuple[VoxelSize, VoxelSize, VoxelSize] = (1.1, 1.1, 1.1)
    """Voxel size in mm, along x, y and z, to which volumes are resampled, and which generated volumes have. Coarser
    spacing with smaller patches is much cheaper."""
    spatial_dims: Literal[3] = 3
    """Number of spatial dimensions; volumes have three."""
    image_channels: Literal[1] = 1
    """Channels of the image: one contrast."""
    latent_channels: Positive
    """Channels of the latent: more of them keep more of the image, and are harder to generate."""
    autoencoder_def: AutoencoderDef
    """The autoencoder."""
    discriminator_def: DiscriminatorDef = DiscriminatorDef()
    """The discriminator of stage 1's adversarial term."""
    autoencoder_train: AutoencoderTrain
    """The training of stage 1."""
    diffusion_def: DiffusionDef
    """The diffusion network."""
    diffusion_train: DiffusionTrain
    """The training of stage 2."""
    noise_schedule: Annotated[Schedule, Field(alias="NoiseScheduler", discriminator="type")] = DdpmSchedule()
    """The kind of diffusion and its noise."""
    sampling: SamplingConfig = SamplingConfig()
    """Stage 3: generating volumes."""
    data: DataConfig = DataConfig()
    """The data set."""
    tracking: TrackingConfig = TrackingConfig()
    """An MLflow server."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything random in training. `--seed` replaces it."""
    amp: bool = True
    """Mixed precision on a GPU: bfloat16 where the GPU has it, else float16. No effect on a CPU, where it is slower."""
    compile: bool = False
    """`torch.compile` on a GPU: the first steps take longer, the others less. No effect on a CPU, where it brings
    nothing."""
    sync_bn: bool = False
    """Synchronise batch normalisation over processes; only a discriminator with `BATCH` has any."""
    use_checkpointing: Literal[False, True, "blocks", "norms"] = False
    """Compute activations again in the backward pass instead of keeping them, for memory: `"norms"` (normalisations and
    activation functions; the convolutions' results are kept) costs next to no time, `"blocks"` (whole residual blocks;
    `true` is the same) keeps least. What each was measured to cost is in docs/MULTI_GPU_OPTIMIZATION_SUMMARY.md."""
    ddp_backend: Literal["nccl", "gloo"] | None = None
    """Communication between processes. Null is nccl on GPUs and gloo on CPUs."""
    ddp_timeout_seconds: Annotated[PositiveFloat, Field(le=7 * 24 * 3600)] = 600.0
    """Seconds that a process waits for the others before the run fails, a week at most."""
    checkpoint_every_minutes: Annotated[float, Field(ge=0)] = 10.0
    """Minutes between two saved training states; 0 saves after every step. A killed run loses no more than this; one
    that is stopped by Ctrl-C or SIGTERM saves first and loses nothing."""
    keep_last: Annotated[Positive, Field(le=1000)] = 2
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
    if isinstance(schedule, DdpmSchedule) and (schedule.schedule, schedule.prediction_type) == ("cosine", "epsilon"):
        # Nichol and Dhariwal 2021, who made this schedule, clip what they sample to [-1, 1]; latents have no bounds.
        problems.append(
            "NoiseScheduler.prediction_type 'epsilon' cannot go with schedule 'cosine', which ends in noise alone: an "
            "error of 1 % in it would become noise six times stronger than the latent; use v_prediction"
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
    """Folder for weights, training state and the split. One training at a time may write to it."""
    tfevent_path: Path
    """Folder for the event files of TensorBoard."""
    output_dir: Path
    """Folder for generated volumes, their sidecars and pictures."""
    data_base_dir: Path
    """Folder of the data set; prepared volumes and latents are kept in its `cache`, unless `data.cache_dir` says
    otherwise."""
    resume_ckpt: Literal[False, True, "auto"] = False
    """`true` does the same as `--resume`, `"auto"` the same as `--resume auto`."""

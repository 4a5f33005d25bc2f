"""What a network is made of: the arguments of MONAI's classes, typed and strict."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# No scan has more voxels a side, and much larger numbers overflow in torch.
_Side = Annotated[Positive, Field(le=4096)]
Size = tuple[_Side, _Side, _Side]
Fraction = Annotated[float, Field(gt=0, lt=1)]
VOXEL_SIZE_MM = (0.1, 20.0)
"""Voxels smaller or larger are no scan's: a mistyped spacing, or a header in another unit."""
VoxelSize = Annotated[float, Field(ge=VOXEL_SIZE_MM[0], le=VOXEL_SIZE_MM[1])]


class Strict(BaseModel):
    """Frozen, without unknown keys, without silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, populate_by_name=True
    )


class NetworkDef(Strict):
    """What the autoencoder and the diffusion network have in common."""

    spatial_dims: Literal[3] = 3
    """Number of spatial dimensions; volumes have three."""
    channels: tuple[Positive, ...] = Field(min_length=1)
    """Feature channels of each level; each level after the first halves the grid. Memory and time grow with the first
    entries most, as these work on the finest grid."""
    num_res_blocks: Positive | tuple[Positive, ...] = 2
    """Residual blocks of a level, one number for all levels or one for each."""
    attention_levels: tuple[bool, ...]
    """Which levels have self-attention, one entry for each of `channels`. It costs memory and time on fine grids: use
    it on the coarsest levels only."""
    norm_num_groups: Positive = 32
    """Groups of the group normalisation; must divide every entry of `channels`."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the variance in the group normalisation, so that nothing is divided by zero."""
    include_fc: bool = True
    """Output projection of the attention blocks. True is MONAI's default."""
    use_combined_linear: bool = False
    """One matrix for query, key and value instead of three: other names of weights, the same function."""


class AutoencoderDef(NetworkDef):
    """Arguments of `monai.networks.nets.AutoencoderKL`, and `patchify`."""

    in_channels: Positive = 1
    """Image channels going in; must equal `image_channels`."""
    out_channels: Positive = 1
    """Image channels coming out; must equal `image_channels`."""
    latent_channels: Positive
    """Channels of the latent; must equal the top level's `latent_channels`."""
    with_encoder_nonlocal_attn: bool = False
    """Self-attention in the middle of the encoder, on the latent's grid: what is far apart is seen together, for memory
    that grows with the square of the number of voxels there."""
    with_decoder_nonlocal_attn: bool = False
    """The same in the middle of the decoder."""
    use_flash_attention: bool = False
    """Scaled dot-product attention: the same result in less time and memory, as the matrix of all pairs is never
    kept."""
    patchify: Positive = 1
    """Fold blocks of this many voxels a side into channels before the first convolution, unfold them after the last:
    a cheap first level for small machines. 1 is MONAI's network unchanged."""

    @property
    def downsampling(self) -> int:
        """Voxels a side of the image for each voxel of the latent."""
        voxels: int = self.patchify * 2 ** (len(self.channels) - 1)
        return voxels


class DiscriminatorDef(Strict):
    """Arguments of `monai.networks.nets.PatchDiscriminator`."""

    channels: Positive = 32
    """Feature channels of the first layer; doubled by each further one."""
    num_layers_d: Positive = 3
    """Strided layers, each of which halves the grid: more of them judge larger patches."""
    norm: Literal["INSTANCE", "BATCH"] = "INSTANCE"
    """Normalisation; BATCH is synchronised over processes when `sync_bn` is true."""


class DiffusionDef(NetworkDef):
    """Arguments of `monai.networks.nets.DiffusionModelUNet`."""

    in_channels: Positive
    """Channels going in; must equal `latent_channels`."""
    out_channels: Positive
    """Channels coming out; must equal `latent_channels`."""
    num_head_channels: NotNegative | tuple[NotNegative, ...] = 8
    """Channels of each attention head, one number for all levels or one for each. It must divide the channels of every
    level that has attention; 0 is for levels without."""
    resblock_updown: bool = False
    """Residual blocks instead of convolutions for changing the grid."""
    use_flash_attention: bool = True
    """Scaled dot-product attention: the same result in less time and memory, as the matrix of all pairs is never
    kept."""
    dropout_cattn: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in the attention blocks."""

    @property
    def downsampling(self) -> int:
        """Voxels a side of the latent for each voxel of the coarsest level."""
        voxels: int = 2 ** (len(self.channels) - 1)
        return voxels

    @property
    def head_channels(self) -> tuple[int, ...]:
        """`num_head_channels` for each level."""
        heads = self.num_head_channels
        return heads if isinstance(heads, tuple) else (heads,) * len(self.channels)

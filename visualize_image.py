"""Look at volumes: axial, coronal and sagittal plane of any NIfTI file, as a PNG picture."""

import argparse
from pathlib import Path

import numpy as np

import utils
from ldm3d.errors import ConfigError, DataError
from ldm3d.montage import Cell, montage, window
from ldm3d.nifti import apart_mm, num_channels, read_volume, spacing_of, stem_of

MOST_CHANNELS = 8


def main() -> None:
    args = parse()
    if args.label and len(args.files) > 1:
        raise ConfigError("--label belongs to one volume; give one file with it")
    rows = {path: cells_of(path, args.channel, args.label) for path in args.files}
    if args.output:
        print(draw(rows, args.output))
        return
    pictures = {Path(f"{stem_of(path)}.png"): path for path in rows}
    if len(pictures) < len(rows):
        raise ConfigError("two of the files have the same name, and would get one picture; draw all into one: --output")
    for picture, path in pictures.items():
        print(draw({path: rows[path]}, picture))


def parse() -> argparse.Namespace:
    parser = utils.script_parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="3-D or 4-D .nii or .nii.gz")
    parser.add_argument("--output", type=Path, help="one picture of all files (if not given: <name>.png here for each)")
    parser.add_argument("--label", help="segmentation to draw over the volume; its largest slices are shown")
    parser.add_argument("--channel", type=int, help="channel of a 4-D file (if not given: all of them)")
    return parser.parse_args()


def cells_of(path: str, channel: int | None, label_path: str | None) -> list[Cell]:
    """What to draw of one file: the channel asked for, else every channel."""
    channels = [channel] if channel is not None else range(num_channels(path))
    if len(channels) > MOST_CHANNELS:
        raise DataError(f"{path}: has {len(channels)} channels; choose one with --channel")
    return [cell_of(path, c, label_path) for c in channels]


def cell_of(path: str, channel: int, label_path: str | None) -> Cell:
    volume, affine = read_volume(path, channel)
    label = None if label_path is None else read_label(label_path, volume.shape, affine)
    spacing = spacing_of(affine)
    caption = f"channel {channel}   {'x'.join(map(str, volume.shape))}   {' x '.join(f'{s:.3g}' for s in spacing)} mm"
    finite = volume[np.isfinite(volume)]
    if finite.size:
        caption += f"   {finite.min():.4g} to {finite.max():.4g}"
    if finite.size < volume.size:
        caption += f"   {volume.size - finite.size} voxels NaN or infinite (black)"
    return Cell(window(volume), label, caption, spacing=spacing)


def read_label(path: str, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The segmentation, if it lies on the volume's grid."""
    label, label_affine = read_volume(path)
    if label.shape != shape:
        raise DataError(f"{path}: lies on another grid than the volume ({label.shape} against {shape})")
    apart = apart_mm(shape, affine, label_affine)
    if apart > min(spacing_of(affine)) / 2:
        raise DataError(f"{path}: lies {apart:.3g} mm beside the volume")
    return label


def draw(rows: dict[str, list[Cell]], output: Path) -> Path:
    stems = [stem_of(path) for path in rows]
    titles = stems if len({*stems}) == len(stems) else list(rows)
    montage(dict(zip(titles, rows.values(), strict=True)), (1, 1, 1), output, per_line=2)
    return output


if __name__ == "__main__":
    utils.run_script(main)

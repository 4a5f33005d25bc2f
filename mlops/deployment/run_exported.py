"""Generate volumes from exported networks: with torch, numpy and nibabel, and with nothing of this project.

    python run_exported.py FOLDER --num 4 --seed 0 --output volumes

FOLDER is what `python -m mlops.deployment.export` has written, and holds a copy of this file. The same seed gives the
volumes of `inference.py`, within 1e-3 of [0, 1]. A .pt2 file holds a program: run those of a source that you trust.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

CARD, UNET, DECODER = "exported.json", "unet.pt2", "decoder.pt2"
FORMAT_VERSION = 1
LARGEST_SEED = 2**63 - 1


class CannotRun(Exception):
    """What a user can mend: a folder, a file or an argument."""


class Exported:
    """The two networks of a folder and what is known of them.

    Args:
        folder: written by `mlops.deployment.export`.

    Raises:
        CannotRun: it is not whole, or this torch cannot read it.
    """

    def __init__(self, folder: Path):
        self.card = read_card(folder)
        for name, digest in self.card["files"].items():
            if not (folder / name).is_file():
                raise CannotRun(f"{folder / name}: there is no such file; copy the whole folder")
            if sha256(folder / name) != digest:
                raise CannotRun(
                    f"{folder / name}: is damaged, or of another export than {CARD}; copy or export it again"
                )
        try:
            self.unet, self.decoder = (with_fast_convolutions(torch.export.load(folder / n)) for n in (UNET, DECODER))
        except Exception as error:  # torch has no error of its own for this
            made_by, reason = self.card["torch_version"], str(error).strip().splitlines() or [type(error).__name__]
            raise CannotRun(
                f"{folder}: torch {torch.__version__} cannot read what torch {made_by} wrote ({reason[0]}); "
                f"install torch {made_by}, or export again with this one"
            ) from error

    @torch.inference_mode()
    def sample(self, seed: int, index: int) -> Tensor:
        """Volume `index` of a request, (X, Y, Z) float32 in the card's `intensity_range`."""
        generator = volume_generator(seed, index)
        latent = torch.randn(1, *self.card["latent_shape"], generator=generator)
        for step in self.card["steps"]:
            prediction = self.unet(latent, torch.tensor([step["timestep"]]))
            latent = step["keep"] * latent + step["add"] * prediction
        volume: Tensor = self.decoder(latent)[0, 0]
        if not torch.isfinite(volume).all():
            raise CannotRun(f"seed {seed}, volume {index}: the networks made NaN or infinity")
        return volume


def read_card(folder: Path) -> dict[str, Any]:
    """What stands beside the networks. Raises `CannotRun` where there is nothing that can be read."""
    try:
        card: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        version = card["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CannotRun(f"{folder / CARD}: cannot be read ({error}); name a folder made by the export") from error
    if version != FORMAT_VERSION:
        raise CannotRun(f"{folder / CARD}: format version {version}; this program reads version {FORMAT_VERSION}")
    return card


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def volume_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of volume `index` of a request: those of `ldm3d.sampling.volume_generator`."""
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def with_fast_convolutions(program: Any) -> Any:
    """The program as a module, with oneDNN's convolution where this torch has it.

    Torch leaves a convolution of a single small volume to a kernel of its own, several times slower than oneDNN's.
    """
    module = program.module()
    if torch.backends.mkldnn.is_available():
        for node in module.graph.nodes:
            if node.target is torch.ops.aten.conv3d.default:
                node.target = torch.ops.aten.mkldnn_convolution.default
                node.args = _arguments_of_onednn(*node.args)
        module.recompile()
    return module


def _arguments_of_onednn(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = (1,),
    padding: Any = (0,),
    dilation: Any = (1,),
    groups: int = 1,
) -> tuple[Any, ...]:
    stride, padding, dilation = ([*n] * (3 // len(n)) for n in (stride, padding, dilation))
    return x, weight, bias, padding, stride, dilation, groups


def write(path: Path, volume: Tensor, card: dict[str, Any], seed: int, index: int) -> None:
    """Write a volume as NIfTI, centred at the world's origin, and beside it as JSON how it was made."""
    affine = np.diag([*card["spacing_mm"], 1.0])
    affine[:3, 3] = -(np.asarray(volume.shape) - 1) / 2 * affine.diagonal()[:3]
    image = nib.Nifti1Image(volume.numpy(), affine)
    image.set_qform(affine, code="scanner")
    image.set_sform(affine, code="scanner")
    image.header.set_xyzt_units("mm")
    facts = ("scheduler", "spacing_mm", "intensity_range", "weights_sha256", "files", "code_version")
    sidecar = {"seed": seed, "index": index, "steps": len(card["steps"]), **{name: card[name] for name in facts}}
    sidecar |= {"threads": torch.get_num_threads(), "torch_version": torch.__version__}
    temporary = path.with_name(f".tmp-{path.name}")
    nib.save(image, temporary)
    path.with_name(path.name.removesuffix(".nii.gz") + ".json").write_text(json.dumps(sidecar, indent=2) + "\n")
    temporary.replace(path)


def whole_number(least: int, most: int) -> Callable[[str], int]:
    def parsed(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return int(text)

    return parsed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the exported networks")
    parser.add_argument("-n", "--num", type=whole_number(1, 10**6), default=1, help="number of volumes")
    parser.add_argument("--seed", type=whole_number(0, LARGEST_SEED), default=0, help="the same seed, the same volumes")
    parser.add_argument("--output", type=Path, default=Path("volumes"), help="folder for the volumes")
    args = parser.parse_args()
    try:
        exported = Exported(args.folder)
        args.output.mkdir(parents=True, exist_ok=True)
        for index in range(args.num):
            path = args.output / f"synimg_{args.seed}_{index}.nii.gz"
            write(path, exported.sample(args.seed, index), exported.card, args.seed, index)
            print(path, flush=True)
    except (CannotRun, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

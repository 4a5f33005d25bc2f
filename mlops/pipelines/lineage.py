"""What an asset is and what it was made of: `lineage.json` in its folder, with its parents' digests and versions.

python -m mlops.pipelines.lineage --kind split --name ldm3d-split --version 3 --folder SPLIT --parent-data brats:1 DATA

`--parent` names the folder of another asset, `--parent-start` the weights that a training began with.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from ldm3d import __version__
from ldm3d.cards import AUTOENCODER, DISCRIMINATOR, UNET
from ldm3d.errors import DataError
from ldm3d.files import sha256, write_text
from mlops.commands import Parser, run_command

FILE = "lineage.json"
START = "start"
"""Weights that a training began with: known by their digest alone, wherever they come from."""
CONTENT = {
    "data": ("**/*",),
    "split": ("split.json",),
    "volumes": ("volumes/*.volume",),
    "latents": ("latents-*/posteriors.npy", "latents-*/index.json"),
    "autoencoder": (AUTOENCODER, DISCRIMINATOR),
    "diffusion": (UNET, AUTOENCODER),
    "metrics": ("metrics.json",),
}
"""Which files of a folder are the asset, by its kind: training states and event files are not."""


class Record(BaseModel):
    """An asset at a place in the chain."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    version: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name}:{self.version}@{self.digest[:16]}"


class Lineage(Record):
    """An asset and its parents."""

    kind: str
    code_version: str = __version__
    parents: tuple[Record, ...]

    def tags(self) -> dict[str, str]:
        """For the registered asset: what it is, and each parent with version and digest."""
        parents = {f"parent.{number}": str(parent) for number, parent in enumerate(self.parents)}
        return {"kind": self.kind, "sha256": self.digest, "code_version": self.code_version, **parents}


def digest_of(folder: Path, kind: str) -> str:
    """SHA-256 over names and contents of an asset's files. Raises `DataError` where there are none."""
    found = {path for pattern in CONTENT[kind] for path in folder.glob(pattern) if path.is_file()}
    if not found:
        raise DataError(f"{folder}: holds no {kind}: no {' or '.join(CONTENT[kind])}")
    lines = [f"{sha256(path)} {path.relative_to(folder).as_posix()}\n" for path in sorted(found)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe(kind: str, name: str, version: str, folder: Path, parents: Sequence[Record]) -> Lineage:
    """Note what is in `folder`, and write it there."""
    lineage = Lineage(name=name, version=version, kind=kind, digest=digest_of(folder, kind), parents=tuple(parents))
    write_text(folder / FILE, lineage.model_dump_json(indent=2) + "\n")
    return lineage


def read_lineage(folder: Path) -> Lineage:
    """Raises `DataError`: there is none, or it is damaged."""
    try:
        return Lineage.model_validate_json((folder / FILE).read_bytes())
    except OSError as error:
        raise DataError(f"{folder / FILE}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(f"{folder / FILE}: is damaged: {error.errors()[0]['msg']}") from error


def verify(folders: Sequence[Path]) -> dict[str, Lineage]:
    """Lineages of the assets of one pipeline, by kind.

    Raises:
        DataError: an asset's files are not those that were described, or it was made of another asset than the one that
            is here under the parent's name.
    """
    found = {folder: read_lineage(folder) for folder in folders}
    here = {lineage.name: lineage for lineage in found.values()}
    for folder, lineage in found.items():
        if digest_of(folder, lineage.kind) != lineage.digest:
            raise DataError(f"{folder}: its {lineage.kind} was changed after it was made")
        for parent in lineage.parents:
            other = here.get(parent.name)
            if other and (other.version, other.digest) != (parent.version, parent.digest):
                raise DataError(f"{folder}: was made of {parent}, and here is {other}")
    return {lineage.kind: lineage for lineage in found.values()}


def main() -> int:
    args = parse()
    parents: list[Record] = [read_lineage(folder) for folder in args.parent]
    if args.parent_data:
        asset, folder = args.parent_data
        name, _, version = asset.partition(":")
        parents.append(Record(name=name, version=version, digest=digest_of(Path(folder), "data")))
    if args.parent_start:
        digest = digest_of(args.parent_start, "diffusion")
        parents.append(Record(name=START, version=digest[:16], digest=digest))
    records = [Record(name=p.name, version=p.version, digest=p.digest) for p in parents]
    print(describe(args.kind, args.name, args.version, args.folder, records))
    return 0


def parse() -> argparse.Namespace:
    parser = Parser(prog="python -m mlops.pipelines.lineage", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kind", choices=[kind for kind in CONTENT if kind != "data"], required=True, help="what it is"
    )
    parser.add_argument("--name", required=True, help="name of the asset")
    parser.add_argument("--version", required=True, help="version of the asset")
    parser.add_argument("--folder", type=Path, required=True, help="where the asset is")
    parser.add_argument("--parent", type=Path, action="append", default=[], help="folder of another asset")
    parser.add_argument(
        "--parent-data", nargs=2, metavar=("NAME:VERSION", "FOLDER"), help="raw data that it is made of"
    )
    parser.add_argument("--parent-start", type=Path, metavar="FOLDER", help="weights that the training began with")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)

"""Everything that a machine without a network needs, in one archive: wheels, code, weights, manual, installer.

    python -m mlops.deployment.bundle create -c config/config_demo.json --model-dir checkpoints/demo --output bundle

It is for the Python version and platform that it is made with. Where packages come from is pip's own configuration.
"""

import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from ldm3d import __version__
from ldm3d.cards import AUTOENCODER, UNET, AutoencoderCard, DiffusionCard, read_card
from ldm3d.config import load_config
from ldm3d.console import log
from ldm3d.errors import ConfigError, UserError, WeightsError
from ldm3d.files import atomic_path, require_writable, sha256, write_text
from mlops.api.schemas import ModelName
from mlops.commands import Parser, run_command

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REQUIREMENTS = ROOT / "requirements-service.txt"
NOT_SHIPPED = ("checkpoints", "tests", "tests_ops", ".github")
"""Of the code: what is of no use there, and weights, which come from the folder that is asked for."""
PUBLISHED = (AUTOENCODER, UNET, "README.md", "reference_profile.json")
ENVIRONMENT = {
    "model_dir": "../models",
    "tfevent_path": "../runs",
    "output_dir": "../volumes",
    "data_base_dir": "../data",
}
MODELS = """\
models:
  "{name}":
    versions:
      "1": {{weights: ../models}}
"""


def create(config_file: Path, model_dir: Path, output: Path) -> Path:
    """Make the archive `ldm3d-VERSION-PLATFORM.tar`, and its digest beside it.

    Args:
        config_file: the training configuration that belongs to the weights.
        model_dir: with the published weights.
        output: folder for the archive.

    Raises:
        UserError: the weights or the configuration cannot be used, or the wheels cannot be had.
    """
    require_writable(output)
    check(config_file, model_dir)
    output.mkdir(parents=True, exist_ok=True)
    name = f"ldm3d-{__version__}-cp{sys.version_info[0]}{sys.version_info[1]}-{platform.system()}-{platform.machine()}"
    archive = output / f"{name.lower()}.tar"
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        folder = Path(temporary) / name.lower()
        folder.mkdir()
        add_code(folder / "app")
        add_models(folder, config_file, model_dir)
        add_wheels(folder)
        shutil.copy(HERE / "install.sh", folder)
        shutil.copy(HERE / "INSTALL.md", folder)
        write_text(folder / "platform.txt", " ".join(this_platform()) + "\n")
        write_text(folder / "SHA256SUMS", "".join(f"{sha256(folder / f)}  ./{f}\n" for f in files_of(folder)))
        pack(folder, archive)
    write_text(archive.with_suffix(".tar.sha256"), f"{sha256(archive)}  {archive.name}\n")
    return archive


def this_platform() -> tuple[str, ...]:
    """What wheels are bound to, as `install.sh` asks the Python that it finds."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return sys.implementation.name, version, platform.system(), platform.machine()


def check(config_file: Path, model_dir: Path) -> None:
    """Find out here, not where no one can help, whether weights and configuration belong together."""
    cfg = load_config(config_file)
    first, second = read_card(model_dir / AUTOENCODER, AutoencoderCard), read_card(model_dir / UNET, DiffusionCard)
    if second.autoencoder_sha256 != sha256(model_dir / AUTOENCODER):
        raise WeightsError(f"{model_dir / UNET}: was trained on the latents of another {AUTOENCODER}")
    if (first.definition, second.definition) != (cfg.autoencoder_def, cfg.diffusion_def):
        raise ConfigError(f"{config_file}: describes other networks than the weights in {model_dir}")
    try:
        TypeAdapter(ModelName).validate_python(model_dir.resolve().name)
    except ValidationError as error:
        raise ConfigError(
            f"--model-dir {model_dir}: the service calls the model as its folder is called: rename it to small "
            "letters, digits and . _ - without spaces"
        ) from error


def add_code(folder: Path) -> None:
    """The project as it was committed last: what is not known to git has no place on another machine."""
    if run("git", "status", "--porcelain", "--untracked-files=no"):
        log("notice: there are changes that are not committed; the bundle has the last commit")
    left_out = [f":(exclude){name}" for name in NOT_SHIPPED]
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        run("git", "archive", "--format=tar", f"--output={archive.name}", "HEAD", "--", ".", *left_out)
        with tarfile.open(archive.name) as tar:
            tar.extractall(folder, filter="data")


def add_models(folder: Path, config_file: Path, model_dir: Path) -> None:
    """The weights and what belongs to them, and the three files that say where they are.

    Nothing else of the folder: a training keeps its split there, with the names of cases.
    """
    (folder / "models").mkdir()
    for name in PUBLISHED:
        if (model_dir / name).is_file():
            shutil.copyfile(model_dir / name, folder / "models" / name)
    shutil.copyfile(config_file, folder / "config.json")
    write_text(folder / "environment.json", json.dumps(ENVIRONMENT, indent=2) + "\n")
    write_text(folder / "models.yaml", MODELS.format(name=model_dir.resolve().name))


def add_wheels(folder: Path) -> None:
    """Every package of the service as a wheel, also those that come as source: nothing is compiled there."""
    wheels = folder / "wheels"
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", wheels, "-r", REQUIREMENTS)
    lines = [f"./wheels/{path.name} --hash=sha256:{sha256(path)}\n" for path in sorted(wheels.iterdir())]
    write_text(folder / "wheels.txt", "".join(lines))


def run(*command: object) -> str:
    """A command's output. Raises `UserError` with what it said last if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    except FileNotFoundError as error:
        raise UserError(f"{words[0]}: there is no such program") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
        raise UserError(f"{' '.join(words[:4])} failed: {said[-1]}")
    return done.stdout


def files_of(folder: Path) -> list[Path]:
    """All files, relative to the folder, in an order that is the same everywhere."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def pack(folder: Path, archive: Path) -> None:
    """Owner, order and times do not depend on the machine. Not compressed: wheels and weights are already."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.mode & 0o100 else 0o644
        return entry

    with atomic_path(archive) as temporary, tarfile.open(temporary, "w") as tar:
        for file in files_of(folder):
            tar.add(folder / file, Path(folder.name) / file, filter=plain)


def main() -> int:
    parser = Parser(prog="python -m mlops.deployment.bundle", description="Bundles for machines without a network.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("create", help="wheels, code, weights and manual in one archive")
    making.add_argument("-c", "--config-file", type=Path, required=True, help="training configuration of the weights")
    making.add_argument("--model-dir", type=Path, required=True, help="folder with the published weights")
    making.add_argument("--output", type=Path, required=True, help="folder for the archive")
    args = parser.parse_args()
    archive = create(args.config_file, args.model_dir, args.output)
    log("to install: unpack it where it shall stay, and start install.sh there")
    print(
        json.dumps({"archive": str(archive), "mib": round(archive.stat().st_size / 2**20), "sha256": sha256(archive)})
    )
    return 0


if __name__ == "__main__":
    run_command(main)

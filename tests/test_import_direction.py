"""Who may import whom: ldm3d <- utils <- scripts, ldm3d <- mlops, and inside ldm3d only downward in `ORDER`."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rooms of ldm3d. Each imports from those above it only, so there is no circle.
ROOMS = """
    errors quick_start entry_points files rendezvous distributed lock json_lines console
    definitions sections samplers cards schema config config_page
    nifti phantom_template phantom_fields phantom_anatomy phantom_tumour phantom_scan phantom transfer archive download
    cases checks splits volumes cache data
    brain reference_profile volume_facts
    randomness networks losses diffusion weights encoding allocator kernels training latents checkpoint
    mlflow_tracking profiling tracking progress slabs decoding_costs decoding sampling samples tutorial
    montage features metrics report interior copies training_profile outside
    autoencoder_stage diffusion_stage replay signals run
    live_bytes sampling_memory perceptual_shape memory_phases memory_advice memory
    generate export_facts monai_bundle hub_folder bundle
"""
ORDER = ROOMS.split()

# Packages by what they are imported as, where that is another name.
DISTRIBUTIONS = {"PIL": "pillow", "opentelemetry": "opentelemetry-sdk", "jwt": "pyjwt", "yaml": "pyyaml"}
# Needed although nothing here imports them: attention in monai's U-Net, a template to be read, torch.utils.tensorboard.
NOT_IMPORTED = {"einops", "nilearn", "tensorboard"}
# Behind others that the service uses: uvicorn's parser and event loop, PyJWT's algorithms, the traces' exporter.
NOT_IMPORTED_BY_THE_SERVICE = {"httptools", "uvloop", "cryptography", "opentelemetry-exporter-otlp-proto-http"}
# Imported where a user has it.
OPTIONAL = {"azure", "azureml-inference-server-http", "mlflow"}


def imports(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere in it, as dotted names; relative ones begin with a dot."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            whole_package = module in ("ldm3d", ".")
            yield from (f"ldm3d.{alias.name}" for alias in node.names) if whole_package else [module]


def rooms_imported(path: Path) -> set[str]:
    """Rooms of ldm3d that a file imports; `from ldm3d import __version__` names none."""
    names = [name.removeprefix("ldm3d").lstrip(".") for name in imports(path) if name.startswith(("ldm3d", "."))]
    return {name.split(".")[0] for name in names} - {"", "__version__"}


def upward_imports(package: Path, order: list[str]) -> list[str]:
    """Imports that do not go downward in `order`."""
    return [
        f"{room} imports {other}"
        for number, room in enumerate(order)
        for other in sorted(rooms_imported(package / f"{room}.py") - set(order[:number]))
    ]


def scripts() -> list[Path]:
    return [path for path in sorted(ROOT.glob("*.py")) if path.stem != "utils"]


def top_levels(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def test_every_room_is_in_the_order_once() -> None:
    found = {path.stem for path in (ROOT / "ldm3d").glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(found)


def test_ldm3d_imports_downward() -> None:
    assert upward_imports(ROOT / "ldm3d", ORDER) == []


def test_the_package_itself_imports_nothing_of_its_own() -> None:
    assert rooms_imported(ROOT / "ldm3d" / "__init__.py") == set()


def test_errors_imports_nothing() -> None:
    assert list(imports(ROOT / "ldm3d" / "errors.py")) == []


def test_ldm3d_imports_nothing_above_it() -> None:
    above = {path.stem for path in scripts()} | {"utils", "mlops", "tests", "benchmarks", "figs"}
    for path in (ROOT / "ldm3d").glob("*.py"):
        assert not top_levels(path) & above, path.name


def test_utils_and_mlops_import_no_script_and_mlops_not_utils() -> None:
    names = {path.stem for path in scripts()}
    assert not top_levels(ROOT / "utils.py") & (names | {"mlops", "tests", "benchmarks", "figs"})
    for path in (ROOT / "mlops").rglob("*.py"):
        assert not top_levels(path) & (names | {"utils", "tests"}), path


@pytest.mark.parametrize("script", scripts(), ids=lambda path: path.stem)
def test_no_script_imports_another(script: Path) -> None:
    assert not top_levels(script) & ({path.stem for path in scripts()} | {"mlops", "tests", "benchmarks", "figs"})


@pytest.mark.parametrize(
    "statement",
    [
        "import ldm3d.upper",
        "from ldm3d import upper",
        "from ldm3d.upper import x",
        "from ldm3d.upper.part import x",
        "from . import upper",
        "from .upper import x",
        "def f():\n    from ldm3d import upper",
        "if TYPE_CHECKING:\n    import ldm3d.upper as u",
        "import ldm3d.lower",
    ],
)
def test_each_way_of_importing_upward_is_seen(tmp_path: Path, statement: str) -> None:
    (tmp_path / "lower.py").write_text(f"from ldm3d import __version__\nimport json\n{statement}\n")
    (tmp_path / "upper.py").write_text("from ldm3d.lower import x\n")
    assert len(upward_imports(tmp_path, ["lower", "upper"])) == 1
    assert upward_imports(tmp_path, ["upper", "lower"])[0] == "upper imports lower"


def pinned(name: str) -> set[str]:
    """Packages that a requirements file lists, each of which must be given in an exact version."""
    lines = (ROOT / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith(("#", "-r "))]
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", pin)] == []
    return {pin.split("==")[0] for pin in pins}


def packages_imported(files: list[Path]) -> set[str]:
    """Packages from elsewhere that files import, as they are called where they come from."""
    own = {path.stem for folder in (ROOT, ROOT / "tests", ROOT / "benchmarks") for path in folder.glob("*.py")}
    names = {name for path in files for name in top_levels(path)} - own - {"ldm3d", "mlops", "benchmarks", "figs", ""}
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in names - set(sys.stdlib_module_names)}


def test_requirements_are_what_is_imported() -> None:
    imported = packages_imported([*ROOT.glob("*.py"), *ROOT.glob("ldm3d/*.py")])
    assert pinned("requirements.txt") == (imported - OPTIONAL) | NOT_IMPORTED


def test_service_requirements_are_what_mlops_imports() -> None:
    assert "-r requirements.txt" in (ROOT / "requirements-service.txt").read_text().splitlines()
    imported = packages_imported([*ROOT.glob("mlops/**/*.py")]) - pinned("requirements.txt")
    assert pinned("requirements-service.txt") == (imported - OPTIONAL) | NOT_IMPORTED_BY_THE_SERVICE


def test_development_requirements_hold_what_tests_import() -> None:
    assert "-r requirements-service.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()
    listed = {name for file in ("", "-service", "-dev") for name in pinned(f"requirements{file}.txt")}
    assert packages_imported([*ROOT.glob("tests/*.py")]) - OPTIONAL <= listed

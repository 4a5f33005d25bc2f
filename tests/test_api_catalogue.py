"""What is served, who is answered by which version, what may be asked: mlops.api.models_file, catalogue, validation."""

import itertools
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import served

from ldm3d.cards import UNET
from ldm3d.errors import ConfigError, OutputError, WeightsError
from ldm3d.files import sha256
from ldm3d.samplers import choose_sampler
from ldm3d.sections import DdpmSchedule, RFlowSchedule
from mlops.api import schemas
from mlops.api.catalogue import ActiveModel, ActiveSet, Catalogue, activate, active_path, prepare, read_active
from mlops.api.models_file import read_models
from mlops.api.settings import Settings
from mlops.api.validation import FieldError, find_model, validate_request
from mlops.api.weights_store import GRACE_SECONDS, prune, store_dir

ROOT = Path(__file__).resolve().parents[1]
BOMB = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghi"))

READ = """
import sys
from pathlib import Path
import mlops.api.validation
from mlops.api.catalogue import Catalogue

heavy = [name for name in ("torch", "monai", "mlflow") if name in sys.modules]
print(Catalogue(Path(sys.argv[1])).read().digest, heavy)
"""


def write(path: Path, versions: str, more: str = "") -> Path:
    path.write_text(f"models:\n  brains:\n{more}    versions:\n{versions}")
    return path


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data", models_file=tmp_path / "models.yaml")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders with weights, `a` and `b`. Nobody may change them."""
    folder = tmp_path_factory.mktemp("published")
    served.publish(folder / "a")
    served.publish(folder / "b", 1, {"sex": ["F", "M"]}, NoiseScheduler={"type": "rflow"})
    return folder


def served_here(settings: Settings, versions: str, more: str = "") -> ActiveSet:
    return prepare(write(settings.models_file, versions, more), settings)


# models.yaml


def test_the_models_that_come_with_the_project(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    active = prepare(Settings.model_fields["models_file"].default, settings)
    (demo,) = active.models
    (version,) = demo.versions
    assert (version.name, version.share, version.shadow, version.shape) == ("demo/1", 100, False, (48, 64, 48))
    assert version.weights_sha256[UNET] == sha256("checkpoints/demo/diffusion_unet.safetensors")


def test_everything_that_can_be_said(tmp_path: Path) -> None:
    file = write(
        tmp_path / "models.yaml",
        """
      "1": {weights: checkpoints/demo, share: 90}
      "2": {weights: "mlflow:ldm3d@champion", share: 10}
      "0": {weights: "mlflow:ldm3d-diffusion/7", share: 0}
      2026-11.a: {weights: ../new, shadow: true}
  other:
    versions:
      only: {weights: x}
""",
        "    assign: job\n",
    )
    models = read_models(file).models
    assert list(models) == ["brains", "other"] and list(models["brains"].versions) == ["1", "2", "0", "2026-11.a"]
    assert models["brains"].assign == "job" and models["other"].assign == "caller"
    assert [models["brains"].share(name) for name in models["brains"].versions] == [90, 10, 0, 0]
    assert models["other"].share("only") == 100


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file: Input should be"),
        ("models: {}", "models: Dictionary should have at least 1 item"),
        ("models: {brains: {versions: {}}}", "models.brains.versions: Dictionary should have at least 1 item"),
        ("modles: {}", "models: Field required"),
        ('models: {a: {versions: {"1": {weights: x}}}}\nextra: 1', "extra: Extra inputs are not permitted (given: 1)"),
        ("models: {a: {versions: {1: {weights: x}}}}", '(given: 1); names need quotes: "1"'),
        ('models: {a: {versions: {"../x": {weights: x}}}}', "models.a.versions.../x: String should match pattern"),
        ('models: {"../a": {versions: {"1": {weights: x}}}}', "models.../a: String should match pattern"),
        ('models: {"a\\nb": {versions: {"1": {weights: x}}}}', "String should match pattern"),
        ('models: {a: {versions: {"1": {weights: ""}}}}', "weights: String should have at least 1 character"),
        (
            'models: {a: {versions: {"1": {weights: x, share: "9"}}}}',
            "versions.1.share: Input should be a valid integer",
        ),
        ('models: {a: {versions: {"1": {weights: x, share: 101}}}}', "less than or equal to 100 (given: 101)"),
        ('models: {a: {versions: {"1": {weights: x, share: -1}}}}', "greater than or equal to 0 (given: -1)"),
        (
            'models: {a: {versions: {"1": {weights: x, share: 90}}}}',
            "models.a: the shares of versions that are no shadow",
        ),
        ('models: {a: {versions: {"1": {weights: x}, "2": {weights: y}}}}', "must add up to 100, not none + none"),
        ('models: {a: {versions: {"1": {weights: x, shadow: true}}}}', "models.a: every version is a shadow"),
        ('models: {a: {versions: {"1": {weights: x, shadow: yes, share: 9}}}}', "versions.1: a shadow answers no"),
        (
            'models: {a: {assign: dice, versions: {"1": {weights: x}}}}',
            "models.a.assign: Input should be 'caller' or 'job'",
        ),
        (
            'models: {a: {versions: {"1": {weights: "mlflow:x"}}}}',
            "weights: must be mlflow:NAME@ALIAS or mlflow:NAME/VER",
        ),
        ('models: {a: {versions: {"1": {weights: "mlflow:../x@y"}}}}', "weights: must be mlflow:NAME@ALIAS or"),
        ('models: {a: {versions: {"1": {weights: x}, "1": {weights: y}}}}', "'1' twice in line 1"),
        (BOMB, "an alias (*) in line 2: write it out"),
        ("[" * 60_000, "nested too deeply"),
        ("models: !!python/object/apply:os.system [false]", "could not determine a constructor"),
        ("models: 2026-13-45", "is not usable YAML: month must be in 1..12"),
        (f"models: {'9' * 5000}", "is not usable YAML: Exceeds the limit"),
        ("models: [", "is not usable YAML"),
        ("models: \0", "is not usable YAML"),
        ("x" * 65_537, "larger than 64 KiB"),
        (f"models: {'x' * 60_000}", "..."),
    ],
)
def test_a_file_that_says_what_cannot_be(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_models(tmp_path / "models.yaml")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'models.yaml'}: ") and said in message
    assert "\n" not in message and len(message) < 500


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"models.yaml: cannot be read \(No such file .*LDM3D_MODELS_FILE"):
        read_models(tmp_path / "models.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_models(tmp_path)
    (tmp_path / "models.yaml").write_bytes(b"models: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_models(tmp_path / "models.yaml")


# The active set


def test_a_set_is_prepared_activated_and_read_by_another_process(settings: Settings, published: Path) -> None:
    active = served_here(
        settings,
        f"""
      "1": {{weights: {published}/a, share: 90}}
      "2": {{weights: {published}/a, share: 10}}
      "3": {{weights: {published}/b, shadow: true}}
""",
    )
    assert read_active(settings.data_dir) is None
    activate(active, settings.data_dir)
    assert read_active(settings.data_dir) == active
    command = [sys.executable, "-c", READ, str(settings.data_dir)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=240)
    assert done.stdout == f"{active.digest} []\n", done.stderr

    (model,) = active.models
    one, two, three = model.info(settings, {model.versions[2].digest}).versions
    assert (one.version, one.share, one.shadow, one.loaded) == ("1", 90, False, False)
    assert one.weights_sha256 == two.weights_sha256 and len(active.digests) == 2
    assert (one.shape, one.spacing_mm, one.trained_on, one.num_train) == ((16, 16, 16), (3.0, 3.0, 3.0), "a" * 64, 6)
    assert (one.schedulers, one.default_steps, one.max_steps, one.conditions) == (
        ["ddim", "ddpm", "pndm"],
        50,
        1000,
        {},
    )
    assert (three.share, three.shadow, three.loaded) == (0, True, True)
    assert (three.schedulers, three.default_steps, three.conditions) == (["rflow"], 30, {"sex": ["F", "M"]})
    assert model.shadows() == [model.versions[2]]
    for version in active.versions:
        assert sha256(version.folder(settings.data_dir) / UNET) == version.weights_sha256[UNET]


def test_folders_are_relative_to_the_current_one(
    settings: Settings, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (published / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(published / "here")
    assert served_here(settings, '      "1": {weights: ../a}\n').versions


def test_a_broken_new_version_replaces_nothing(settings: Settings, published: Path, tmp_path: Path) -> None:
    good = served_here(settings, f'      "1": {{weights: {published}/a}}\n')
    activate(good, settings.data_dir)
    broken = Path(shutil.copytree(published / "b", tmp_path / "broken"))
    os.truncate(broken / UNET, 1000)
    versions = f'      "1": {{weights: {published}/a, share: 50}}\n      "2": {{weights: {broken}, share: 50}}\n'
    with pytest.raises(WeightsError) as caught:
        served_here(settings, versions)
    said = f"{settings.models_file}: models.brains.versions.2.weights '{broken}': {broken / UNET}: not a whole"
    assert str(caught.value).startswith(said)
    assert read_active(settings.data_dir) == good


def test_the_kind_of_error_is_kept(settings: Settings, published: Path) -> None:
    settings.data_dir.write_text("no folder")
    with pytest.raises(OutputError, match=r"models.brains.versions.1.weights .*: weights cannot be stored"):
        served_here(settings, f'      "1": {{weights: {published}/a}}\n')


def test_a_set_that_was_replaced_is_read_again_and_only_then(
    settings: Settings, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = Catalogue(settings.data_dir)
    assert catalogue.read() is None
    first, second = (served_here(settings, f'      "1": {{weights: {published}/{name}}}\n') for name in ("a", "b"))
    activate(first, settings.data_dir)
    read = catalogue.read()
    assert read == first and catalogue.read() is read
    activate(second, settings.data_dir)
    assert catalogue.read() == second
    with monkeypatch.context() as patch:
        patch.setattr("mlops.api.catalogue.read_active", lambda data_dir: pytest.fail("read though it is the same"))
        assert catalogue.read() == second
    activate(first, settings.data_dir)  # of the same length
    assert catalogue.read() == first


def test_a_file_that_is_not_the_services_is_said_and_replaced(settings: Settings, published: Path) -> None:
    active = served_here(settings, f'      "1": {{weights: {published}/a}}\n')
    for content in (b"", b"[]", b"\xff", b'{"models": 1}'):
        active_path(settings.data_dir).write_bytes(content)
        with pytest.raises(ConfigError, match=r"active.json: is not what the service wrote"):
            Catalogue(settings.data_dir).read()
    activate(active, settings.data_dir)
    assert read_active(settings.data_dir) == active


def test_sets_differ_by_what_requests_get(settings: Settings) -> None:
    def digest(*shares: int) -> str:
        return ActiveSet(models=[served.model(*shares)]).digest

    assert digest(90, 10) == digest(90, 10) != digest(80, 20)


def test_versions_of_the_set_before_stay_for_requests_on_their_way(settings: Settings, published: Path) -> None:
    before, after = (served_here(settings, f'      "1": {{weights: {published}/{name}}}\n') for name in ("a", "b"))
    activate(before, settings.data_dir)
    long_ago = time.time() - GRACE_SECONDS - 10
    for digest in before.digests | after.digests:
        os.utime(store_dir(settings.data_dir) / digest, (long_ago, long_ago))
    activate(after, settings.data_dir)
    assert prune(settings.data_dir, after.digests) == []
    for digest in before.digests | after.digests:
        os.utime(store_dir(settings.data_dir) / digest, (long_ago, long_ago))
    assert prune(settings.data_dir, after.digests) == list(before.digests)


# Assignment

CALLERS = [f"caller-{number}" for number in range(20_000)]


def assigned(model: ActiveModel) -> dict[str, str]:
    return {caller: model.assign(caller, "job").version.version for caller in CALLERS}


@pytest.mark.parametrize("shares", [(90, 10), (50, 25, 25), (1, 99), (33, 33, 34), (60, 0, 40)])
def test_shares_hold(shares: tuple[int, ...]) -> None:
    counts = Counter(assigned(served.model(*shares)).values())
    for number, share in enumerate(shares, 1):
        deviation = (share * (100 - share) * len(CALLERS)) ** 0.5 / 100
        assert abs(counts[str(number)] - share / 100 * len(CALLERS)) <= 3.5 * deviation


def test_an_assignment_never_changes() -> None:
    """Not with the code either: these are what the first version of the service said."""
    model = served.model(25, 25, 25, 25)
    assert [model.assign(f"caller-{n}", "job").version.version for n in range(12)] == list("422342324334")


def test_a_caller_keeps_its_version_and_a_job_gets_one() -> None:
    by_caller, by_job = served.model(50, 50), served.model(50, 50, assign_by="job")
    assert len({by_caller.assign("somebody", f"job-{n}").version.version for n in range(100)}) == 1
    assert by_caller.assign("somebody", "a").assigned_by == "caller"
    assert {by_job.assign("somebody", f"job-{n}").version.version for n in range(100)} == {"1", "2"}
    assert len({by_job.assign(f"caller-{n}", "job").version.version for n in range(100)}) == 1
    assert by_job.assign("somebody", "a").assigned_by == "job"


@pytest.mark.parametrize("shares", [(100,), (100, 0), (0, 100)])
def test_where_there_is_no_choice_it_is_said(shares: tuple[int, ...]) -> None:
    chosen, by = served.model(*shares).assign("anybody", "job")
    assert chosen.share == 100 and by == "only"


def test_a_shadow_answers_nobody() -> None:
    versions = [served.version("1", 50), served.version("2", 0, shadow=True), served.version("3", 50)]
    model = ActiveModel(name="brains", assign_by="caller", versions=versions)
    assert set(assigned(model).values()) == {"1", "3"} and model.shadows() == [versions[1]]
    alone = ActiveModel(name="brains", assign_by="caller", versions=[served.version(), versions[1]])
    assert alone.assign("anybody", "job") == (served.version(), "only") and alone.shadows() == [versions[1]]


@pytest.mark.parametrize(
    ("before", "after", "moves"),
    [
        ((90, 10), (80, 20), {("1", "2")}),
        ((80, 20), (90, 10), {("2", "1")}),
        ((90, 10), (0, 100), {("1", "2")}),
        ((50, 25, 25), (40, 35, 25), {("1", "2")}),
        ((90, 10), (90, 5, 5), {("2", "3")}),
    ],
)
def test_changed_shares_move_only_who_must_move(
    before: tuple[int, ...], after: tuple[int, ...], moves: set[tuple[str, str]]
) -> None:
    was, now = assigned(served.model(*before)), assigned(served.model(*after))
    moved = Counter((was[caller], now[caller]) for caller in CALLERS if was[caller] != now[caller])
    assert set(moved) == moves
    share = sum(abs(b - (before[n] if n < len(before) else 0)) for n, b in enumerate(after)) / 2 / 100
    assert sum(moved.values()) == pytest.approx(share * len(CALLERS), rel=0.1)


def test_two_models_are_assigned_independently() -> None:
    one, other = assigned(served.model(50, 50)), assigned(served.model(50, 50, name="others"))
    alike = sum(one[caller] == other[caller] for caller in CALLERS)
    assert alike == pytest.approx(len(CALLERS) / 2, rel=0.05)


# Requests

SEX = {"sex": ["F", "M"], "age": ["young", "old"]}
FLOW = {"schedule": RFlowSchedule(type="rflow")}


def refused(request: dict[str, Any], version: dict[str, Any], **limits: int) -> FieldError:
    with pytest.raises(FieldError) as caught:
        validate_request(schemas.SampleRequest(**request), served.version(**version), Settings(**limits))  # type: ignore[arg-type]
    return caught.value


def test_what_is_left_open_is_decided() -> None:
    resolved = validate_request(schemas.SampleRequest(seed=7), served.version(**FLOW), Settings())
    assert resolved.model_dump() == {
        "num": 1, "seed": 7, "steps": 30, "scheduler": "rflow", "model": "brains",
        "format": "nii.gz", "dtype": "float32", "conditions": {},
    }  # fmt: skip


def test_what_is_given_is_kept() -> None:
    given = {"num": 3, "seed": 2**63 - 1, "steps": 20, "scheduler": "pndm", "format": "nii", "dtype": "int16"}
    conditions = {"age": "old", "sex": "F"}
    version = served.version(conditions=SEX)
    resolved = validate_request(schemas.SampleRequest(**given, conditions=conditions), version, Settings())
    assert resolved.model_dump() == given | {"model": "brains", "conditions": conditions}
    assert list(resolved.conditions) == ["sex", "age"]  # two requests for the same say the same


@pytest.mark.parametrize(
    ("request_", "version", "limits", "field", "said"),
    [
        ({"num": 65}, {}, {}, "num", "num 65: must be between 1 and 64"),
        ({"steps": 1001}, {}, {}, "steps", "steps 1001: must be between 1 and 1000"),
        ({"steps": 1001}, {}, {"max_steps": 5000}, "steps", "steps 1001: must be between 1 and 1000"),
        ({"steps": 101}, {}, {"max_steps": 100}, "steps", "steps 101: must be between 1 and 100"),
        ({"steps": 600, "scheduler": "pndm"}, {}, {}, "steps", "use 500 steps, or ddim"),
        ({"steps": 20, "scheduler": "ddpm"}, {}, {}, "steps", "ddpm takes all 1000 steps"),
        (
            {"scheduler": "ddpm"},
            {},
            {"max_steps": 999},
            "scheduler",
            "the 1 to 999 steps allowed here; use ddim or pndm",
        ),
        ({"scheduler": "ddim"}, FLOW, {}, "scheduler", "trained with rflow are sampled with rflow"),
        ({"scheduler": "ddim", "steps": 9999}, FLOW, {}, "scheduler", "sampled with rflow"),
        ({"conditions": {"sex": "F"}}, {}, {}, "conditions", "brains/1 generates without conditions; leave them out"),
        ({}, {"conditions": SEX}, {}, "conditions.sex", "brains/1 needs it; one of F, M"),
        ({"conditions": {"sex": "F"}}, {"conditions": SEX}, {}, "conditions.age", "needs it; one of young, old"),
        ({"conditions": {"sex": "f"}}, {"conditions": SEX}, {}, "conditions.sex", "'f': must be one of F, M"),
        (
            {"conditions": {"six": "F"}},
            {"conditions": SEX},
            {},
            "conditions",
            "no condition 'six'; brains/1 knows sex, age",
        ),
        ({"conditions": {"\x1b[2J\n": "F"}}, {"conditions": SEX}, {}, "conditions", r"no condition '\x1b[2J\n'; "),
        ({"conditions": {"x" * 999: "F"}}, {"conditions": SEX}, {}, "conditions", "xxx...; brains/1"),
    ],
)
def test_what_cannot_be_is_refused_by_its_field(
    request_: dict[str, Any], version: dict[str, Any], limits: dict[str, int], field: str, said: str
) -> None:
    error = refused(request_, version, **limits)
    assert error.field == field and said in error.message and len(error.message) < 200


@pytest.mark.parametrize("schedule", [DdpmSchedule(), RFlowSchedule(type="rflow"), DdpmSchedule(num_train_timesteps=7)])
@pytest.mark.parametrize("max_steps", [1, 5, 12, 40, 999, 1000])
def test_what_is_offered_can_be_asked_for(schedule: DdpmSchedule | RFlowSchedule, max_steps: int) -> None:
    settings = Settings(max_steps=max_steps)
    version = served.version(schedule=schedule)
    info = version.info(settings, loaded=False)
    assert info.schedulers and 1 <= info.default_steps <= info.max_steps <= max_steps
    for scheduler in info.schedulers:
        resolved = validate_request(schemas.SampleRequest(scheduler=scheduler), version, settings)
        assert choose_sampler(schedule, resolved.scheduler, resolved.steps) == (scheduler, resolved.steps)
        assert resolved.steps <= max_steps
    assert validate_request(schemas.SampleRequest(), version, settings).steps == info.default_steps


def test_a_model_is_found_by_name_or_is_the_first() -> None:
    active = ActiveSet(models=[served.model(100), served.model(100, name="others")])
    assert find_model(active, None).name == "brains" and find_model(active, "others").name == "others"
    with pytest.raises(FieldError, match="model: no model 'other' here; there is brains, others") as caught:
        find_model(active, "other")
    assert caught.value.field == "model"

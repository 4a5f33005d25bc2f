"""The workflows, read by actionlint, zizmor and GitHub's schema, and held to what these do not know of this project."""

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import ROOT, run, tool

GITHUB = ROOT / ".github"
GUIDE = ROOT / "docs" / "CICD.md"
PINNED = re.compile(r"^[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")
LONGEST_MINUTES = 180
ENTRANCES = ("lint", ".ci/run", "docs", "check-ops", "audit")
"""What CI must run: make targets, and the script that any machine has."""
STAGES = ["quality", "test", "build", "scan", "sign", "provenance", "dev", "staging", "production"]
ENVIRONMENTS = {"dev", "staging", "production", "models"}
ROLL_OUT = "./.github/workflows/roll-out.yml"
TOKEN_IS_FOR = ("azure/login", "actions/attest-build-provenance", "sigstore/cosign-installer", ROLL_OUT)
"""What proves with a token of GitHub's which job it runs in."""
SHOWN_BY_RUN = re.compile(r"\bmake ([\w-]+)|\bbash ([\w./-]+)|\bpython3? -m ((?:mlops|ldm3d)[\w.]*)")


def workflows(github: Path) -> dict[str, dict[str, Any]]:
    """Content by name of the file; `on`, which YAML takes for true, is left under that name."""
    return {path.name: yaml.safe_load(path.read_text()) for path in sorted((github / "workflows").glob("*.yml"))}


def jobs(github: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for file, content in workflows(github).items():
        for name, job in content["jobs"].items():
            yield f"{file}: {name}", job


def steps(github: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, job in jobs(github):
        for step in job.get("steps", ()):
            yield place, step


def problems(github: Path) -> list[str]:
    """All that is wrong, in words."""
    found: list[str] = []
    for check in (pins, permissions, bounds, commands, values, graph, images, roll_out_order, versions):
        found += check(github)
    return found


def pins(github: Path) -> list[str]:
    found, seen = [], {}
    for path in sorted((github / "workflows").glob("*.yml")):
        for uses in re.findall(r"uses: (.*)", path.read_text()):
            if uses.startswith("./"):
                if not (github.parent / uses.removeprefix("./")).is_file():
                    found.append(f"{path.name}: {uses}: no such workflow")
            elif not PINNED.match(uses):
                found.append(f"{path.name}: {uses}: not pinned by commit, with its version as a comment")
            elif seen.setdefault(uses.split("@")[0], uses) != uses:
                found.append(f"{path.name}: {uses}: elsewhere it is {seen[uses.split('@')[0]]}")
    return found


def permissions(github: Path) -> list[str]:
    found = [
        f"{file}: permissions at the top must be {{}}"
        for file, content in workflows(github).items()
        if content.get("permissions") != {}
    ]
    for place, job in jobs(github):
        granted = job.get("permissions")
        if not isinstance(granted, dict):
            found.append(f"{place}: states no permissions")
            continue
        writes = {name for name, level in granted.items() if level == "write"}
        if place.startswith("ci.yml") and writes:
            found.append(f"{place}: may write {', '.join(sorted(writes))}, where foreign pull requests run")
        actions = [step["uses"] for step in job.get("steps", ()) if "uses" in step]
        needs_token = any(action.startswith(TOKEN_IS_FOR) for action in actions) or "roll-out.yml" in job.get(
            "uses", ""
        )
        if ("id-token" in writes) != needs_token:
            found.append(f"{place}: id-token: write must be there exactly where a step needs it")
    for place, step in steps(github):
        checks_out = step.get("uses", "").startswith("actions/checkout@")
        if checks_out and step.get("with", {}).get("persist-credentials") is not False:
            found.append(f"{place}: the checkout leaves its credentials behind")
    return found


def bounds(github: Path) -> list[str]:
    found = []
    for place, job in jobs(github):
        if "steps" in job and not 0 < job.get("timeout-minutes", 0) <= LONGEST_MINUTES:
            found.append(f"{place}: timeout-minutes must be 1 to {LONGEST_MINUTES}")
    for file, content in workflows(github).items():
        grouped = "concurrency" in content or all("concurrency" in job for job in content["jobs"].values())
        if not grouped:
            found.append(f"{file}: no concurrency group")
    return found


def commands(github: Path) -> list[str]:
    """What is run is there, and is not made of what others may say."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found, run_at_all = [], set()
    for place, step in steps(github):
        script = step.get("run", "")
        if "${{" in script:
            found.append(f"{place}: a value is pasted into a script; hand it over in env")
        if script.count("\n") > 3:
            found.append(f"{place}: a script of more than three lines belongs into a file that can be tested")
        if "< <(" in script:
            found.append(f"{place}: what fails in < <( ) is not seen")
        for target, file, module in SHOWN_BY_RUN.findall(script):
            run_at_all |= {target or file or module}
            path = ROOT / module.replace(".", "/") if module else ROOT / file
            exists = target in targets if target else path.exists() or path.with_suffix(".py").exists()
            if not exists:
                found.append(f"{place}: {target or file or module}: there is no such thing")
    return found + [f"nothing runs {name}" for name in ENTRANCES if name not in run_at_all]


def values(github: Path) -> list[str]:
    """No stored secrets; what must be set in GitHub is told."""
    found = []
    guide = GUIDE.read_text()
    for path in sorted((github / "workflows").glob("*.yml")):
        text = path.read_text()
        if "secrets." in text or "secrets:" in text:
            found.append(f"{path.name}: uses a stored secret")
        found += [
            f"{path.name}: {name} is not in docs/CICD.md"
            for name in sorted(set(re.findall(r"vars\.(\w+)", text)))
            if f"`{name}`" not in guide
        ]
    return found


def graph(github: Path) -> list[str]:
    """Each stage of a release comes after all those before it, in an environment that the guide knows."""
    release = workflows(github)["deploy.yml"]["jobs"]
    found = []

    def before(name: str) -> set[str]:
        needs = release[name].get("needs", [])
        direct = {needs} if isinstance(needs, str) else set(needs)
        return direct.union(*(before(other) for other in direct if other in release))

    unknown = sorted({*STAGES, "model"}.symmetric_difference(release))
    if unknown:
        return [f"deploy.yml: jobs are not those that are known: {', '.join(unknown)}"]
    for number, stage in enumerate(STAGES):
        aside = {"sign", "provenance"}  # these two may go side by side
        missing = set(STAGES[:number]) - before(stage) - (aside if stage in aside else set())
        found += [f"deploy.yml: {stage} does not wait for {name}" for name in sorted(missing)]
    for stage, condition in (
        ("staging", ("needs.dev.result == 'success'", "needs.model.result == 'skipped'")),
        ("production", ("needs.staging.result == 'success'",)),
    ):
        said = release[stage].get("if", "")
        if "always()" in said or any(part not in said for part in condition):
            found.append(f"deploy.yml: {stage} may start although the stage before failed")
    if "model" not in before("staging"):
        found.append("deploy.yml: staging does not wait for model")
    environments = {job.get("with", {}).get("environment") for job in release.values()}
    environments |= {job.get("environment") for job in release.values()}
    if environments - {None} != ENVIRONMENTS:
        found.append(f"deploy.yml: environments must be {', '.join(sorted(ENVIRONMENTS))}")
    found += [
        f"deploy.yml: {stage} runs in another environment"
        for stage in ("dev", "staging", "production")
        if release[stage].get("with", {}).get("environment") != stage
    ]
    return found


def images(github: Path) -> list[str]:
    """What is pushed says its version, and a run by hand cannot push under the name of a release."""
    (pushed,) = (step["with"] for step in workflows(github)["deploy.yml"]["jobs"]["build"]["steps"] if "id" in step)
    found = []
    if "\nVERSION=${{ needs.quality.outputs.version }}" not in pushed["build-args"]:
        found.append("deploy.yml: the image does not say its version")
    if "github.ref_type != 'tag' && format('-{0}', github.sha)" not in pushed["tags"]:
        found.append("deploy.yml: a run that was started by hand takes a release's name")
    return found


def roll_out_order(github: Path) -> list[str]:
    (job,) = workflows(github)["roll-out.yml"]["jobs"].values()
    scripts = [step.get("run", "") for step in job["steps"]]
    order = (
        "images.sh verify ",
        "roll_out remember ",
        "roll_out apply ",
        "roll_out check --version ",
        "roll_out back ",
    )
    places = [next((n for n, script in enumerate(scripts) if part in script), -1) for part in order]
    if -1 in places or places != sorted(places):
        return [f"roll-out.yml: the steps must be, in this order: {', '.join(order)}"]
    condition = job["steps"][places[-1]].get("if", "")
    if "failure()" not in condition or "cancelled()" not in condition:
        return ["roll-out.yml: nothing goes back after a failure"]
    login = job["steps"][places[-1] - 1]
    if "azure/login@" not in login.get("uses", "") or login.get("if") != condition:
        return ["roll-out.yml: nothing logs in anew before going back, when the first login may be over"]
    if any("if" in step for step in job["steps"][: places[-1] - 1]):
        return ["roll-out.yml: a step before going back can be left out"]
    return []


def versions(github: Path) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    first, end = (int(minor) for minor in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", project).groups())  # type: ignore[union-attr]
    wanted = [f"3.{minor}" for minor in range(first, end)]
    tested = workflows(github)["ci.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    if tested != wanted:
        return [f"ci.yml: tests run on {tested}, the project promises {wanted}"]
    installed = set(re.findall(r"--no-install-recommends ([\w -]+)", (ROOT / ".ci" / "run").read_text())[0].split())
    here = re.search(r"--no-install-recommends (redis[\w -]*)", (github / "workflows" / "ci.yml").read_text())
    if not here or set(here[1].split()) != installed - {"chromium"}:
        return [f"ci.yml: installs other programs than .ci/run: {', '.join(sorted(installed))}"]
    return []


# The tools.


def linted(github: Path) -> str:
    """What actionlint, which runs shellcheck too, says."""
    files = sorted((github / "workflows").glob("*.yml"))
    done = run(tool("actionlint"), "-no-color", "-shellcheck", tool("shellcheck"), *files, cwd=github.parent)
    return done.stdout + done.stderr if done.returncode else ""


def audited(github: Path) -> str:
    """What zizmor says, at its strictest."""
    words = ("--offline", "--no-progress", "--persona", "auditor", "--config", github / "zizmor.yml", github)
    done = run(tool("zizmor"), *words)
    return done.stdout + done.stderr if done.returncode else ""


def valid(github: Path) -> str:
    """What GitHub's own schemas say."""
    found = ""
    for schema, files in (
        ("vendor.github-workflows", sorted((github / "workflows").glob("*.yml"))),
        ("vendor.dependabot", [github / "dependabot.yml"]),
        ("vendor.github-issue-forms", sorted((github / "ISSUE_TEMPLATE").glob("[!c]*.yml"))),
        ("vendor.github-issue-config", [github / "ISSUE_TEMPLATE" / "config.yml"]),
    ):
        done = run(tool("check-jsonschema"), "--builtin-schema", schema, *files)
        found += done.stdout if done.returncode else ""
    return found


GATES = {"own": lambda github: "\n".join(problems(github)), "actionlint": linted, "zizmor": audited, "schema": valid}


@pytest.mark.parametrize("gate", GATES)
def test_workflows_are_clean(gate: str) -> None:
    assert GATES[gate](GITHUB) == ""


@pytest.mark.parametrize("script", sorted((ROOT / "mlops" / "deployment").glob("*.sh")), ids=lambda path: path.name)
@pytest.mark.parametrize("linter", [["shellcheck"], ["shfmt", "-d", "-i", "2", "-ci"]], ids=lambda words: words[0])
def test_scripts_of_the_workflows_are_clean(linter: list[str], script: Path) -> None:
    done = run(tool(linter[0]), *linter[1:], script)
    assert (done.returncode, done.stdout) == (0, "")


CHECKOUT = "actions/checkout@de0fac2e4500dabe0009e67214ff5f5447ce83dd # v6.0.2"
BACK = "      - name: Back to what ran before\n        if: "
BROKEN = [
    ("own", "ci.yml", CHECKOUT, "actions/checkout@v6", "not pinned by commit"),
    ("own", "ci.yml", CHECKOUT, CHECKOUT[:-9], "not pinned by commit"),
    ("own", "ci.yml", CHECKOUT, CHECKOUT.replace("de0fac", "de0fad"), "elsewhere it is"),
    ("own", "deploy.yml", "./.github/workflows/ci.yml", "./.github/workflows/tests.yml", "no such workflow"),
    ("own", "ci.yml", "permissions: {}", "permissions: read-all", "permissions at the top"),
    ("own", "ci.yml", "    permissions:\n      contents: read\n", "", "states no permissions"),
    ("own", "ci.yml", "contents: read", "contents: write", "may write contents"),
    ("own", "deploy.yml", "      id-token: write # Azure", "      actions: read # Azure", "id-token: write must be"),
    ("own", "ci.yml", "persist-credentials: false", "persist-credentials: true", "leaves its credentials behind"),
    ("own", "ci.yml", "    timeout-minutes: 20\n", "", "timeout-minutes must be"),
    ("own", "ci.yml", "timeout-minutes: 75", "timeout-minutes: 360", "timeout-minutes must be"),
    ("own", "ci.yml", "concurrency:", "x-concurrency:", "no concurrency group"),
    ("own", "ci.yml", "run: make lint", "run: make lints", "lints: there is no such thing"),
    ("own", "ci.yml", "run: make check-ops", "run: make lint", "nothing runs check-ops"),
    ("own", "ci.yml", "bash .ci/run", "bash .ci/go", ".ci/go: there is no such thing"),
    ("own", "deploy.yml", "images.sh version", "image.sh version", "there is no such thing"),
    ("own", "roll-out.yml", "roll_out remember", "rollout remember", "there is no such thing"),
    ("own", "roll-out.yml", '"$VERSION"', "${{ inputs.version }}", "pasted into a script"),
    ("own", "roll-out.yml", '<<<"$words"', "< <(echo)", "is not seen"),
    ("own", "ci.yml", "run: make audit", "run: |" + "\n          true" * 4, "more than three"),
    ("own", "deploy.yml", "password: ${{ github.token }}", "password: ${{ secrets.KEY }}", "a stored secret"),
    ("own", "roll-out.yml", "vars.OVERLAY", "vars.LAYER", "LAYER is not in docs/CICD.md"),
    ("own", "deploy.yml", "needs: [quality, staging]", "needs: [quality, dev]", "production does not wait"),
    ("own", "deploy.yml", "needs: [quality, dev, model]", "needs: [quality, dev]", "staging does not wait for model"),
    ("own", "deploy.yml", "needs: [quality, sign, provenance]", "needs: [quality, build]", "dev does not wait for"),
    ("own", "deploy.yml", "needs: [quality, test]", "needs: quality", "build does not wait for test"),
    ("own", "deploy.yml", "needs.staging.result == 'success'", "always()", "although the stage before failed"),
    ("own", "deploy.yml", "needs.dev.result == 'success' && ", "", "although the stage before failed"),
    ("own", "deploy.yml", "environment: production", "environment: dev", "production runs in another environment"),
    ("own", "deploy.yml", "environment: models", "environment: none", "environments must be"),
    ("own", "deploy.yml", "VERSION=${{ needs", "WERSION=${{ needs", "does not say its version"),
    ("own", "deploy.yml", "github.ref_type != 'tag' && ", "", "takes a release's name"),
    ("own", "deploy.yml", "  scan:", "  skan:", "jobs are not those that are known: scan, skan"),
    ("own", "roll-out.yml", f"{BACK}${{{{ (failure() || cancelled())", f"{BACK}${{{{ (failure())", "nothing goes back"),
    ("own", "roll-out.yml", "      - if: ${{ (failure()", "      - if: ${{ (x", "logs in anew"),
    ("own", "roll-out.yml", "      - name: Smoke", "      - if: false\n        name: Smoke", "can be left out"),
    ("own", "roll-out.yml", "roll_out check --version", "roll_out checks --version", "in this order"),
    ("own", "ci.yml", '"3.12", "3.13"]', '"3.12"]', "the project promises"),
    ("own", "ci.yml", " nginx-light jq", " jq", "other programs than .ci/run"),
    ("actionlint", "ci.yml", "matrix.python }}", "matrix.pyton }}", 'property "pyton" is not defined'),
    ("actionlint", "deploy.yml", "needs: scan", "needs: scann", 'needs job "scann" which does not exist'),
    ("actionlint", "deploy.yml", "steps.digest.outputs", "steps.digets.outputs", 'property "digets" is not defined'),
    ("actionlint", "deploy.yml", "      watch-seconds: 60\n", "", 'input "watch-seconds" is required'),
    ("actionlint", "roll-out.yml", 'verify "$IMAGE" digests', "verify $IMAGE digests", "SC2086"),
    ("zizmor", "ci.yml", CHECKOUT, "actions/checkout@v6", "unpinned-uses"),
    ("zizmor", "ci.yml", "persist-credentials: false", "persist-credentials: true", "artipacked"),
    ("zizmor", "ci.yml", "  pull_request:\n", "  pull_request_target:\n", "dangerous-triggers"),
    ("zizmor", "ci.yml", "permissions: {}", "permissions: write-all", "excessive-permissions"),
    ("zizmor", "roll-out.yml", '"$OVERLAY"', "${{ inputs.environment }}", "template-injection"),
    ("schema", "ci.yml", "runs-on:", "run-on:", "run-on"),
    ("schema", "deploy.yml", "cancel-in-progress: false", "cancel: false", "concurrency"),
    ("schema", "../dependabot.yml", "package-ecosystem: pip", "package-ecosystem: pipp", "pipp"),
    ("schema", "../ISSUE_TEMPLATE/bug.yml", "type: textarea", "type: text", "text"),
    ("schema", "../ISSUE_TEMPLATE/config.yml", "blank_issues_enabled", "blank_issues", "blank_issues"),
]  # fmt: skip


@pytest.mark.parametrize(("gate", "file", "old", "new", "said"), BROKEN)
def test_a_broken_copy_is_caught(gate: str, file: str, old: str, new: str, said: str, tmp_path: Path) -> None:
    github = Path(shutil.copytree(GITHUB, tmp_path / ".github"))
    (tmp_path / ".git").mkdir()  # actionlint looks for workflows that are called in the repository
    path = github / "workflows" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert said in GATES[gate](github)

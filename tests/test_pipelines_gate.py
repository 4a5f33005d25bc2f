"""The gate, on what evaluate.py really measured: tests/gate holds its files of 32 volumes each from the demo weights.

`a` and `b` have different noise, `blurred` is `b` behind a Gaussian of 0.6 voxels, `copy` is `b` with one volume
replaced by a training volume as the autoencoder sees it.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm3d.errors import DataError
from ldm3d.metrics import jackknife
from mlops.pipelines.gate import JUDGED, chance_of_closest, decide
from mlops.pipelines.metrics_file import Metrics, read_metrics

REAL = Path(__file__).parent / "gate"
ROOT = Path(__file__).parents[1]


def content(name: str = "a") -> Any:
    return json.loads((REAL / f"{name}.json").read_text())


@pytest.fixture
def judged(tmp_path: Path):
    """Decides about a candidate's content; the champion is `a` unless another one, or None, is given."""

    def read(name: str, given: Any) -> Metrics:
        (tmp_path / f"{name}.json").write_text(json.dumps(given))
        return read_metrics(tmp_path / f"{name}.json")

    def judge(candidate: Any, champion: Any = "a") -> Any:
        against = content("a") if champion == "a" else champion
        return decide(read("candidate", candidate), read("champion", against) if against else None)

    return judge


def gate(*arguments: object) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mlops.pipelines.gate", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


class TestCommand:
    def test_other_noise_is_no_worse_and_the_decision_is_written(self, tmp_path):
        done = gate("--candidate", REAL / "b.json", "--champion", REAL / "a.json", "--output", tmp_path / "d.json")
        assert done.returncode == 0, done.stderr
        assert "promote: no worse than the champion" in done.stdout
        decision = json.loads((tmp_path / "d.json").read_text())
        assert decision["decision"] == "promote" and decision["reasons"] == []
        assert [row["figure"] for row in decision["comparisons"]] == list(JUDGED)

    def test_a_blur_of_half_a_voxel_keeps_the_champion(self, tmp_path):
        done = gate(
            "--candidate", REAL / "blurred.json", "--champion", REAL / "b.json", "--output", tmp_path / "d.json"
        )
        assert done.returncode == 1 and "keep: sharpness is worse" in done.stdout and "WORSE" in done.stdout
        decision = json.loads((tmp_path / "d.json").read_text())
        assert decision["decision"] == "keep" and decision["reasons"]

    def test_one_copy_among_32_volumes_keeps_the_champion(self):
        for champion in ([], ["--champion", REAL / "b.json"]):
            done = gate("--candidate", REAL / "copy.json", *champion)
            assert done.returncode == 1 and "keep: synimg_1_999 is a copy of BRATS_" in done.stdout

    def test_without_a_champion_a_sound_candidate_is_promoted(self):
        done = gate("--candidate", REAL / "a.json")
        assert done.returncode == 0 and "there is no champion yet" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--candidate", "none.json"], "none.json: cannot be read"),
            (["--candidate", REAL / "a.json", "--champion", "none.json"], "none.json: there is no such file"),
            (["--candidate", ROOT / "README.md"], "is not JSON"),
            (["--candidate", ROOT / "config/config_demo.json"], "is it of this version's evaluate.py?"),
            ([], "--candidate"),
        ],
    )
    def test_what_cannot_be_read_is_an_error_in_one_line(self, arguments, message):
        done = gate(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
        assert done.stderr.count("\n") == 1


class TestComparison:
    def test_better_is_promoted_however_much(self, judged):
        assert judged(content("a"), content("blurred")).promote

    def test_the_same_is_promoted(self, judged):
        assert judged(content("a")).promote

    @pytest.mark.parametrize("figure", list(JUDGED))
    def test_each_figure_alone_can_refuse(self, judged, figure):
        candidate = content()
        metric = candidate["metrics"][figure]
        # Away from what real volumes have, by 4 of the errors of the difference; within every absolute limit.
        sign = -1 if metric["value"] < 1 and metric["direction"] == "1 is like real" else 1
        metric["value"] += sign * 6 * metric["standard_error"]
        decision = judged(candidate)
        assert decision.reasons == (f"keep: {figure} is worse than the champion's",)

    @pytest.mark.parametrize("figure", list(JUDGED))
    def test_what_lies_within_the_noise_does_not_refuse(self, judged, figure):
        candidate = content()
        metric = candidate["metrics"][figure]
        sign = -1 if metric["value"] < 1 and metric["direction"] == "1 is like real" else 1
        metric["value"] += sign * 2 * metric["standard_error"]
        assert judged(candidate).promote

    @pytest.mark.parametrize("figure", list(JUDGED))
    def test_rubbish_among_the_samples_is_no_excuse_for_itself(self, judged, figure):
        """As it makes the figure worse, it makes its error larger too: here so large that all would be within it."""
        candidate = content()
        metric = candidate["metrics"][figure]
        sign = -1 if metric["value"] < 1 and metric["direction"] == "1 is like real" else 1
        metric["value"] += sign * 8 * metric["standard_error"]
        metric["standard_error"] *= 20
        assert f"keep: {figure} is worse than the champion's" in judged(candidate).reasons

    @pytest.mark.parametrize(
        ("place", "value", "named"),
        [
            (("made", "spacing_mm"), [1.1, 1.1, 1.1], "spacing_mm"),
            (("made", "size"), [48, 48, 48], "size"),
            (("made", "channel"), 1, "channel"),
            (("made", "digests", "reference"), "other", "content of the reference volumes"),
            (("made", "digests", "training"), "other", "content of the training volumes"),
            (("metrics", "kid", "how"), "other features", "how kid was computed"),
            (("metrics", "sharpness", "n", "synthetic"), 33, "number of volumes of sharpness"),
            (("metrics", "kid", "n", "real"), 41, "number of volumes of kid"),
        ],
    )
    def test_what_was_not_measured_alike_is_not_compared(self, judged, place, value, named):
        candidate = content()
        at = candidate
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        with pytest.raises(DataError, match=f"do not compare: {named}"):
            judged(candidate)


class TestSanity:
    @pytest.mark.parametrize(
        ("figure", "value", "message"),
        [
            ("kid", 28.6, "is not clearly below 28.9, half of the mean image"),
            ("mmd", 0.43, "is not clearly below 0.442, half of the mean image"),
            ("sharpness", 0.45, "outside 0.5 to 2"),
            ("sharpness", 2.5, "outside 0.5 to 2"),
            ("interior_contrast", 0.1, "outside 0.5 to 2"),
            ("interior_spread", 3.0, "outside 0.5 to 2"),
            ("ms_ssim_pairs", 0.999, "samples are alike"),
        ],
    )
    @pytest.mark.parametrize("with_champion", [False, True])
    def test_no_candidate_may_be_senseless_even_if_the_champion_is(self, judged, figure, value, message, with_champion):
        candidate = content()
        candidate["metrics"][figure]["value"] = value
        decision = judged(candidate, copy.deepcopy(candidate) if with_champion else None)
        assert not decision.promote and message in decision.reasons[0]

    def test_many_near_samples_are_refused_though_none_is_a_copy(self, judged):
        candidate = content()
        nearest = candidate["metrics"]["copies"]["references"]
        nearest["closer_than_real_min"] = 8
        assert "8 of 32 samples are nearer" in judged(candidate, None).reasons[0]
        nearest["closer_than_real_min"] = 2
        assert judged(candidate, None).promote

    def test_the_chance_of_near_samples_is_that_of_a_shuffle(self):
        rng = np.random.default_rng(0)
        orders = rng.permuted(np.tile(np.arange(20), (20_000, 1)), axis=1)
        for closer in (1, 2, 3):
            drawn = (orders[:, :closer] < 8).all(axis=1).mean()  # 8 samples among 12 held-out volumes
            assert chance_of_closest(closer, 8, 12) == pytest.approx(drawn, abs=0.01)
        assert chance_of_closest(0, 8, 12) == 1

    @pytest.mark.parametrize("figure", [*JUDGED, "copies"])
    @pytest.mark.parametrize("damage", ["missing", "null", "NaN"])
    def test_a_figure_that_is_not_there_is_an_error_never_a_pass(self, tmp_path, figure, damage):
        candidate = content()
        if damage == "missing":
            del candidate["metrics"][figure]
        else:
            candidate["metrics"][figure]["value"] = None if damage == "null" else float("nan")
        (tmp_path / "c.json").write_text(json.dumps(candidate))
        with pytest.raises(DataError, match=f"no figure '{figure}'|{figure} has no value|holds NaN"):
            decide(read_metrics(tmp_path / "c.json"), None)

    def test_without_standard_errors_an_older_file_is_refused(self, judged):
        candidate = content()
        del candidate["metrics"]["kid"]["standard_error"]
        with pytest.raises(DataError, match="kid has no standard error"):
            judged(candidate)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (("metrics", "kid", "references", "mean_image"), 1e999, "holds Infinity"),
            (("metrics", "kid", "standard_error"), -1.0, "standard_error: Input should be greater"),
            (("nearest_training_volumes",), [], "nearest training volume of 0 of 32 samples"),
        ],
    )
    def test_figures_that_cannot_be_are_an_error_never_a_pass(self, judged, place, value, message):
        candidate = content()
        at = candidate
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        with pytest.raises(DataError, match=message):
            judged(candidate, None)

    def test_a_number_too_large_for_json_is_no_reference(self, tmp_path):
        (tmp_path / "c.json").write_text(
            (REAL / "a.json").read_text().replace('"mean_image": 57', '"mean_image": 1e999, "x": 57')
        )
        with pytest.raises(DataError, match="has no reference 'mean_image'"):
            decide(read_metrics(tmp_path / "c.json"), None)

    @pytest.mark.parametrize(("figure", "of"), [("kid", "synthetic"), ("kid", "real"), ("copies", "held_out")])
    def test_too_few_volumes_are_an_error(self, judged, figure, of):
        candidate = content()
        candidate["metrics"][figure]["n"][of] = 7
        with pytest.raises(DataError, match=f"{figure} is of 7 {of} volumes; at least 8"):
            judged(candidate, None)

    def test_the_committed_figures_of_the_demo_pass(self):
        assert decide(read_metrics(ROOT / "figs/demo_metrics.json"), None).promote


class TestStandardError:
    def test_of_a_mean_it_is_the_textbook_one(self):
        values = np.random.default_rng(0).normal(size=40)
        assert jackknife(lambda kept: float(values[kept].mean()), 40) == pytest.approx(values.std(ddof=1) / 40**0.5)

    def test_of_too_few_there_is_none(self):
        assert jackknife(lambda kept: 1.0, 3) is None

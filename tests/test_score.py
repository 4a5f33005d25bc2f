"""score.py without its server: what it loads. Answers are tried behind the real server, in tests_ops/real."""

import shutil
from pathlib import Path

import pytest

from ldm3d.cards import UNET
from ldm3d.errors import WeightsError
from mlops.deployment import score

DEMO = Path(__file__).parents[1] / "checkpoints/demo"


def test_weights_that_lie_in_the_current_folder_are_not_served_by_chance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(DEMO, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    for given in (None, ""):
        monkeypatch.delenv(score.MODEL_DIR, raising=False)
        if given is not None:
            monkeypatch.setenv(score.MODEL_DIR, given)
        with pytest.raises(WeightsError, match="AZUREML_MODEL_DIR is not set"):
            score.init()
    assert score.scorer is None


@pytest.mark.parametrize("folders", [(), ("one", "two")])
def test_one_model_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: tuple[str, ...]) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / UNET).write_bytes(b"")
    monkeypatch.setenv(score.MODEL_DIR, str(tmp_path))
    with pytest.raises(WeightsError, match=f"holds {len(folders)} files {UNET}; one model is served"):
        score.init()

"""figs: what is drawn was measured, shapes are the config's, every picture has a caption and is of today's data."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import tiny
from document_commands import commands, problems_of_command
from documents import ROOT, spans
from matplotlib.figure import Figure
from PIL import Image
from torch.utils.tensorboard import summary

import utils
from figs import __main__ as figs
from figs import costs, curves, page, samples, trainings
from figs.diagram import TIMES, draw_diagram, texts
from figs.diagram_pictures import CHANNELS, LEVELS, SHOWN_STEPS, Pictures
from ldm3d.config import load_config
from ldm3d.errors import DataError
from ldm3d.tracking import EventFile

CAPTIONS = (ROOT / "figs" / "README.md").read_text(encoding="utf-8")
PICTURES = sorted((ROOT / "figs").glob("*.png"))
BY_HAND, BY_BENCHMARKS = "service_page", "speed"
MOST_BYTES, WIDEST = 300_000, 1800
each_picture = pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def as_drawn() -> Iterator[None]:
    with matplotlib.rc_context(page.STYLE):
        yield


# Curves.

STEPS, EPOCHS = 5, 4
MEASURES = {
    "autoencoder": ("psnr_db", "ssim", "l1"),
    "diffusion": ("loss", *(f"level_{i}" for i in range(1, 9))),
}


def value(name: str, epoch: int) -> float:
    """Another one for each curve and epoch."""
    return float(epoch + sum(name.encode()))


def curve(name: str, *epochs: int, times: float = 1) -> list[list[float]]:
    return [[float(epoch), times * value(name, epoch)] for epoch in epochs or range(1, EPOCHS + 1)]


def written(folder: Path, epochs: int = EPOCHS) -> Path:
    """A run of both stages as the scripts write it, of `EPOCHS` epochs in all."""
    for stage, measures in MEASURES.items():
        events = EventFile(folder / stage)
        train = {"max_epochs": EPOCHS, "batch_size": 3, "accumulate_steps": 2, "max_grad_norm": 1.5}
        events.add(summary.text("config", f"```json\n{json.dumps({f'{stage}_train': train})}\n```"))
        for epoch in range(1, epochs + 1):
            names = ["train/" + name for name in ("loss", "reconstruction", "kl", "gradient_norm", "learning_rate")]
            names += [f"validation/{name}" for name in measures if epoch % 2 == 0]
            for name in [*names, "performance/peak_gib"]:
                events.add(summary.scalar(name, value(name, epoch)), epoch * STEPS)
        events.close()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written(tmp_path / "runs" / "demo_scratch")


def test_an_extract_holds_what_the_event_files_do(run: Path, tmp_path: Path) -> None:
    curves.renew(run, tmp_path / "curves.json")
    stage = json.loads((tmp_path / "curves.json").read_text())["autoencoder"]
    assert (stage["run"], stage["epochs"]) == ("runs/demo_scratch", EPOCHS)
    assert (stage["batch_size"], stage["steps_per_epoch"]) == (6, STEPS)
    assert stage["began"][:2] == "20" and stage["began"] <= stage["ended"]
    assert not any(name.startswith("performance") for name in stage["scalars"])
    assert np.transpose(trainings.points(stage, "train/kl")).tolist() == curve("train/kl")
    assert np.transpose(trainings.points(stage, "validation/l1")).tolist() == curve("validation/l1", 2, 4)


def test_a_run_that_has_not_ended_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extract = tmp_path / "curves.json"
    extract.write_text("kept")
    curves.renew(tmp_path / "none", extract)
    curves.renew(written(tmp_path / "broken", EPOCHS - 1), extract)
    assert extract.read_text() == "kept"
    assert "broken/autoencoder: has not ended" in capsys.readouterr().err


def test_a_folder_without_a_training_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make demo-scratch"):
        curves.read(tmp_path)


def drawn_points(axes: Any) -> list[list[list[float]]]:
    return [np.transpose(line.get_data()).tolist() for line in axes.lines]


def test_curves_are_drawn_as_they_were_measured(run: Path) -> None:
    both = {stage: curves.read(run / stage) for stage in curves.STAGES}
    loss, gradient, rate = trainings.train_recon(both).axes[:3]
    assert drawn_points(loss) == [curve(f"train/{name}") for name in ("loss", "reconstruction", "kl")]
    assert drawn_points(gradient) == [curve("train/gradient_norm"), [[0, 1.5], [1, 1.5]]]
    assert drawn_points(rate) == [curve("train/learning_rate", times=1000)]
    assert drawn_points(trainings.train_diffusion(both).axes[0])[0] == curve("train/loss")
    loss, level = trainings.val_diffusion(both).axes[:2]
    assert drawn_points(loss) == [curve("validation/loss", 2, 4)]
    by_level = [[value(f"validation/level_{i}", epoch) for i in range(1, 9)] for epoch in (2, 4)]
    assert [[y for _, y in line] for line in drawn_points(level)] == by_level
    assert drawn_points(level)[0][0][0] == 1 / 16  # the middle of the first of 8 levels
    planes = [np.zeros((8, 6)), np.ones((6, 8))]
    l1, psnr, ssim, *tiles = trainings.val_recon(both, planes, planes).axes[:6]
    assert drawn_points(l1) == [curve("validation/l1", 2, 4), curve("train/reconstruction")]
    assert drawn_points(psnr) == [curve("validation/psnr_db", 2, 4)]
    assert drawn_points(ssim) == [curve("validation/ssim", 2, 4)]
    assert [tile.images[0].get_array().shape for tile in tiles] == [(8, 14)] * 3
    assert tiles[2].images[0].get_array().max() == 0


def test_smoothing_keeps_the_level_to_both_ends() -> None:
    np.testing.assert_allclose(trainings.smooth(np.full(9, 3.0)), 3)
    np.testing.assert_allclose(trainings.smooth(np.array([0.0, 0, 5, 0, 0, 0]))[2:4], [1, 1])


# Plots of the benchmarks.


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def test_steps_are_drawn_as_they_were_measured() -> None:
    quality, sampling = result("quality"), result("sampling")
    demo = json.loads((ROOT / "figs" / "demo_metrics.json").read_text())
    distance, likeness, time = costs.draw_steps(quality, sampling, demo).axes[:3]
    assert drawn_points(distance)[0] == [[row["steps"], row["KID"]] for row in quality["rows"]]
    assert drawn_points(likeness)[1] == [[row["steps"], row["sharpness"]] for row in quality["rows"]]
    seconds = {row["what"]: row["ours s a volume"] for row in sampling["rows"] if row["networks"] == "demo"}
    assert drawn_points(time)[0] == [[10, seconds["alone, 10 steps"]], [20, seconds["alone, 20 steps"]]]


def test_memory_and_growth_are_drawn_as_they_were_measured() -> None:
    memory = result("memory_cpu")
    for axes, stage in zip(costs.draw_memory(memory).axes, ("autoencoder", "diffusion"), strict=True):
        rows = [row for row in memory["rows"] if row["stage"] == stage]
        measured = sorted(row[f"{kind}_bytes"] / 2**30 for row in rows for kind in ("tensor", "resident"))
        assert sorted(bar.get_width() for bar in axes.patches) == measured
    growth = result("growth")
    for axes, kind in zip(costs.draw_growth(growth).axes, ("side", "batch", "volumes"), strict=True):
        rows = [row for row in growth["rows"] if row["with"] == kind]
        assert [", ".join(f"{y:.3g}" for _, y in line) for line in drawn_points(axes)] == [row["s"] for row in rows]


# The diagram.


def some_pictures() -> Pictures:
    volume, latent = np.full((64, 48), 0.5), np.full((16, 12), 0.5)
    steps = [5 * i for i in range(SHOWN_STEPS)]
    return Pictures([volume], [volume], [latent] * CHANNELS, [latent] * len(LEVELS), steps, [latent] * 5, [volume] * 5)


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def test_what_the_diagram_says_comes_from_the_config() -> None:
    cfg = load_config(figs.CONFIG, [])
    settings = ("latent_channels=9", "diffusion_train.patch_size=[32,48,64]", "sampling.steps=17", "spacing=[2,2,1]")
    settings += ("diffusion_def.channels=[16,48,96]", "diffusion_def.attention_levels=[false,true,true]")
    settings += ("autoencoder_def.channels=[16,80]", "autoencoder_def.patchify=1", "autoencoder_train.kl_weight=0.5")
    settings += (
        "autoencoder_train.batch_size=3",
        "diffusion_train.batch_size=5",
        "diffusion_train.center_latents=false",
    )
    settings += ("autoencoder_train.patch_size=[16,16,16]", "diffusion_def.num_head_channels=16")
    changed = load_config(figs.CONFIG, list(settings))
    before, after = ({name: text.replace(TIMES, "x") for name, text in texts(c).items()} for c in (cfg, changed))
    assert (before["volume"], before["latent"]) == ("1x48x64x48", "12x12x16x12")
    assert (after["latent"], after["unet 2"]) == ("9x16x24x32", "96x4x6x8 + attention")
    assert [name for name in before if before[name] == after[name]] == []
    for shown in (cfg, changed):
        said = words(draw_diagram(shown, some_pictures()))
        assert [text for text in texts(shown).values() if text not in said] == []


def test_the_diagram_has_the_formulas_of_rectified_flow_only() -> None:
    with pytest.raises(ValueError, match="ddpm"):
        texts(tiny.config())


def test_words_of_the_diagram_lie_on_the_page_and_not_on_each_other() -> None:
    figure = draw_diagram(load_config(figs.CONFIG, []), some_pictures())
    figure.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.axes[0].texts if text.get_text()}
    inside = figure.bbox
    assert [t for t, b in boxes.items() if b.x0 < 0 or b.y0 < 0 or b.x1 > inside.x1 or b.y1 > inside.y1] == []
    names = list(boxes)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[:i] if boxes[a].overlaps(boxes[b])]
    assert pairs == []
    smallest = min(text.get_fontsize() for text in figure.axes[0].texts)
    assert smallest >= page.SMALLEST


# Generated brains.


@pytest.mark.parametrize(
    ("plane", "upper_left"),
    [("axial", (1, 1, None)), ("coronal", (1, None, 1)), ("sagittal", (None, 1, 1))],
)
def test_slices_are_in_the_radiological_convention(plane: str, upper_left: tuple[int | None, ...]) -> None:
    """In RAS the highest indices are right, front and top: they come to the upper left corner."""
    volume = np.zeros((8, 10, 12), dtype=np.float32)
    volume[tuple(slice(None) if i is None else slice(-3, None) for i in upper_left)] = 1
    volume[0, 0, 0] = volume[-1, -1, -1] = 1  # all of the grid is shown
    figure = samples.draw_samples(plane, [volume] * samples.SHOWN, (2, 2, 2))
    tiles = [axes.images[0].get_array() for axes in figure.axes]
    assert len(tiles) == samples.SHOWN * samples.SLICES
    for tile in tiles:
        assert tile[:2, :2].min() == 1 and tile[-2:, 2:].max() == 0
    titles = [axes.get_title() for axes in figure.axes[: samples.SLICES]]
    number = samples.AXES[plane][1]
    middle = (volume.shape[number] - 1) / 2
    mm = [float(title.split("= ")[1].removesuffix(" mm").replace(samples.MINUS, "-")) for title in titles]
    assert mm == sorted(mm) and abs(mm[0]) <= 2 * middle


def test_volumes_that_are_missing_are_an_error_that_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="make sample"):
        samples.read_samples(tmp_path)


# The files in figs.


def problems_of_picture(path: Path) -> list[str]:
    """What a reader would stumble over: too large, blank, with something to see through."""
    problems = [f"{path.stat().st_size} bytes"] if path.stat().st_size > MOST_BYTES else []
    with Image.open(path) as image:
        if image.convert("RGBA").getextrema()[3][0] < 255:
            problems.append("is not opaque")
        values = np.asarray(image.convert("L"))
    if not (800 <= values.shape[1] <= WIDEST and 300 <= values.shape[0] <= WIDEST):
        problems.append(f"is {values.shape[1]} x {values.shape[0]}")
    if values.std() < 10:
        problems.append("is blank")
    return problems


def sources_of(path: Path) -> dict[str, str]:
    """What a picture says it was drawn from: names and digests."""
    with Image.open(path) as image:
        found: dict[str, str] = json.loads(image.text[page.SOURCES])  # type: ignore[attr-defined]
        return found


def outdated(path: Path) -> list[str]:
    """Sources of a picture that are other ones today."""
    said = sources_of(path)
    now = json.loads(page.digests([ROOT / name for name in said]))
    return [name for name in said if said[name] != now[name]]


@each_picture
def test_pictures_can_be_shown(picture: Path) -> None:
    assert problems_of_picture(picture) == []


@pytest.mark.parametrize("name", figs.FIGURES)
def test_pictures_are_drawn_from_what_lies_in_the_tree(name: str) -> None:
    """Where this fails, `make figures` draws them again."""
    path = ROOT / "figs" / f"{name}.png"
    assert set(sources_of(path)) == {str(source.relative_to(ROOT)) for source in figs.FIGURES[name].sources}
    assert outdated(path) == []


def test_the_demos_pictures_are_of_the_run_that_its_figures_are_of() -> None:
    for name in ("demo_montage", "demo_metrics"):
        path = ROOT / "figs" / f"{name}.png"
        assert list(sources_of(path)) == ["figs/demo_metrics.json"]
        assert outdated(path) == []


def test_every_picture_is_drawn_by_somebody() -> None:
    drawn = {*figs.FIGURES, "demo_montage", "demo_metrics", BY_HAND, BY_BENCHMARKS}
    assert {path.stem for path in PICTURES} == drawn


def problems_of_captions(text: str, pictures: set[str]) -> list[str]:
    """What is wrong with a page of captions: pictures without one, commands and data that are not there."""
    shown, named = re.findall(r"^!\[[^]]+\]\(([\w.]+)\)$", text, re.MULTILINE), set(spans(text))
    problems = [f"{name} is not shown once" for name in pictures if shown.count(name) != 1]
    problems += [f"{name} has no caption" for name in pictures - named]
    problems += [f"{name} is not there" for name in {*shown} - pictures]
    for words in commands(text):
        problems += problems_of_command(words)
        if words[:3] == ["python", "-m", "figs"]:
            problems += [f"no picture {name}" for name in words[3:] if name not in figs.FIGURES]
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    for section in sections:
        lines = section.splitlines()
        for kind in ("- Command", "- Data: "):
            if not any(line.startswith(kind) for line in lines):
                problems.append(f"{lines[0]}: has no line {kind}")
    made = ("runs/", "results/")
    paths = [span for span in named if re.fullmatch(r"[\w./]+/[\w.]+", span)]
    return problems + [f"no {path}" for path in paths if not (ROOT / path).exists() and not path.startswith(made)]


def test_captions_name_every_picture_its_command_and_its_data() -> None:
    assert problems_of_captions(CAPTIONS, {path.name for path in PICTURES}) == []


def measures(text: str) -> list[str]:
    """Of a table: the first cell of values of each row, without words."""
    return re.findall(r"^\| [^|]*(?:PSNR|MMD|KID|sharpness|contrast|MS-SSIM)[^|]* \| ([^|]*) \|", text, re.MULTILINE)


def test_readme_tells_of_the_demo_what_its_file_says() -> None:
    text = (ROOT / "README.md").read_text().split("<!-- demo figures -->")[1]
    of = {name: m["value"] for name, m in json.loads(figs.DEMO.read_text())["metrics"].items()}
    wanted = [f"{of['psnr_db']:.2f} dB, {of['ssim']:.3f}, {of['l1']:.4f}", f"{of['mmd']:.3f}", f"{of['kid']:.2f}"]
    wanted += [f"{of['sharpness']:.2f}", f"{of['interior_contrast']:.2f}", f"{of['ms_ssim_pairs']:.3f}"]
    assert measures(text) == wanted


# The command.


def test_a_picture_that_nobody_draws_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["figs", "nothing"])
    with pytest.raises(SystemExit) as stopped:
        utils.run_script(figs.main)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: nothing: no such picture; there are ldm, ")


def test_what_is_drawn_is_written_with_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["figs", "growth", "--tree", str(tmp_path)])
    monkeypatch.setattr(figs, "HERE", tmp_path)
    figs.main()
    drawn = tmp_path / "growth.png"
    assert [path.name for path in tmp_path.iterdir()] == ["growth.png"]
    assert problems_of_picture(drawn) == [] and outdated(drawn) == []
    assert list(sources_of(drawn)) == ["benchmarks/results/growth.json"]


def test_the_demos_pictures_are_taken_when_it_has_ended(tmp_path: Path) -> None:
    found = tmp_path / "found"
    found.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (1000, 1800), dtype=np.uint8)
    for name in ("montage", "metrics"):
        Image.fromarray(noise).save(found / f"{name}.png")
    figs.renew_demo(found, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
    (found / "metrics.json").write_text("{}")
    figs.renew_demo(found, tmp_path)
    assert Image.open(tmp_path / "demo_montage.png").size == (figs.DEMO_WIDTH, 667)
    assert (tmp_path / "demo_metrics.json").read_text() == "{}"
    assert list(sources_of(tmp_path / "demo_metrics.png")) == ["demo_metrics.json"]


# The checks can fail.


def test_bad_pictures_are_seen(tmp_path: Path) -> None:
    Image.new("RGB", (1200, 600), "white").save(tmp_path / "blank.png")
    Image.new("RGBA", (200, 600), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    noise = np.random.default_rng(0).integers(0, 255, (600, 1200, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    assert problems_of_picture(tmp_path / "blank.png") == ["is blank"]
    assert problems_of_picture(tmp_path / "clear.png")[:2] == ["is not opaque", "is 200 x 600"]
    assert problems_of_picture(tmp_path / "large.png") == [f"{(tmp_path / 'large.png').stat().st_size} bytes"]


def test_bad_captions_are_seen() -> None:
    text = """## Part\n\n![a](one.png)\n\n![b](gone.png)\n\n`one.png`: see `benchmarks/results/none.json`.\n
- Command: `python -m figs none`, `make nothing`, `python -m benchmarks.none`\n"""
    assert sorted(problems_of_captions(text, {"one.png", "two.png"})) == [
        "Makefile has no nothing",
        "Part: has no line - Data: ",
        "gone.png is not there",
        "no benchmarks/results/none.json",
        "no picture none",
        "there is no benchmarks.none",
        "two.png has no caption",
        "two.png is not shown once",
    ]

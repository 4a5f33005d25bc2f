"""Find the cases of a data set, whichever of three ways its files lie."""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ldm3d.console import log
from ldm3d.errors import ConfigError, DataError
from ldm3d.nifti import stem_of
from ldm3d.sections import DataConfig

CHANNELS = ("flair", "t1", "t1gd", "t2")
"""Contrasts by the number that the configuration's `channel` gives."""

# What the contrasts are called in file names and lists: BraTS until 2021, BraTS since 2023, the Decathlon.
ALIASES = {
    "flair": ("flair", "t2f", "t2flair"),
    "t1": ("t1", "t1w", "t1n"),
    "t1gd": ("t1gd", "t1ce", "t1c"),
    "t2": ("t2", "t2w"),
}
_CONTRAST_OF = {alias: contrast for contrast, aliases in ALIASES.items() for alias in aliases}
_LABEL_NAMES = ("seg", "label", "mask")
# What MONAI's lists call the two sides of a split, and what we do.
_SIDES = {"training": "train", "validation": "validation"}
_FOLDERS_DEEP = 3
_HOW_TO_GET_DATA = (
    "set data_base_dir in the environment file to where the data is, or get some: "
    "python download_brats_data.py -e ENV (a download), or with --phantom N (N made-up brains, no download)"
)


@dataclass(frozen=True)
class Case:
    """One volume of the data set.

    Attributes:
        name: unique in the data set, the same on every machine.
        image: NIfTI file; whether it is there and usable is for `ldm3d.checks` to say.
        channel: which channel of a 4-D file; None: the file is 3-D.
        label: tumour mask on the image's grid, if there is one.
        attributes: what else is known (modality, age, sex, split, ...) as pairs of text.
    """

    name: str
    image: Path
    channel: int | None = None
    label: Path | None = None
    attributes: tuple[tuple[str, str], ...] = ()

    def attribute(self, key: str) -> str | None:
        return dict(self.attributes).get(key)


def find_cases(root: Path, data: DataConfig, channel: int) -> list[Case]:
    """List the data set's cases without opening their images.

    Args:
        root: the folder `data_base_dir`. Hidden files and the cache folder in it are no data.
        data: its `layout`, `datalist` and `cache_dir` count here.
        channel: contrast wanted, index of `CHANNELS`.

    Returns:
        Cases sorted by name.

    Raises:
        DataError: no such folder, no cases in it (what was looked for and how to get data), two cases of one name,
            or a list that is damaged or contradicts itself.
        ConfigError: `data.datalist` with a layout that has none.
    """
    if not root.is_dir():
        raise DataError(f"{root}: there is no such folder; {_HOW_TO_GET_DATA}")
    if data.datalist is not None and data.layout not in ("auto", "list"):
        raise ConfigError(f"data.datalist is set but data.layout is {data.layout!r}; it must be 'list' or 'auto'")
    cases = sorted(_find(root, data, channel), key=lambda case: case.name)
    for one, other in pairwise(cases):
        if one.name == other.name:
            raise DataError(f"two cases are called {one.name!r}: {one.image} and {other.image}")
    if not cases:
        raise DataError(_nothing_found(root, data, channel))
    return cases


def cache_folder(root: Path, data: DataConfig) -> Path:
    """Where prepared volumes are kept."""
    return data.cache_dir or root / "cache"


def _find(root: Path, data: DataConfig, channel: int) -> list[Case]:
    cache = cache_folder(root, data)
    if data.datalist is not None:
        return _listed(data.datalist, root, channel)
    task01 = next(
        (folder for folder in (root, root / "Task01_BrainTumour") if (folder / "dataset.json").is_file()), None
    )
    if task01 and data.layout in ("auto", "task01"):
        return _task01(task01, channel)
    if data.layout == "task01":
        return []
    found = _brats(root, channel, cache) if data.layout in ("auto", "brats") else []
    return found or (_plain_folder(root, channel, cache) if data.layout != "brats" else [])


def _nothing_found(root: Path, data: DataConfig, channel: int) -> str:
    if data.datalist is not None:
        return f"{data.datalist}: lists no {CHANNELS[channel]} image (channel {channel})"
    looked_for = {
        "task01": "dataset.json with its imagesTr, there or in Task01_BrainTumour",
        "brats": f"case folders like CASE/CASE_{CHANNELS[channel]}.nii.gz, at most {_FOLDERS_DEEP} folders deep",
        "list": f"NIfTI files (.nii, .nii.gz) of {CHANNELS[channel]}, at most {_FOLDERS_DEEP} folders deep",
    }
    wanted = looked_for.values() if data.layout == "auto" else [looked_for[data.layout]]
    return f"{root}: no cases found; looked for {'; or '.join(wanted)}; {_HOW_TO_GET_DATA}"


def _task01(folder: Path, channel: int) -> list[Case]:
    """Task01_BrainTumour of the Medical Segmentation Decathlon: 4-D images with all contrasts."""
    path = folder / "dataset.json"
    content = _json(path)
    modality = content.get("modality") if isinstance(content, dict) else None
    named = modality.get(str(channel)) if isinstance(modality, dict) else None
    if modality is not None and _contrast(str(named)) != CHANNELS[channel]:
        raise DataError(f"{path}: says that channel {channel} is {named!r}, not {CHANNELS[channel]}; is it Task01?")
    cases = []
    for place, row in _rows_of_json(path, content, ("training",)):
        if Path(row["image"]).name.startswith("."):  # macOS leaves `._*` files in the Decathlon's archive
            continue
        image = _inside(folder, row["image"], place)
        label = _inside(folder, row["label"], place) if "label" in row else None
        cases.append(
            Case(
                name=stem_of(image),
                image=image,
                channel=channel,
                label=label if label and label.is_file() else None,
                attributes=(("modality", CHANNELS[channel]),),
            )
        )
    return cases


def _inside(folder: Path, entry: str, place: str) -> Path:
    """`folder / entry`, refused if it leads out of the folder (links within it may lead where their owner wants)."""
    path = Path(os.path.normpath(folder / entry))
    if not path.is_relative_to(os.path.normpath(folder)):
        raise DataError(f"{place}: {entry!r} lies outside {folder}")
    return path


def _brats(root: Path, channel: int, cache: Path) -> list[Case]:
    """Case folders CASE/CASE_flair.nii.gz or CASE/CASE-t2f.nii.gz; that a contrast is missing, the check reports."""
    cases = []
    for folder, files in _folders(root, cache):
        parts = {}
        for file in files:
            stem = stem_of(file)
            name, part = stem[: len(folder.name)], stem[len(folder.name) :].lower()
            if name == folder.name and part[:1] in ("_", "-"):
                parts[_contrast(part[1:]) or part[1:]] = file
        if not any(contrast in parts for contrast in CHANNELS):
            continue
        contrast = CHANNELS[channel]
        image = parts.get(contrast, folder / f"{folder.name}_{contrast}.nii.gz")
        cases.append(Case(folder.name, image, label=parts.get("seg"), attributes=(("modality", contrast),)))
    return cases


def _plain_folder(root: Path, channel: int, cache: Path) -> list[Case]:
    """Any NIfTI files, but those whose names end as a label or another contrast (`_seg`, `_t2`) are no images."""
    images, labels = [], {}
    for _, files in _folders(root, cache):
        for file in files:
            stem = stem_of(file)
            ending = stem.replace("-", "_").rpartition("_")[2].lower()
            if ending in _LABEL_NAMES:
                labels[file.parent / stem[: -len(ending) - 1]] = file
            elif _contrast(ending) in (None, CHANNELS[channel]):
                images.append(file)
    return [
        Case(
            name=_name_of(image, root),
            image=image,
            label=labels.get(image.parent / stem_of(image)),
            attributes=(("modality", CHANNELS[channel]),),
        )
        for image in images
    ]


def _listed(datalist: Path, root: Path, channel: int) -> list[Case]:
    """The rows of `data.datalist` that are of this contrast or name none."""
    path = next((path for path in (datalist, root / datalist) if path.is_file()), None)
    if path is None:
        raise DataError(f"data.datalist {datalist}: there is no such file, nor {root / datalist}")
    rows = _rows_of_csv(path) if path.suffix.lower() == ".csv" else _rows_of_json(path, _json(path), tuple(_SIDES))
    cases, left_out = [], 0
    for place, row in rows:
        if row.get("split") and row["split"] not in _SIDES.values():
            raise DataError(f"{place}: split {row['split']!r} must be one of {', '.join(_SIDES.values())}, or empty")
        if row.get("modality") and _contrast(row["modality"]) != CHANNELS[channel]:
            left_out += 1
            continue
        image = _beside(path, root, row["image"])
        label = _beside(path, root, row["label"]) if row.get("label") else None
        row["modality"] = CHANNELS[channel]
        attributes = {key: value for key, value in row.items() if value and key not in ("image", "label", "name")}
        name = row.get("name") or _name_of(image, root, path.parent)
        cases.append(Case(name, image, label=label, attributes=tuple(sorted(attributes.items()))))
    if left_out:
        log(f"{path}: {left_out} rows of other contrasts than {CHANNELS[channel]} left out")
    return cases


def _beside(path: Path, root: Path, entry: str) -> Path:
    """A list's path: relative to the list's folder, else to the data folder."""
    candidates = (path.parent / entry, root / entry)
    return next((candidate for candidate in candidates if candidate.is_file()), candidates[0])


def _rows_of_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        # utf-8-sig: spreadsheets write a byte-order mark.
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if "image" not in (reader.fieldnames or ()):
                raise DataError(f"{path}: needs a column 'image'; its columns are {reader.fieldnames}")
            for row in reader:
                yield _checked_row(f"{path}: line {reader.line_num}", row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}") from error


def _rows_of_json(path: Path, content: Any, keys: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a list of objects, or of an object with such lists under `keys`, each of which then names a side."""
    if isinstance(content, list):
        content = {"": content}
    elif not isinstance(content, dict) or not any(key in content for key in keys):
        raise DataError(f"{path}: must hold a list of objects, or an object with {' and '.join(map(repr, keys))}")
    lists = {key: rows for key, rows in content.items() if key in ("", *keys) and rows != []}
    for key, rows in lists.items():
        if not isinstance(rows, list):
            raise DataError(f"{path}: {key!r} must be a list of objects")
        for index, row in enumerate(rows):
            place = f"{path}: entry {index} of {key or 'the list'}"
            if len(lists) > 1 and isinstance(row, Mapping):
                row = {"split": _SIDES[key], **row}
            yield _checked_row(place, row)


def _checked_row(place: str, row: Any) -> tuple[str, dict[str, str]]:
    if not isinstance(row, Mapping) or not isinstance(row.get("image"), str) or not row["image"].strip():
        raise DataError(f"{place}: must name an image, as text, not {row!r}")
    return place, {str(key): str(value).strip() for key, value in row.items() if key and value is not None}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON: {error}") from error


def _folders(root: Path, cache: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Folders under `root`, and the NIfTI files in each; hidden ones and the cache are passed over."""
    cache = cache.resolve()
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        deep = len(folder.relative_to(root).parts)
        keep = [sub for sub in folders if not sub.startswith(".") and (folder / sub).resolve() != cache]
        folders[:] = sorted(keep) if deep < _FOLDERS_DEEP else []
        yield folder, [folder / f for f in sorted(files) if _is_nifti(f)]


def _is_nifti(name: str) -> bool:
    return name.endswith((".nii", ".nii.gz")) and not name.startswith(".")


def _contrast(name: str) -> str | None:
    return _CONTRAST_OF.get(name.strip().lower())


def _name_of(image: Path, *folders: Path) -> str:
    """The path within the data set, without suffix and separators: unique, and the same on every machine."""
    folder = next((folder for folder in folders if image.is_relative_to(folder)), image.parent)
    return "_".join([*image.relative_to(folder).parts[:-1], stem_of(image)])

"""One of two processes that test_data.py starts: prepares several data sets and notes what it saw of each."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ldm3d import cache, checks, distributed
from ldm3d.cases import Case
from ldm3d.data import prepare_data, train_loader, validation_loader
from ldm3d.errors import OutputError, UserError
from ldm3d.schema import Config, Environment

decoded: list[str] = []
load_prepared, write = cache.load_prepared, cache.VolumeCache._write


def load_and_note(case: Case, spacing: tuple[float, ...]) -> np.ndarray:
    decoded.append(case.name)
    return load_prepared(case, spacing)


def write_unless_full(self: cache.VolumeCache, key: str, case: Case, volume: np.ndarray, oriented: bool) -> None:
    if "disk" in self.folder.parts and distributed.rank() == 1:
        raise OutputError("disk full on rank 1")
    write(self, key, case, volume, oriented)


def seen(cfg: Config, env: Environment) -> dict[str, Any]:
    decoded.clear()
    try:
        prepared = prepare_data(cfg, env)
    except UserError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    prepared_here = list(decoded)
    loaders = train_loader(prepared, cfg, "autoencoder"), validation_loader(prepared, cfg, "autoencoder")
    train, validation = ([name for batch in loader for name in batch["case"]] for loader in loaders)
    return {
        "split": [[case.name for case in side] for side in (prepared.split.train, prepared.split.validation)],
        "prepared": prepared_here,
        "volumes are right": [
            bool(np.allclose(prepared.cache.load(case), load_prepared(case, cfg.spacing), atol=1e-4))
            for case in prepared.split.train + prepared.split.validation
        ],
        "train": train,
        "validation": validation,
        "decoded later": decoded[len(prepared_here) :],
    }


if __name__ == "__main__":
    config, folders = Config.model_validate_json(sys.argv[1]), [Path(folder) for folder in sys.argv[2:]]
    checks._ROUND = 2  # several meetings of the ranks, as with many cases
    cache.load_prepared, cache.VolumeCache._write = load_and_note, write_unless_full  # type: ignore[method-assign]
    with distributed.process_group("gloo", 60):
        for folder in folders:
            names = ("model_dir", "tfevent_path", "output_dir", "data_base_dir")
            result = seen(config, Environment(**{name: folder / name for name in names}))
            Path(folder, f"rank{distributed.rank()}.json").write_text(json.dumps(result))

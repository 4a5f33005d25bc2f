"""Run a script with faults on some of its processes: `on_a_rank.py '{"1": [["die_at_step", 3]]}' SCRIPT ARGUMENTS`.

torchrun starts it in the script's place. The faults, functions of `faults.py`, are met in the first start only, not
after an elastic restart.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import faults

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    by_rank, script = json.loads(sys.argv[1]), ROOT / sys.argv[2]
    sys.path[0] = str(ROOT)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        for name, *arguments in by_rank.get(os.environ["RANK"], []):
            getattr(faults, name)(*arguments)
    sys.argv = [str(script), *sys.argv[3:]]
    runpy.run_path(str(script), run_name="__main__")

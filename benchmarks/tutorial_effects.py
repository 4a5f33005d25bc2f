"""What each difference from the MONAI tutorial's recipe is worth, measured alone on the demo's weights and phantoms.

    python -m benchmarks.tutorial_effects

The table of docs/MONAI_TUTORIAL.md. `tutorial` is what its scripts, or MONAI's classes with their own defaults, give;
`here` what this project gives in the same place. It needs no data; weights of `monai-generative` are compared where
that package is installed.
"""

from importlib.util import find_spec

import torch

from benchmarks import effects_of_sampling as sampling
from benchmarks import effects_of_training as training
from benchmarks.demo_model import demo_model
from benchmarks.measure import arguments, table, write_result
from ldm3d.allocator import keep_freed_memory


def main() -> None:
    args = arguments(__doc__).parse_args()
    keep_freed_memory()
    tiny = args.tiny
    count, num, repeats, network = (4, 2, 1, "tiny") if tiny else (8, 4, 7, "demo")
    model = demo_model(count)
    with torch.no_grad():
        rows = [
            *sampling.scale_factor(model, num),
            *training.scale_of_one_batch(model),
            *sampling.clipping(model, num),
            *sampling.ddim(model, num),
            *sampling.flow_timesteps(model, num),
            *sampling.written_file(model, num),
            *training.intensities(num),
            *training.kl(model),
            *training.validation(model, 3 if tiny else 20),
            *training.validation_of_ranks(model),
            *(training.old_weights() if find_spec("generative") else []),
        ]
    rows += training.resume(model, 1 if tiny else 4)
    rows += training.anomaly_detection(repeats, network)
    rows += training.encoding(repeats, network)
    print(table(rows))
    write_result(args.output, {"phantoms": count, "generated": num, "rows": rows})


if __name__ == "__main__":
    main()

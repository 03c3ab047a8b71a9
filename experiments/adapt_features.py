"""Which method, and when it hurts: every method of jaxzs.adapt on real CLIP features in many settings.

    python experiments/adapt_features.py --features FOLDER

FOLDER holds `.npz` files with image_features [N,E], labels [N] and text_features [C,E]. Each setting is a data set and
a regime (all images, few of each class, unequal classes, absent classes), with some seeds: which images and classes are
there. Transductive: the images that are labelled are the ones fitted on, without labels. The table gives the mean over
settings, and of each method its worst run against the text.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from jaxzs import report
from jaxzs.evaluation import METHODS, Labelled, Run, cells, read_features, table

RESULTS = Path(__file__).parent / "results"


def runs_of(data: Labelled) -> list[Run]:
    """Regimes of a data set with their seeds: those that draw little are repeated."""
    classes = len(data.text_features)
    few, some = max(2, classes // 5), max(2, classes // 2)
    regimes = [
        ("full", 1),
        ("balanced:4", 3),
        ("balanced:16", 2),
        ("imbalanced:5", 2),
        ("imbalanced:20", 2),
        (f"present:{few}", 3),
        (f"present:{some}", 2),
    ]
    return [Run(regime, seed) for regime, seeds in regimes for seed in range(seeds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=Path, required=True, help="folder with .npz files")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="zero-shot is always run")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--skip-existing", action="store_true", help="keep cells of the record")
    arguments = parser.parse_args()
    paths = sorted(arguments.features.glob("*.npz"))
    if not paths:
        sys.exit(f"no .npz files in {arguments.features}")
    methods = tuple(m for m in METHODS if m in arguments.methods or m == "zero-shot")
    command = ["python", "experiments/adapt_features.py", "--features", "FOLDER"]
    sweep = report.Sweep(
        arguments.out / "adapt_features.json",
        command=shlex.join(command),
        settings={"temperature": 0.01},
        skip_existing=arguments.skip_existing,
    )
    found = []
    for path in paths:
        data = read_features(path)
        for method in methods:
            found += cells(sweep, data, method, runs_of(data), prefix=f"{data.name} ").values()
            print(*[cell.row for cell in found[-len(runs_of(data)) :]], sep="\n", flush=True)
    record = sweep.finish(report.Results({"rows": [cell.row for cell in found]}))
    text = (
        "# Which method, and when it hurts: CLIP ViT-B/32 features\n\n"
        f"`{shlex.join(command)}`; {record['device']}, jax {record['versions']['jax']}, float32.\n"
        "Accuracy in %, mean over the seeds of a setting. `auto` is the rule of `adapt.choose`, `uniform` InMaP as "
        "published (gamma 0), `proxy` InMaP with gamma chosen, `gda` anchored GDA.\n\n"
    )
    (arguments.out / "adapt_features.md").write_text(text + table(found, methods) + "\n")
    print(text + table(found, methods))


if __name__ == "__main__":
    main()

"""How long jaxzs takes to start, against `import jax`: fresh interpreters, interleaved, medians and ratios.

python experiments/bench_import.py --repeats 15 --out experiments/results/import.json
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from jaxzs.report import markdown_table, write_record

BASELINE = "import jax"
HELP = "from jaxzs.cli import main; raise SystemExit(main([{arguments}]))"
# Largest ratio to the baseline that the project promises; None where it promises nothing.
COMMANDS: dict[str, tuple[str, float | None]] = {
    "python": ("pass", None),
    BASELINE: (BASELINE, None),
    "import jaxzs": ("import jaxzs", 1.2),
    "import jaxzs; jaxzs.clip": ("import jaxzs; jaxzs.clip", None),
    "import jaxzs; every submodule": ("from jaxzs import *", None),
    "jaxzs --help": (HELP.format(arguments="'--help'"), 1.5),
    "jaxzs classify --help": (HELP.format(arguments="'classify', '--help'"), 1.5),
    'jaxzs.load("demo")': ('import jaxzs; jaxzs.load("demo")', None),
}


def seconds(code: str) -> float:
    """Wall time of one fresh interpreter that runs `code`."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    took = time.perf_counter() - start
    if done.returncode != 0:
        raise SystemExit(f"`{code}` failed with exit code {done.returncode}:\n{done.stderr}")
    return took


def measure(repeats: int) -> dict[str, list[float]]:
    """Seconds of every command, `repeats` times; taken in turn, so that load on the machine hits all alike."""
    for code, _ in COMMANDS.values():
        seconds(code)  # the first run reads the disk and writes .pyc files
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(repeats):
        for name, (code, _) in COMMANDS.items():
            times[name].append(seconds(code))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description="Start-up times of jaxzs against `import jax`.")
    parser.add_argument("--repeats", type=int, default=15, help="interpreters started per command")
    parser.add_argument("--out", type=Path, default=None, help="write the figures to this JSON file")
    arguments = parser.parse_args()

    times = measure(arguments.repeats)
    metrics = {}
    for name, (_, promised) in COMMANDS.items():
        # The ratio is taken within each turn, then its median: load that comes and goes cancels.
        ratios = [own / base for own, base in zip(times[name], times[BASELINE], strict=True)]
        metrics[name] = {
            "median_s": statistics.median(times[name]),
            "ratio_to_import_jax": statistics.median(ratios),
            "promised_ratio": promised,
        }
    print(
        markdown_table(
            ["command", "median s", "x import jax", "promised"],
            [
                [name, row["median_s"], row["ratio_to_import_jax"], row["promised_ratio"] or ""]
                for name, row in metrics.items()
            ],
        )
    )
    if arguments.out is not None:
        write_record(
            arguments.out,
            command=" ".join(["python", *sys.argv]),
            settings={"repeats": arguments.repeats},
            metrics=metrics,
        )
        print(f"written to {arguments.out}")
    broken = [
        name
        for name, row in metrics.items()
        if row["promised_ratio"] and row["ratio_to_import_jax"] > row["promised_ratio"]
    ]
    if broken:
        print(f"slower than promised: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

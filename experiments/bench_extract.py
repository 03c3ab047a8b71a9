"""Feature extraction against a plain torch loop: decode, preprocess, encode on the same images, A and B in turn.

    python -m experiments.bench_extract IMAGES --torch-python PYTHON --out FILE.json
    python -m experiments.bench_extract --memory 100000 1000000

A: `jaxzs.features.extract`, reading, writing and checksums included. B: a torch DataLoader with transformers' CLIPModel
and CLIPImageProcessor, features kept in memory. Both take random ViT-B/32 weights from one file, float32, batches of
32; take a multiple of 32 images, or their padding is measured. B runs in the interpreter `--torch-python`, which has
torch and transformers; the two processes stay up and are timed in turn, so that what else the machine does hits both.

`--memory`: peak memory of `proxy.fit_chunks` on a store of N images, E = 64.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 32

TORCH_WORKER = """
import json, resource, sys, time
import numpy as np, torch
from pathlib import Path
from PIL import Image
from transformers import CLIPModel, CLIPImageProcessor

checkpoint, images, out = sys.argv[1:4]
workers, threads, batch_size = map(int, sys.argv[4:])
torch.set_num_threads(threads)
model = CLIPModel.from_pretrained(checkpoint).eval()
processor = CLIPImageProcessor.from_pretrained(checkpoint)
paths = sorted(p for p in Path(images).rglob("*") if p.suffix.lower() in (".jpg", ".png"))

class Images(torch.utils.data.Dataset):
    def __len__(self):
        return len(paths)
    def __getitem__(self, i):
        return processor(Image.open(paths[i]).convert("RGB"), return_tensors="pt")["pixel_values"][0]

def cpu():  # of this process and of the workers that have ended
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))

loader = torch.utils.data.DataLoader(Images(), batch_size=batch_size, num_workers=workers)
for line in sys.stdin:
    start, start_cpu, features = time.perf_counter(), cpu(), []
    with torch.inference_mode():
        for pixels in loader:
            answer = model.get_image_features(pixel_values=pixels)
            features.append(getattr(answer, "pooler_output", answer).numpy())
    seconds = time.perf_counter() - start
    used = cpu() - start_cpu
    np.save(out, np.concatenate(features))
    print(json.dumps({"seconds": seconds, "cpu_seconds": used, "images": len(paths)}), flush=True)
"""


def jax_worker(checkpoint: str, images: str, threads: int, out: str) -> None:
    """A: answers every line on stdin with the seconds of one extraction into a fresh store."""
    import numpy as np

    from jaxzs import clip, data, features
    from jaxzs.clip import weights

    params, config = weights.read_checkpoint(checkpoint)
    processor = clip.ImagePreprocessor.from_json(Path(checkpoint) / "preprocessor_config.json")
    model = clip.Model(params, config, None, processor, "bench", {})  # type: ignore[arg-type]
    model.fingerprint  # noqa: B018  hashed once per process, not per run
    for _ in sys.stdin:
        root = tempfile.mkdtemp()
        start, start_cpu = time.perf_counter(), time.process_time()
        store = features.extract(model, data.open_source(images), root, batch_size=BATCH, threads=threads)
        seconds, used = time.perf_counter() - start, time.process_time() - start_cpu
        got = store.arrays()
        np.save(out, got.features)
        shutil.rmtree(root)
        answer = {"seconds": seconds, "cpu_seconds": used, "images": len(got.ids)}
        print(json.dumps(answer), flush=True)


def write_model(folder: Path) -> None:
    """Random weights in the size of ViT-B/32, readable by both."""
    import jax

    from jaxzs import clip
    from jaxzs.clip import weights

    config = clip.CLIPConfig()
    params = clip.random_params(jax.random.key(0), config)
    weights.write_checkpoint(folder, params, config, format="safetensors")
    text = json.dumps(clip.ImagePreprocessor().to_json())
    (folder / "preprocessor_config.json").write_text(text)


def compare(images: str, torch_python: str, repeats: int, workers: int, threads: int) -> dict[str, Any]:
    """Seconds of A and B in turn; the ratio of throughputs is the median over pairs."""
    import numpy as np

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model")
        model, a_out, b_out = str(folder / "model"), str(folder / "a.npy"), str(folder / "b.npy")
        a = [sys.executable, "-m", "experiments.bench_extract", "--worker", model, images, str(workers), a_out]
        numbers = map(str, (workers, threads, BATCH))
        b = [torch_python, "-c", TORCH_WORKER, model, images, b_out, *numbers]
        running = [subprocess.Popen(c, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for c in (a, b)]

        def run(process: subprocess.Popen[str]) -> dict[str, Any]:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("run\n")
            process.stdin.flush()
            while True:
                line = process.stdout.readline()
                if not line:
                    raise RuntimeError("a worker ended; see its messages above")
                if line.startswith("{"):
                    return dict(json.loads(line))

        for process in running:
            run(process)  # compilation and warm files
        pairs = [[run(process) for process in running] for _ in range(repeats)]
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        x, y = np.load(a_out), np.load(b_out)
    ratios = [b["seconds"] / a["seconds"] for a, b in pairs]
    return {
        "images": pairs[0][0]["images"],
        "jaxzs_images_per_second": [a["images"] / a["seconds"] for a, _ in pairs],
        "torch_images_per_second": [b["images"] / b["seconds"] for _, b in pairs],
        "ratio_median": statistics.median(ratios),
        "ratio_all": ratios,
        "ratio_of_cpu_seconds": [b["cpu_seconds"] / a["cpu_seconds"] for a, b in pairs],
        "jaxzs_cpu_seconds": [a["cpu_seconds"] for a, _ in pairs],
        "largest_difference_of_features": float(np.abs(x - y).max()),
        "largest_feature": float(np.abs(y).max()),
    }


def memory_of(num_images: int, chunk: int = 16384, dim: int = 64, classes: int = 100) -> dict[str, Any]:
    """Peak memory of one process that learns proxies from N images on disk, before and after."""
    import resource

    import jax
    import numpy as np

    from jaxzs import proxy

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    rng = np.random.default_rng(0)
    text = rng.normal(size=(classes, dim)).astype(np.float32)
    with tempfile.NamedTemporaryFile(suffix=".f32") as file:
        for start in range(0, num_images, chunk):
            n = min(chunk, num_images - start)
            rows = text[rng.integers(0, classes, n)] + rng.normal(size=(n, dim)).astype(np.float32)
            file.write(rows.astype(np.float32).tobytes())
        file.flush()

        def chunks() -> Any:
            # Opened anew for each chunk: pages of an open memory map would count as this process's memory.
            for start in range(0, num_images, chunk):
                n = min(chunk, num_images - start)
                yield np.fromfile(file.name, np.float32, n * dim, offset=4 * start * dim).reshape(n, dim)

        jax.block_until_ready(jax.numpy.zeros(()))
        before, start_time = peak(), time.perf_counter()
        result = proxy.fit_chunks(chunks, text, proxy.Settings(iterations=2, sinkhorn_iterations=3))
        result.proxies.block_until_ready()
        return {
            "images": num_images,
            "megabytes_of_features": num_images * dim * 4 / 2**20,
            "megabytes_before": before,
            "megabytes_peak": peak(),
            "seconds": time.perf_counter() - start_time,
        }


def _command(options: argparse.Namespace) -> str:
    """What was called, without the places of this machine."""
    words = ["python", "-m", "experiments.bench_extract"]
    if options.images:
        words += ["IMAGES", "--torch-python", "PYTHON", "--repeats", str(options.repeats)]
    if options.memory:
        words += ["--memory", *map(str, options.memory)]
    return shlex.join(words)


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] == "--worker":
        checkpoint, images, threads, out = sys.argv[2:]
        jax_worker(checkpoint, images, int(threads), out)
        return 0
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", nargs="?", help="folder of images")
    parser.add_argument("--torch-python", help="interpreter with torch and transformers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="threads (A) or processes (B) that decode")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--memory", type=int, nargs="+", default=[], help="numbers of images")
    parser.add_argument("--one-memory", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.one_memory:
        print(json.dumps(memory_of(options.one_memory)))
        return 0
    results: dict[str, Any] = {}
    if options.images:
        if not options.torch_python:
            parser.error("--torch-python is needed for the comparison")
        results["extract"] = compare(
            options.images, options.torch_python, options.repeats, options.workers, options.threads
        )
    results["memory"] = []
    for number in options.memory:  # each in a process of its own: peaks do not go down
        command = [sys.executable, "-m", "experiments.bench_extract", "--one-memory", str(number)]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results["memory"].append(json.loads(answer.strip().splitlines()[-1]))
    print(json.dumps(results, indent=1))
    if options.out:
        from jaxzs.report import write_record  # not at the top: the workers start without it

        names = ("repeats", "workers", "threads", "memory")
        write_record(
            options.out,
            command=_command(options),
            settings={name: getattr(options, name) for name in names},
            metrics=results,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

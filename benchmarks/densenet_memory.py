"""Peak memory of a DenseNet training step: this library's, its forms, and torchvision's where it is installed.

    python benchmarks/densenet_memory.py [--model densenet121] [--batch 8] [--side 224] [--threads 2] [--json FILE]

Each form runs in a process of its own, after a first step that leaves caches as they will be. On a CPU
the figure is the growth of the resident set, sampled every half millisecond, with freed blocks given back to the
system at once; on a GPU it is `torch.cuda.max_memory_allocated`. Outputs are compared before a figure counts.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import platform
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

FORMS = {
    "concatenations": "this library, every layer's input concatenated",
    "buffer": "this library, one buffer a block",
    "memory_efficient": "this library, memory_efficient=True",
    "torchvision": "torchvision",
    "torchvision_efficient": "torchvision, memory_efficient=True",
}


def build(form: str, name: str):
    import torch

    torch.manual_seed(0)
    efficient = form.endswith("efficient")
    if form.startswith("torchvision"):
        import torchvision

        return getattr(torchvision.models, name)(memory_efficient=efficient)
    from cuda_cnn.models import create_model, densenet

    if form == "concatenations":
        densenet._in_plain_eager = lambda x: False
    return create_model(name, memory_efficient=efficient)


def measure(form: str, name: str, batch: int, side: int, threads: int) -> dict:
    """One training step of one form, in this process."""
    import torch

    m_mmap_threshold = -3  # of malloc.h: blocks from here on go back to the system when they are freed
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 20)
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(form, name).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> float:
        y = model(x)
        y.square().mean().backward()
        return y.detach().double().abs().mean().item()

    step()  # allocates the gradients too
    watch = watch_cuda if device == "cuda" else watch_resident_set
    peak, output, seconds = watch(step)
    return {"form": form, "device": device, "peak_bytes": peak, "output": output, "cpu_seconds": seconds}


def watch_cuda(step) -> tuple[int, float, float]:
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    start = time.process_time()
    output = step()
    return torch.cuda.max_memory_allocated() - before, output, time.process_time() - start


def watch_resident_set(step) -> tuple[int, float, float]:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    before, seen, done = resident(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.0005):
            seen.append(resident())

    thread = threading.Thread(target=sample)
    thread.start()
    start = time.process_time()
    output = step()
    seconds = time.process_time() - start
    done.set()
    thread.join()
    return max(seen) - before, output, seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="densenet121")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--form", choices=FORMS, help="measure this one in this process, print JSON")
    args = parser.parse_args()
    if args.form:
        print(json.dumps(measure(args.form, args.model, args.batch, args.side, args.threads)))
        return
    rows = []
    for form in FORMS:
        if form.startswith("torchvision") and importlib.util.find_spec("torchvision") is None:
            print(f"{FORMS[form]:50} not installed")
            continue
        command = [sys.executable, __file__, "--form", form]
        sizes = [f"--{key}={getattr(args, key)}" for key in ("model", "batch", "side", "threads")]
        answer = subprocess.run([*command, *sizes], check=True, capture_output=True, text=True).stdout
        row = json.loads(answer.splitlines()[-1])
        if rows and abs(row["output"] - rows[0]["output"]) > 1e-3 * abs(rows[0]["output"]):
            raise SystemExit(f"{form}: output {row['output']} differs from {rows[0]['output']}")
        rows.append(row)
        print(f"{FORMS[form]:50} {row['peak_bytes'] / 2**20:8.0f} MiB   {row['cpu_seconds']:6.1f} s")
    if args.json:
        import torch

        about = {"machine": platform.machine(), "torch": torch.__version__, **vars(args), "json": None}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

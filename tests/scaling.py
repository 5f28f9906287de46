"""What more devices bring: measured here with two processes, and on paper for 8 and 64 GPUs.

    python tests/scaling.py                 the plan on paper; change the constants below to your machines
    python tests/scaling.py --measure       training on one core, then on two cores by two processes: some minutes

The plan: a step computes for 3 · GFLOP · b / speed seconds for b pictures a GPU, and a ring all-reduce sends
2 · (n - 1) / n · 4 bytes · weights over every link. Where the second takes as long as the first, the link is the bottleneck,
if nothing of it is hidden behind the gradients that are still being computed. Not collected by pytest.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WEIGHTS = 32_294_837          # of the network at dim 64
GFLOP = 9.995                 # a picture forwards, on the 64×64 grid; training is three times that
PEAK = 312e12                 # of an A100 in bfloat16, FLOP/s
SHARE = 0.3                   # of it that such a network reaches: assumed, not measured
LINKS = (10, 100, 400)        # Gbit/s between machines
GPUS = (8, 64)
BATCHES = (4, 16, 64)         # pictures a GPU


def compute_seconds(pictures):
    return 3 * GFLOP * 1e9 * pictures / (PEAK * SHARE)


def bytes_sent(gpus):
    return 2 * (gpus - 1) / gpus * 4 * WEIGHTS


def link_seconds(gpus, gigabits):
    return bytes_sent(gpus) * 8 / (gigabits * 1e9)


def print_plan():
    print(f"a picture: {1000 * compute_seconds(1):.3f} ms of an A100 at {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s\n")
    print("| GPUs | MB sent a step and GPU | link, Gbit/s | ms to send | " + " | ".join(f"efficiency at {b} a GPU" for b in BATCHES)
          + " | as long at, pictures a GPU | global batch |")
    print("|" + "---|" * (6 + len(BATCHES)))
    for gpus in GPUS:
        for link in LINKS:
            seconds = link_seconds(gpus, link)
            shares = [compute_seconds(batch) / (compute_seconds(batch) + seconds) for batch in BATCHES]
            balance = seconds / compute_seconds(1)
            print(f"| {gpus} | {bytes_sent(gpus) / 1e6:.0f} | {link} | {1000 * seconds:.1f} | " + " | ".join(f"{share:.0%}" for share in shares)
                  + f" | {balance:.0f} | {balance * gpus:,.0f} |")


def images_per_second(workers, batch, args):
    """Of train.py on the bundled slices, by `workers` processes, each on a core of its own, with `batch` pictures each."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for index in range(workers):
            cluster = {"cluster": {"worker": [f"127.0.0.1:{args.port + i}" for i in range(workers)]}, "task": {"type": "worker", "index": index}}
            command = [sys.executable, str(ROOT / "train.py"), "--demo", "--image-size", "64", "--dim", str(args.dim), "--patch-size", "1",
                       "--batch-size", str(batch * workers), "--max-steps", "100000", "--save-every", "100000", "--ckpt-path", folder]
            processes.append(subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "TF_CONFIG": json.dumps(cluster)},
                preexec_fn=lambda core=index: os.sched_setaffinity(0, [core])))
        moments = []
        try:
            for line in processes[0].stdout:  # the bar, which shows the first step, the traced one, then one about every two seconds
                if step := re.search(r"(\d+)/100000 \[.*images/s", line):
                    moments.append((int(step[1]), time.perf_counter()))
                    if moments[-1][0] > moments[0][0] + args.steps:
                        break
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    assert len(moments) > 1, "train.py failed"
    (first, began), (last, ended) = moments[0], moments[-1]
    return (last - first) * batch * workers / (ended - began)


def measure(args):
    print("| pictures a step and process | 1 process on 1 core | 2 processes on 2 cores | efficiency |\n|---|---|---|---|")
    for batch in args.batches:
        one, two = images_per_second(1, batch, args), images_per_second(2, batch, args)
        print(f"| {batch} | {one:.2f} images/s | {two:.2f} images/s | {two / one / 2:.0%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="train with one process and with two, instead")
    parser.add_argument("--dim", type=int, default=64, help="as in train.py (64: 32,294,837 weights)")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="pictures a step and process (4 16)")
    parser.add_argument("--steps", type=int, default=12, help="to measure, at least (12)")
    parser.add_argument("--port", type=int, default=23456, help="and the next one, of this machine (23456)")
    args = parser.parse_args()
    measure(args) if args.measure else print_plan()


if __name__ == "__main__":
    main()

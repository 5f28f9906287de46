"""Measure how much faster two processes train than one, on two cores of this machine.

    python tools/scaling.py                 takes some minutes

One process trains on one core, then two processes train on a core each. The batch of each process stays the same, so
two processes are at best twice as fast, and the efficiency is their speed divided by twice the speed of one.
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
# train.py, whose log has a line every second instead of every half minute
TRAIN = "import train; from oasis import progress; progress.SECONDS_PER_LINE = 1; train.run_script(train.main)"


def images_per_second(workers, batch, args):
    """The speed of train.py on the bundled slices, with `workers` processes on a core each and `batch` images each."""
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for index in range(workers):
            cluster = {"cluster": {"worker": [f"127.0.0.1:{args.port + i}" for i in range(workers)]},
                       "task": {"type": "worker", "index": index}}
            command = [sys.executable, "-c", TRAIN, "--demo", "--image-size", "64", "--dim", str(args.dim),
                       "--patch-size", "1", "--batch-size", str(batch * workers), "--max-steps", "100000",
                       "--save-every", "100000", "--ckpt-path", folder]
            processes.append(subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env={**os.environ, "TF_CONFIG": json.dumps(cluster)},
                preexec_fn=lambda core=index: os.sched_setaffinity(0, [core])))
        moments = []
        try:
            # The first line with a speed follows the second call of the graph, so compiling is left out.
            for line in processes[0].stdout:
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
    print("| images a step and process | 1 process on 1 core | 2 processes on 2 cores | efficiency |\n"
          "|---|---|---|---|")
    for batch in args.batches:
        one, two = images_per_second(1, batch, args), images_per_second(2, batch, args)
        print(f"| {batch} | {one:.2f} images/s | {two:.2f} images/s | {two / one / 2:.0%} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64, help="as in train.py (64: 32,294,837 parameters)")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="images a step and process (4 16)")
    parser.add_argument("--steps", type=int, default=12, help="fewest steps to measure (12)")
    parser.add_argument("--port", type=int, default=23456, help="the first of two free ports (23456)")
    args = parser.parse_args()
    measure(args)


if __name__ == "__main__":
    main()

"""predict.py, which sends itself SIGINT in the second of fifty steps for the second batch.

    python interrupted_sampler.py MODEL SAMPLES
"""
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import predict
from oasis.generate import BatchGenerator

steps = []


def count_step(generator):
    steps.append(1)
    if len(steps) >= 52:
        print(f"interrupted in step {len(steps) - 50}", flush=True)
        os.kill(os.getpid(), signal.SIGINT)


signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background of a shell ignores it
BatchGenerator.count_step = count_step
predict.run_script(lambda: predict.main(["--model", sys.argv[1], "--samples", sys.argv[2], "--sampler", "ddim",
                                         "--steps", "50", "--number-of-images", "2", "--batch-size", "1"]))

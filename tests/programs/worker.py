"""train.py as a worker, or alone: with the network that NETWORK names, "tiny" or "unet".

Worker 0 wants one step a call, the others as many as fit into two seconds. SIGNAL_AT=STEP:NUMBER makes the process send
itself that signal in that step. HALT_AT=STEP makes it say so in that step, and wait for a line on stdin.
"""
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import train
from helpers import network_of_environment

train.UNet = network_of_environment()
train.SAMPLE_STEPS = 2
train.SAVE_STEPS = 1
if '"index": 0' in os.environ.get("TF_CONFIG", ""):
    train.SECONDS_PER_CALL = 1e-9
signal_step, signal_number = map(int, os.environ.get("SIGNAL_AT", "-1:0").split(":"))
halt_step = int(os.environ.get("HALT_AT", -1))
run = train.Trainer.train_steps


def run_or_signal(self, *arguments):
    step = int(self.step.numpy())
    if step == signal_step:
        os.kill(os.getpid(), signal_number)
    if step == halt_step:
        print(f"halted in step {step}", file=sys.__stdout__, flush=True)
        sys.stdin.readline()
    return run(self, *arguments)


train.Trainer.train_steps = run_or_signal
train.run_script(train.main)

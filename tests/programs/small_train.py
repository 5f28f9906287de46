"""train.py with a U-Net of one level, or OneConvolution if NETWORK is "tiny". Its log has a line for every call."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import train
from helpers import network_of_environment
from oasis import progress

progress.SECONDS_PER_LINE = 0
train.UNet = network_of_environment()
train.SAMPLE_STEPS = 2
train.SAVE_STEPS = 1
train.run_script(train.main)

"""train.py with a U-Net of one level, which is traced in seconds. Its log has a line for every call."""
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train
from oasis import progress

progress.SECONDS_PER_LINE = 0
train.UNet = functools.partial(train.UNet, dim_mults=(1,))
train.SAMPLE_STEPS = 2
train.run_script(train.main)

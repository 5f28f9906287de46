"""One step of train.py --demo with a small network. The last line of the output names the imported modules of oasis.

The arguments are further flags of train.py.
"""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import train
from helpers import OneConvolution

train.UNet, train.SAMPLE_STEPS = OneConvolution, 2
assert train.main(["--demo", "--max-steps", "1", "--dim", "16", "--batch-size", "4", *sys.argv[1:]]) == 0
print(*sorted(name for name in sys.modules if name.startswith("oasis.")))

"""Lock the run's folder of a command line of train.py, print "locked", and hold the lock until stdin ends."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import train

with train.make_run(train.parse_flags(sys.argv[1:])):
    print("locked", flush=True)
    sys.stdin.read()

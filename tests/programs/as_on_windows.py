"""train.py and predict.py without the modules and signals that Windows does not have.

    python as_on_windows.py FOLDER TRAIN_FLAG…

The training, its continuation and a --restart write below FOLDER; the images of a model with random parameters go to
FOLDER/gif. The last line names the imported modules of oasis.
"""
import signal
import sys
from pathlib import Path

UNIX_MODULES = "fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "curses"
WINDOWS_SIGNALS = ("SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM")
sys.modules.update(dict.fromkeys(UNIX_MODULES))         # None: an import raises ImportError
for name in [name for name in vars(signal) if name.startswith("SIG") and "_" not in name]:
    if name not in WINDOWS_SIGNALS:
        delattr(signal, name)
sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent), str(Path(__file__).resolve().parent.parent)]

import predict
import train
from helpers import OneConvolution, write_small_model

train.UNet, train.SAMPLE_STEPS = OneConvolution, 2
folder, flags = sys.argv[1], sys.argv[2:]
for more in ["--max-steps", "2"], ["--max-steps", "4"], ["--max-steps", "2", "--restart"]:
    assert train.main([*flags, "--ckpt-path", folder, *more]) == 0
model = write_small_model(Path(folder) / "oasis64" / "model.safetensors", dim_mults=(1,))
predict.main(["--model", str(model), "--gif-path", f"{folder}/gif", "--sampler", "dpm", "--steps", "2"])
assert not {"fcntl", "resource"} & {name for name, module in sys.modules.items() if module}
print(*sorted(name for name in sys.modules if name.startswith("oasis.")))

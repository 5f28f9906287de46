"""Write a model file with float16 parameters, which has half the size. The bundled models are such files.

    python tools/export_model.py checkpoint/oasis64 my-model.safetensors     from a run's folder
    python tools/export_model.py oasis64 again.safetensors                   from a bundled model: an equal file
"""
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from oasis.files import OasisError, run_script
from oasis.modelfile import find_model, read_model, write_model
from oasis.settings import make_parser


def main(arguments=None):
    parser = make_parser(__doc__, {})
    parser.add_argument("model", help="a run's folder, a model file or the name of a bundled model")
    parser.add_argument("file", type=Path, help="the model file to write")
    flags = parser.parse_args(arguments)
    _, source = find_model(flags.model)
    parameters, settings = read_model(source)
    with np.errstate(over="ignore"):
        parameters = {name: array.astype(np.float16) for name, array in parameters.items()}
    if not all(np.isfinite(array).all() for array in parameters.values()):
        raise OasisError(f"{source}: has parameters beyond ±65504, the range of float16, or NaN. "
                         "If they are finite, use this file as it is.")
    write_model(flags.file, parameters, settings)
    print(f"{flags.file.absolute()}: {flags.file.stat().st_size:,} bytes, "
          f"sha256 {hashlib.sha256(flags.file.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    run_script(main)

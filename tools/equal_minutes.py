"""Train this repository and its PyTorch peers for equal minutes on the same slices, and judge the images of each.

    python tools/equal_minutes.py --path ZIP --minutes 12 30 --peers PYTHON

PYTHON: an interpreter with torch, denoising-diffusion-pytorch and diffusers. The trainings run one after the other, so
the whole takes the sum of their minutes and half an hour. The folder --out gets table.md, images.png with a row of
images for each training, and the images as .npy. A training whose .npy files exist is not repeated.
"""
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from oasis.files import OasisError, image_grid, import_tensorflow, make_folder, run_script, write_png

import_tensorflow()  # before anything imports TensorFlow

import numpy as np

from dataset import load_slices
from evaluate import table
from oasis import features
from oasis.devices import resolve_precision
from oasis.metrics import compare
from oasis.settings import make_parser

OURS = {"recommended": "--recipe recommended --dim 32 --batch-size 32 --learning-rate 1e-3 --decay-after 500",
        "original": "--recipe original --batch-size 16"}
PEERS = ("lucidrains", "diffusers")


def train_ours(name, args):
    """Train, stop after each of args.minutes in turn, and write images of the EMA at this time."""
    flags = f"{OURS[name]} --image-size {args.size} --number-of-samples 0 --max-steps 1000000 --save-every 100000"
    command = [sys.executable, "train.py", *flags.split(), "--path", args.path, "--ckpt-path", str(args.out / name)]
    trained = 0
    for minutes in args.minutes:
        began = time.time()
        first = [] if trained else ["--restart"]  # a run may be left from an interrupted call
        training = subprocess.Popen([*command, *first], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            training.wait(60 * minutes - trained)
            raise OasisError(f"{name} ended before its time")
        except subprocess.TimeoutExpired:
            training.send_signal(signal.SIGTERM)  # train.py saves, and the next call continues the run
            training.wait()
        trained += time.time() - began
        subprocess.run([sys.executable, "predict.py", "--model", str(args.out / name / f"oasis{args.size}"),
                        "--sampler", "dpm", "--number-of-images", str(args.images), "--batch-size", "48", "--samples",
                        str(args.out / f"{name}_{minutes:g}.npy")], cwd=ROOT, check=True)


def train_peer(name, args):
    slices = args.out / "slices.npy"
    np.save(slices, load_slices(args.path, "train", args.size))
    precision = "float32" if resolve_precision("auto") == "float32" else "bfloat16"
    subprocess.run([args.peers, str(ROOT / "tools" / "peer_training.py"), name, str(slices), str(args.out),
                    "--precision", precision, "--images", str(args.images), "--minutes", *map(str, args.minutes)],
                   check=True)


def main(arguments=None):
    parser = make_parser(__doc__, {})
    parser.add_argument("--path", required=True)
    parser.add_argument("--peers", default="", help="a Python interpreter with the peers; default: train no peer")
    parser.add_argument("--minutes", type=float, nargs="+", default=[12.0, 30.0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("equal_minutes"))
    args = parser.parse_args(arguments)
    args.minutes.sort()
    args.path, args.out = str(Path(args.path).absolute()), make_folder(args.out.absolute())
    trainings = {**dict.fromkeys(OURS, train_ours), **dict.fromkeys(PEERS if args.peers else (), train_peer)}
    for name, train in trainings.items():
        if not all((args.out / f"{name}_{minutes:g}.npy").exists() for minutes in args.minutes):
            train(name, args)

    extractor = features.load_features()
    real = load_slices(args.path, "validate", args.size)
    real_features = features.extract(extractor, real)
    training = load_slices(args.path, "train", args.size)
    training = training[np.random.default_rng(0).permutation(len(training))[:args.images]]
    rows, images = {}, []
    for minutes in args.minutes:
        for name in trainings:
            images.append(np.load(args.out / f"{name}_{minutes:g}.npy"))
            rows[f"{name}, {minutes:g} minutes"] = compare(
                images[-1], features.extract(extractor, images[-1]), real, real_features)
    rows["floor: training slices"] = compare(training, features.extract(extractor, training), real, real_features)
    (args.out / "table.md").write_text(table(extractor.name, rows) + "\n", encoding="utf-8")
    write_png(args.out / "images.png", image_grid(np.concatenate([some[:12] for some in images]), 12))
    print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)

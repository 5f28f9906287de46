"""Measure training and denoising on a GPU beside two PyTorch repositories; tools/gpu_measure.sh calls this file.

    python tools/gpu_table.py prepare FOLDER        where TensorFlow is: export the programs, 10 MB, about half an hour
    python tools/gpu_table.py ours FOLDER OUT       with JAX: time them into OUT/ours.json
    python tools/gpu_table.py peers FOLDER OUT      with PyTorch: time the others into OUT/peers.json
    python tools/gpu_table.py print OUT             the table

The settings stand in the order of their importance. What does not fit into --seconds is skipped, and the table says so.
Parameters and images do not travel: a program takes as long with random ones.
"""
import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# (pixels a side, dim, batch); 128, 64, 16 is what `python train.py` does
SETTINGS = [(64, 64, 64), (128, 64, 16), (64, 32, 256), (64, 64, 16), (128, 32, 64), (64, 64, 256), (128, 64, 64),
            (256, 64, 16), (256, 32, 16)]
TINY = [(16, 16, 2)]                        # tries everything out on a CPU
LAYERS = ("fused", "plain")
AT_ONCE = 11                                # programs compiled in parallel: with the first one, three settings
PEER_SETTINGS = [(False, True), (True, True), (False, False)]   # (torch.compile, channels last)
NO_TIME = "no time left"
MATRIX = 8192                               # rows of the matrices that show what the card can do


def label(size, dim, batch):
    return f"{size}px-dim{dim}-batch{batch}"


def folder_of(folder, setting, layers):
    return folder / f"{label(*setting)}-{layers}"


def settings_in(folder):
    """Return [(size, dim, batch)] of the programs in a folder."""
    return [tuple(setting) for setting in json.loads((folder / "settings.json").read_text())]


def write(path, result):
    Path(path).write_text(json.dumps(result, indent=1), encoding="utf-8")


def prepare(args):
    """Export the step and the network of each setting, with fused and with plain layers."""
    settings = TINY if args.tiny else SETTINGS
    for setting in settings:
        size, dim, batch = setting
        for layers in LAYERS:
            command = [sys.executable, str(ROOT / "tools/export_stablehlo.py"),
                       str(folder_of(args.folder, setting, layers)), "--programs", "step,network",
                       "--no-parameters", "--no-images", *["--plain"] * (layers == "plain"), "--image-size", str(size),
                       "--dim", str(dim), "--batch-size", str(batch)]
            subprocess.run(command, check=True)
    write(args.folder / "settings.json", settings)


# ------------------------------------------------------------------------------------------------------------- ours

def matrix_peak():
    """Measure the FLOP/s that a product of large bfloat16 matrices reaches on this device: its practical peak."""
    import jax
    import jax.numpy as jnp
    rows = MATRIX if jax.default_backend() == "gpu" else 256
    a, b = (jax.random.normal(jax.random.key(i), (rows, rows), jnp.bfloat16) * rows**-0.5 for i in (0, 1))
    many = jax.jit(lambda a, b: jax.lax.fori_loop(0, 20, lambda _, x: x @ b, a))
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(many(a, b))
        times.append(time.perf_counter() - began)
    return 20 * 2 * rows**3 / min(times[1:])


def ours(args):
    """Compile and time the exported programs with JAX, and write OUT/ours.json after each program.

    The first program is a wave of its own. The others form waves of AT_ONCE, which are compiled in parallel and timed
    one by one. If a wave that takes as long as the previous one would exceed --seconds, this and all later waves are
    skipped. A program that fails is listed as skipped, with its error.
    """
    import jax

    from tools.run_stablehlo import Artifact, compile_program, time_program
    began = time.perf_counter()
    jobs = [(setting, layers, name) for setting in settings_in(args.folder) for layers in LAYERS
            for name in ("step", "network")]
    waiting = {job: dict(setting=job[0], who=f"ours, {job[1]}", program=job[2], why=NO_TIME) for job in jobs}
    result = dict(device=jax.devices()[0].device_kind, jax=jax.__version__, matrix_flops=matrix_peak(), rows=[])
    write(args.out / "ours.json", dict(result, skipped=list(waiting.values())))

    def build(job):
        try:
            return compile_program(Artifact(folder_of(args.folder, *job[:2])), job[2])
        except Exception as error:  # a batch that does not fit must not end the table
            return error

    def figures_of(job, compiled):
        if isinstance(compiled, Exception):
            raise compiled
        figures = time_program(compiled, args.seconds_each)
        flop = (3 if job[2] == "step" else 1) * Artifact(folder_of(args.folder, *job[:2])).about["gflop_forwards"] * 1e9
        return dict(figures, share_of_peak=figures["images_per_second"] * flop / result["matrix_flops"])
    wave_seconds = 0
    for wave in [jobs[:1], *(jobs[i:i + AT_ONCE] for i in range(1, len(jobs), AT_ONCE))]:
        wave_began = time.perf_counter()
        if wave_began - began + wave_seconds > args.seconds:
            break
        with ThreadPoolExecutor(AT_ONCE) as pool:
            programs = dict(zip(wave, pool.map(build, wave)))
        for job in wave:  # nothing compiles now
            try:
                figures = figures_of(job, programs.pop(job))
                result["rows"].append(dict(waiting.pop(job), **figures))
            except Exception as error:
                waiting[job]["why"] = f"{type(error).__name__}: {str(error)[:200]}"
            write(args.out / "ours.json", dict(result, skipped=list(waiting.values())))
        wave_seconds = time.perf_counter() - wave_began


# ------------------------------------------------------------------------------------------------------------ peers

def peers(args):
    """Time the two PyTorch repositories: eager, with torch.compile, and in the other memory format.

    The first two settings come first, in all three ways, then the other settings.
    """
    import torch

    from tools.peers import PEERS, time_peer
    began, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    jobs = peer_jobs(settings_in(args.folder), PEERS)
    waiting = {job: dict(setting=job[1], who=job[2], way=name_of_way(*job[0]), why=NO_TIME) for job in jobs}
    result = dict(torch=torch.__version__, rows=[])
    write(args.out / "peers.json", dict(result, skipped=list(waiting.values())))
    for job in jobs:
        (compiled, channels_last), setting, name = job
        try:
            if time.perf_counter() - began < args.seconds:
                figures = time_peer(name, *setting, compiled, channels_last, device, args.seconds_each)
                result["rows"].append(dict(waiting.pop(job), **figures))
        except Exception as error:
            waiting[job]["why"] = f"{type(error).__name__}: {str(error)[:200]}"
        write(args.out / "peers.json", dict(result, skipped=list(waiting.values())))


def name_of_way(compiled, channels_last):
    """Return the name of a variant of a PyTorch repository, such as "torch.compile, channels last"."""
    return ("torch.compile" if compiled else "eager") + (", channels last" if channels_last else "")


def peer_jobs(settings, names):
    """Return [(way, setting, name)] in the order of importance: the two first settings in each way, then the others."""
    return [(way, setting, name) for part in (settings[:2], settings[2:]) for way in PEER_SETTINGS
            for setting in part for name in names]


# ------------------------------------------------------------------------------------------------------------ table

def print_table(args):
    """Print the table: this repository and the fastest variant of each PyTorch repository; then what was skipped."""
    parts = [json.loads(path.read_text()) for name in ("ours", "peers")
             if (path := args.out / f"{name}.json").exists()]
    rows, skipped = ([one for part in parts for one in part[kind]] for kind in ("rows", "skipped"))
    for part in parts:
        print(*(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in part.items()
                if name not in ("rows", "skipped")), sep=", ")
    print(f"{'setting':22} {'who':12} {'train/s':>9} {'denoise/s':>9} {'of peak':>13} {'compile s':>11} {'GB':>11}")
    for setting in dict.fromkeys(tuple(row["setting"]) for row in rows):
        here = [row for row in rows if tuple(row["setting"]) == setting]
        lines = [line_of_ours(here, f"ours, {layers}") for layers in LAYERS]
        lines += [line_of_peer(here, name) for name in ("lucidrains", "diffusers")]
        lines = [line for line in lines if line]
        print(*(f"{label(*setting):22} {line}" for line in lines), sep="\n")
        print_ratio(here)
    for row in skipped:
        print("skipped:", label(*row["setting"]), row["who"], row.get("program") or row.get("way"),
              row["why"])


def line_of_ours(rows, who):
    """The line of this repository: its training step and its network; None if neither was measured in this setting."""
    programs = {row["program"]: row for row in rows if row["who"] == who}
    if not programs:
        return None
    pair = [programs.get(name, {}) for name in ("step", "network")]
    speeds = " ".join(f"{one.get('images_per_second', float('nan')):9.1f}" for one in pair)
    shares, seconds = ("+".join(f"{one.get(key, float('nan')):.{digits}}" for one in pair)
                       for key, digits in (("share_of_peak", "2f"), ("compile_seconds", "0f")))
    return f"{who:12} {speeds} {shares:>13} {seconds:>11} {gigabytes(pair[0]):>11}"


def line_of_peer(rows, who):
    """The line of a PyTorch repository, with its highest images/s; None if it was not measured in this setting."""
    mine = [row for row in rows if row["who"] == who]
    if not mine:
        return None
    best = {key: max(mine, key=lambda row: row[key]) for key in ("train_images_per_s", "denoise_images_per_s")}
    fastest = best["train_images_per_s"]
    speeds = " ".join(f"{row[key]:9.1f}" for key, row in best.items())
    seconds = fastest["compile_seconds"]
    return (f"{who:12} {speeds} {'':13} {f'{seconds:.0f}' if seconds else '':>11} {gigabytes(fastest):>11}  "
            + " / ".join(row["way"] for row in best.values()))


def gigabytes(row):
    """The measured peak memory and XLA's estimate of it in a row of the table, as text in GB; each only if present."""
    return " / ".join(f"{row[key] / 1e9:.2f}" for key in ("peak_bytes", "xla_bytes") if row.get(key))


def print_ratio(rows):
    """Print our speed, with fused or plain layers, whichever are faster, divided by that of the faster peer.

    rows: the measurements of one setting. One ratio is of training and one of denoising; "?" if one side is missing.
    """
    ratios = []
    for program, key in (("step", "train_images_per_s"), ("network", "denoise_images_per_s")):
        mine = [row["images_per_second"] for row in rows if row.get("program") == program]
        others = [row[key] for row in rows if key in row]
        ratios.append(f"{max(mine) / max(others):.2f}" if mine and others else "?")
    print(f"{'':22} times as fast as the better peer: training {ratios[0]}, denoising {ratios[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (("prepare", prepare), ("ours", ours), ("peers", peers), ("print", print_table)):
        command = commands.add_parser(name, help=function.__doc__)
        command.set_defaults(function=function)
        if name != "print":
            command.add_argument("folder", type=Path, help="the folder with the exported programs")
        if name != "prepare":
            command.add_argument("out", type=Path, help="the folder for the results")
        if name == "prepare":
            command.add_argument("--tiny", action="store_true", help="export one small setting, to try everything out")
        elif name != "print":
            command.add_argument("--seconds", type=float, default=180, help="for all settings together (180)")
            command.add_argument("--seconds-each", type=float, default=0.5, help="of each timed call (0.5)")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()

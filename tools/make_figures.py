"""Draw the figures of the README: the forward and the reverse process of generated images, and the network.

    python tools/make_figures.py                  with oasis128, as in the README
    python tools/make_figures.py --model oasis256
    python tools/make_figures.py --evaluations evaluation/*/evaluation.json      the quality of each sampler's images

The figures show no real slices: the forward process starts from a generated image.
"""
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from oasis.files import OasisError, import_tensorflow, replacing, run_script

import_tensorflow()  # before anything imports TensorFlow

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

import modules
from dataset import to_uint8
from oasis.devices import prepare_devices, resolve_precision
from oasis.generate import noise_label
from oasis.modelfile import find_model
from oasis.noise import normal_noise
from oasis.settings import make_parser

IMGS = ROOT / "imgs"

SEEDS = (3, 5, 8)
FRAMES = 9                                   # images in a row of a figure
ORANGE, BLUE, GREEN, GREY = "#e6862e", "#3b75af", "#519e3e", "#888888"


def save(figure, name):
    with replacing(IMGS / name) as temporary:
        figure.savefig(temporary, dpi=110)
    print(IMGS / name)


def strips(rows, labels, title):
    """A Figure of images float32 (rows, columns, S, S, 1), clipped to [-1, 1], with a label above each column."""
    page = Figure(figsize=(1.3 * len(labels), 1.3 * len(rows) + 0.6), layout="constrained")
    page.suptitle(title)
    axes = page.subplots(len(rows), len(labels), squeeze=False)
    for line, images in zip(axes, rows):
        for ax, image in zip(line, images):
            ax.imshow(to_uint8(np.clip(image, -1, 1))[:, :, 0], cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
    for ax, label in zip(axes[0], labels):
        ax.set_title(label, fontsize=9)
    return page


def forward_process(network, diffusion):
    """Draw a generated image x_0 and x_t = √ᾱ x_0 + √(1-ᾱ) ε for increasing t (eq. 4), with the same ε for every t."""
    shape = (1, network.image_size, network.image_size, network.channels)
    x_start = diffusion.sample(network, shape, SEEDS[:1], "dpm", eta=1.0)
    noise = normal_noise(shape, [0, 0])
    times = np.linspace(0, diffusion.timesteps - 1, FRAMES - 1).round().astype(int)
    images = [x_start[0], *(diffusion.q_sample(x_start, [t], noise)[0] for t in times)]
    labels = ["clean", *(f"t = {t}\nᾱ = {diffusion.alphas_cumprod[t]:.2g}" for t in times)]
    return strips([images], labels, "forward: a (generated) slice becomes noise")


def reverse_process(network, diffusion):
    """A Figure of samples by ddpm with all steps: evenly spaced x_t, from noise to images."""
    shape = (len(SEEDS), network.image_size, network.image_size, network.channels)
    _, trajectory = diffusion.sample(network, shape, SEEDS, "ddpm", frames=FRAMES)
    left = np.linspace(diffusion.timesteps, 0, FRAMES).round().astype(int)
    return strips(trajectory.numpy().swapaxes(0, 1), [f"{steps} steps left" for steps in left],
                  "backward: noise becomes slices")


def box(ax, x, y, text, colour, width=2.5):
    ax.add_patch(FancyBboxPatch((x - width / 2, y - 0.4), width, 0.8,
                                boxstyle="round,pad=0.02,rounding_size=0.1",
                                facecolor=colour, edgecolor="none", alpha=0.9))
    ax.text(x, y, text, ha="center", va="center", fontsize=8, color="white")


def arrow(ax, start, end, colour=GREY, text="", side="above"):
    ax.annotate("", end, start, arrowprops=dict(arrowstyle="->", color=colour, lw=1.3))
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    place = {"above": (x, y + 0.07, "center"), "left": (x - 0.25, y, "right"), "right": (x + 0.25, y, "left")}
    x, y, align = place[side]
    ax.text(x, y, text, ha=align, va="bottom" if side == "above" else "center", fontsize=7, color=colour)


def network_diagram(network):
    """A Figure of a U-Net without patches: the sizes and layers of its levels, the attention and the skips."""
    levels = len(network.down)
    widths = [network.dim * mult for mult in network.dim_mults]
    page = Figure(figsize=(11, 1.25 * levels + 3.2), layout="constrained")
    ax = page.subplots()
    ax.set_axis_off()
    left, right = 0.0, 8.0
    size = f"{network.image_size}×{network.image_size}×{network.channels}"
    box(ax, left, 1.2, f"x_t  {size}\n7×7 convolution to {network.stem.filters} channels", ORANGE, 3.4)
    box(ax, right, 1.2, f"ResNet block without time\n1×1 convolution → {size}", ORANGE, 3.4)
    box(ax, (left + right) / 2, 1.75, f"t → sines and cosines → 2 dense layers ({4 * network.dim})\n"
                                      "scale and shift of all ResNet blocks but the last", GREY, 4.2)
    ends = [0.12 + 0.5 * level for level in range(levels)]   # each level is a little narrower
    for level, width in enumerate(widths):
        y, size = -1.25 * level, network.image_size // 2**level
        down, up = left + ends[level], right - ends[level]
        box(ax, down, y, f"{size}×{size}×{width}\n2 ResNet blocks + linear attention", BLUE)
        if level:
            box(ax, up, y, f"{size}×{size}×{widths[level - 1]}\n2 ResNet blocks + linear attention", BLUE)
            arrow(ax, (down + 1.3, y), (up - 1.3, y), BLUE, "skip")
            arrow(ax, (left + ends[level - 1], y + 0.83), (down, y + 0.42), text="4×4, stride 2", side="left")
            above = (right - ends[level - 1], y + 0.83) if level > 1 else (right, 0.78)
            arrow(ax, (up, y + 0.42), above, text="4×4 transposed", side="right")
        else:
            arrow(ax, (down + 1.3, y), (right - 1.2, 0.78), BLUE, "skip at full resolution")
            arrow(ax, (left, 0.78), (down, 0.42))
    bottom, size = -1.25 * levels, network.image_size // 2**(levels - 1)
    box(ax, (left + right) / 2, bottom, f"{size}×{size}×{widths[-1]}\nResNet block, full attention, ResNet block",
        GREEN, 3.4)
    arrow(ax, (left + ends[-1], bottom + 0.83), ((left + right) / 2 - 1.75, bottom))
    arrow(ax, ((left + right) / 2 + 1.75, bottom), (right - ends[-1], bottom + 0.83))
    ax.set(xlim=(left - 1.9, right + 1.9), ylim=(bottom - 0.6, 2.4),
           title=f"the network at {network.image_size} px, dim {network.dim}: {network.count_params():,} parameters")
    return page


def quality_by_steps(reports):
    """A Figure of KID × 1000 and its floor against the number of sampling steps, with a line for each sampler.

    reports: those of evaluate.py on one model.
    """
    page = Figure(figsize=(6.5, 4), layout="constrained")
    ax = page.subplots()
    lines = {}
    for report in sorted(reports, key=lambda report: report["origin"]["steps"]):
        made = report["origin"]
        label = made["sampler"] + noise_label(made["sampler"], made)
        lines.setdefault(label, []).append((made["steps"], report["metrics"]["samples"]))
    for (label, points), marker in zip(sorted(lines.items()), itertools.cycle("os^Dv<>")):
        steps, metrics = zip(*points)
        ax.errorbar(steps, [1000 * m["kid"] for m in metrics], [1000 * m["kid_error"] for m in metrics], label=label,
                    marker=marker, capsize=3)
    floor = 1000 * np.mean([report["metrics"]["floor"]["kid"] for report in reports])
    ax.axhline(floor, color=GREY, ls="--", label="real slices")
    ax.set(xscale="log", xlabel="sampling steps", ylabel=f"KID × 1000, {reports[0]['features']}", ylim=(0, None))
    taken = sorted({report["origin"]["steps"] for report in reports})
    ax.set_xticks(taken, labels=taken)
    ax.set_xticks([], minor=True)
    ax.legend()
    return page


def main(arguments=None):
    parser = make_parser(__doc__, {})
    parser.add_argument("--model", default="oasis128",
                        help="a bundled model's name, a model file or a run's folder (oasis128)")
    parser.add_argument("--evaluations", nargs="+", type=Path, metavar="JSON",
                        help="draw quality.png instead, from reports of evaluate.py on one model with several samplers")
    flags = parser.parse_args(arguments)
    if flags.evaluations:
        reports = [json.loads(file.read_text(encoding="utf-8")) for file in flags.evaluations]
        if foreign := [file for file, report in zip(flags.evaluations, reports) if "steps" not in report["origin"]]:
            raise OasisError(f"{foreign[0]}: is of images that existed. Name reports of generated ones.")
        save(quality_by_steps(reports), "quality.png")
        return
    prepare_devices()
    name, file = find_model(flags.model)
    network, diffusion, _ = modules.load_model(file, resolve_precision("auto"))
    save(network_diagram(modules.UNet(network.image_size)), "unet.png")
    save(forward_process(network, diffusion), f"{name}_forward.png")
    save(reverse_process(network, diffusion), f"{name}_reverse.png")


if __name__ == "__main__":
    run_script(main)

"""Judge images by KID, FID, precision, recall, spectrum and memorization, each beside the score of real slices.

    python evaluate.py                          generates 1000 images with the newest run's model and judges them
    python evaluate.py --model oasis64          does so with a bundled model, a model file or a run's folder
    python evaluate.py --samples images.npy     judges images that exist: an .npy or a folder of PNGs

Compare each score with its floor: the score that as many real slices of other subjects get from the same code.
evaluation.png shows real slices. The OASIS data use agreement forbids publishing it.
"""
import hashlib
import json
import sys
from pathlib import Path

from oasis.files import OasisError, code_digests, image_grid, import_tensorflow, make_folder, replacing, run_script

import_tensorflow()  # before anything imports TensorFlow

import numpy as np
import tensorflow as tf
from matplotlib.figure import Figure

import modules
import predict
from dataset import load_split, print_report, slice_subjects
from oasis import features, sources
from oasis.conditions import check_guidance, has, random_indices
from oasis.devices import prepare_devices, resolve_precision
from oasis.generate import check_noise, generate, load_on_devices, noise_label, noise_options
from oasis.metrics import compare, describe, histogram, import_sklearn, memorization, radial_spectrum
from oasis.modelfile import find_model, model_digest
from oasis.parameters import named_variables
from oasis.pixels import load_samples, read_images
from oasis.settings import as_flag, flag, flag_name, integer, make_parser, read_settings, user_path

MINIMUM = 20     # fewer images are not judged
# The settings: each constant is the default of its flag, see oasis/settings.py. PREDICT_FLAGS are those of predict.py.
SAMPLES: flag(str) = ""                          # images to judge instead of a model's: an .npy uint8 (N, S, S, 1) or a
                                                 # folder of PNGs
PATH: flag(str) = "./dataset/keras_png_slices_data.zip"  # the real images, as in train.py
SPLIT: flag(("validate", "test")) = "validate"   # the real images to compare with
NUMBER_OF_IMAGES: flag(integer(MINIMUM, 10**6)) = 1000  # largest number of images to judge, at least 20
FEATURES: flag(features.KINDS) = "efficientnet"  # the network whose features are compared; inception is that of Keras,
                                                 # a download of 84 MB, not that of published FIDs
SAMPLER: flag(modules.SAMPLERS) = "dpm"          # ddpm is the sampler of the paper; ddim and dpm need fewer steps
BATCH_SIZE: flag(integer(1, 2**16)) = 50         # images generated at a time
OUTPUT: flag(user_path) = "./evaluation/"        # the folder for evaluation.json, evaluation.png and generated images

SAMPLING_FLAGS = ("steps", "eta", "noise_scale", "guidance", "seed")
PREDICT_FLAGS = ("model", "ckpt_path", "precision", "devices", *SAMPLING_FLAGS)
SETTINGS = {**read_settings(sys.modules[__name__]), **sources.SETTINGS,
            **{name: predict.SETTINGS[name] for name in PREDICT_FLAGS}}
CODE = ("dataset.py", "modules.py", *(f"oasis/{name}.py" for name in (
    "conditions", "devices", "fused", "generate", "loop", "noise", "parameters")))  # the code that affects images


def check_subjects(training, evaluation):
    """Raise OasisError if an OASIS subject is in both arrays. For another subject, which may be a class, only warn."""
    shared = np.intersect1d(training, evaluation)
    if len(shared):
        names = ", ".join(str(subject) for subject in shared[:5]) + (", …" if len(shared) > 5 else "")
        error = f"{len(shared)} of the subjects to compare with are also in the training split ({names})"
        if shared.dtype.kind == "i":
            raise OasisError(f"{error}. Choose another --split, or data whose splits share no subject.")
        print(f"warning: {error}. If they are people, not classes, the floor is too low", file=sys.stderr)


def check_count(name, count, advice=""):
    """Raise OasisError if count < MINIMUM. name: which images. advice: what to do, after a space."""
    if count < MINIMUM:
        raise OasisError(f"{count} {name} are too few to compare: at least {MINIMUM} are needed.{advice}")


def check_reading(reading, settings):
    """Warn if --slices or --axis in `reading` is not that of the model's training, in settings, of its model file."""
    other = {name: value for name, value in sources.reading_of_model(settings).items() if value != reading[name]}
    if other:
        was = " ".join(as_flag(name, value) for name, value in other.items())
        print(f"warning: the model was trained with {was}: give the same flags here, too", file=sys.stderr)


def get_samples(flags, names):
    """Return (images, label, origin): at most flags.number_of_images to judge, uint8 (N, S, S, 1).

    label: the name of their row in the table. origin: {name: value} of all that determines generated images.
    """
    if flags.samples:
        return load_samples(flags.samples, flags.number_of_images), Path(flags.samples).name, {}
    _, file = find_model(flags.model, flags.ckpt_path)
    print(f"model: {file}")
    return generate_samples(file, flags, names)


def generate_samples(file, flags, names):
    """The result of get_samples for images from the model in this file.

    Each batch is kept in a folder in flags.output, so another call goes on from there. The folder's name is a hash of
    the code, the sampling settings and the model in memory (a running training may replace the file), so images of
    another model are never used. Device and batch size, which affect the rounding, are not in it.
    """
    precision = resolve_precision(flags.precision)
    networks, diffusion, settings = load_on_devices(lambda: modules.load_model(file, precision), names)
    check_reading(sources.reading_of(flags), settings)
    steps = flags.steps or None
    parameters = {name: variable.numpy() for name, variable in named_variables(next(iter(networks.values())))}
    check_guidance(settings, flags.guidance)
    noise = dict(noise_options(flags.sampler, flags.eta, flags.noise_scale), guidance=flags.guidance)
    step_count = len(diffusion.sampler_table(flags.sampler, steps)[0])
    origin = {"sampler": flags.sampler, "steps": step_count, **noise, "first_seed": flags.seed, "precision": precision,
              "model_sha256": model_digest(parameters, json.dumps(settings)), "code": code_digests(*CODE),
              "tensorflow": tf.__version__}
    folder = Path(flags.output) / f"samples_{hashlib.sha256(repr(origin).encode()).hexdigest()[:16]}"

    done, batches = 0, []
    while done < flags.number_of_images and (path := folder / f"from_{done:06d}.npy").exists():
        batches.append(read_images(path))
        done += len(batches[-1])
    missing = range(flags.seed + done, flags.seed + flags.number_of_images)
    if missing:
        indices = random_indices(settings, missing)
        for seeds, images, _ in generate(networks, diffusion, missing, flags.batch_size, indices,
                                         sampler=flags.sampler, steps=steps, **noise):
            with replacing(folder / f"from_{seeds[0] - flags.seed:06d}.npy") as temporary:
                np.save(temporary, images)
            batches.append(images)
    samples = np.concatenate(batches)[:flags.number_of_images]
    label = f"{flags.sampler} {step_count}{noise_label(flags.sampler, noise)}"
    label += ", random slice indices" if has(settings["condition"], "slice") else ""
    return samples, label, {"model": str(file.absolute()), "settings": settings, **origin}


# --------------------------------------------------------------------------------------------------------------- report

def table(corner, rows):
    """The rows {name: metrics} as a Markdown table. The cells of metrics that a row lacks are empty."""
    columns = {"N": "{count}", "KID × 1000": "{kid:.2f} ± {kid_error:.2f}", "FID": "{fid:.2f}",
               "precision": "{precision:.3f}", "recall": "{recall:.3f}", "density": "{density:.3f}",
               "coverage": "{coverage:.3f}", "MS-SSIM": "{ms_ssim:.2f}", "spectrum, dB": "{spectrum:.2f}",
               "histogram": "{histogram:.2f}", "seams": "{seams:.3f}", "grey": "{grey:.1f} ± {grey_spread:.1f}"}

    def cell(form, metrics):
        try:
            return form.format(**metrics)
        except KeyError:
            return ""

    lines = [[corner, *columns]]
    for name, metrics in rows.items():
        thousandfold = {key: 1000 * metrics[key] for key in ("kid", "kid_error") if key in metrics}
        lines.append([name, *(cell(form, {**metrics, **thousandfold}) for form in columns.values())])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(text.rjust(width) for text, width in zip(line, widths)) + " |" for line in lines)


def figure(samples, real, training, pairs, title):
    """A matplotlib Figure of samples, real slices, the most suspicious pairs, spectra and histograms.

    pairs: the pairs that memorization() returns.
    """
    page = Figure(figsize=(12, 14), layout="constrained")
    page.suptitle(title)
    axes = page.subplot_mosaic([["samples", "real"], ["pairs", "pairs"], ["spectrum", "histogram"]],
                               height_ratios=(6, 3, 4))

    def show(name, images, columns, **labels):
        axes[name].imshow(image_grid(images, columns), cmap="gray", vmin=0, vmax=255)
        axes[name].set(xticks=[], yticks=[], **labels)

    for name, images, caption in ("samples", samples, "samples"), ("real", real, "real (not to be published)"):
        show(name, images[np.random.default_rng(0).permutation(len(images))[:36]], 6, title=caption)  # of any index
        axes["spectrum"].semilogy(radial_spectrum(images), label=name)
        axes["histogram"].semilogy(np.maximum(histogram(images), 1e-7), label=name)
    axes["spectrum"].set(title="power spectrum", xlabel="waves a side", ylabel="power")
    axes["histogram"].set(title="histogram", xlabel="grey level", ylabel="share of pixels")
    axes["spectrum"].legend()

    rows, training_rows, distances, ratios = zip(*pairs)
    show("pairs", np.concatenate([samples[list(rows)], training[list(training_rows)]]), len(pairs),
         title="the most suspicious samples, above the nearest training image (not to be published)")
    axes["pairs"].set_xticks((np.arange(len(pairs)) + 0.5) * samples.shape[1],
                             [f"{distance:.1f} greys\nratio {ratio:.2f}" for distance, ratio in zip(distances, ratios)])
    return page


def main(arguments=None):
    flags = parse_flags(arguments)
    names = prepare_devices(flags.devices)
    import_sklearn()                    # a missing package is reported before the work, not after it
    make_folder(flags.output)           # and so is a folder that cannot be written
    extractor = features.load_features(flags.features)
    reading = sources.reading_of(flags)
    subjects, of_training = (slice_subjects(flags.path, split, **reading) for split in (flags.split, "train"))
    check_subjects(of_training, subjects)
    advice = f" Put them into a folder named {flags.split}, and the training images into train."
    check_count(f"images of {flags.split}", len(subjects), advice)  # before images are generated, not after
    check_count("training images", len(of_training), advice)

    samples, label, origin = get_samples(flags, names)
    size = samples.shape[1]
    splits = [load_split(flags.path, split, size, **reading) for split in (flags.split, "train")]
    print_report(*splits)
    trained_on = origin.get("settings", {}).get("data", splits[1].description)
    if trained_on != splits[1].description:
        print(f"the model was trained on {trained_on}; copies are searched among {splits[1].description}")
    real, training, noun = splits[0].images, splits[1].images, splits[0].noun
    # A random choice: load_split's limit takes the same slice indices in all heads, and the floor would be too high.
    floor = training[np.random.default_rng(0).permutation(len(training))[:len(samples)]]
    if len(floor) < len(samples):
        print(f"the floor has only {len(floor)} images: give --number-of-images {len(floor)} to compare more than KID")
    for name, images in {"images": samples, f"{noun} of {flags.split}": real, f"training {noun}": floor}.items():
        check_count(name, len(images))

    real_features = features.extract(extractor, real, f"features, {flags.split}")
    metrics = {name: compare(images, features.extract(extractor, images, f"features, {name}"), real, real_features,
                             subjects=[one.subject for one in splits[0].slices])
               for name, images in {"samples": samples, "floor": floor}.items()}
    metrics["real"] = describe(real)
    # Because --flips mirrors training images, a mirrored copy counts as a copy.
    either_way = np.concatenate([training, np.flip(training, splits[1].mirror_axis)])
    copies = memorization(samples, real, either_way)
    copied, chance = (f"{100 * copies[name]:.1f} %" for name in ("copies", "copies_by_chance"))

    title = f"{label}: {size}×{size} pixels, {extractor.name}, against {splits[0].description} ({flags.split})"
    rows = {label: metrics["samples"], f"floor: training {noun}": metrics["floor"],
            f"real: {flags.split}": metrics["real"]}
    error = metrics["samples"]["kid_subject_error"]
    others = "may differ much: few subjects" if error is None else f"would differ by about {1000 * error:.1f}"
    print(f"\n{title}\n\n{table(extractor.name, rows)}\n\n{copied} of the images count as copies of training images, "
          f"by chance {chance}. With as many other subjects KID × 1000 {others}. See docs/results.md.\n")
    report = {"features": extractor.name, "image_size": size, "metrics": metrics, "memorization": copies,
              "origin": origin, "flags": vars(flags)}
    write_report(Path(flags.output).absolute(), report, figure(samples, real, either_way, copies["pairs"], title))


def write_report(folder, report, page):
    if (folder / "evaluation.json").exists():
        print(f"warning: {folder / 'evaluation.json'} is replaced. Give another --output to keep it.", file=sys.stderr)
    with replacing(folder / "evaluation.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, default=float), encoding="utf-8")
    with replacing(folder / "evaluation.png") as temporary:
        page.savefig(temporary, dpi=100)
    print(f"{folder / 'evaluation.json'}\n{folder / 'evaluation.png'}\n"
          "The PNG shows real images. If they are of OASIS, the data use agreement forbids publishing it.")


def parse_flags(arguments=None):
    parser = make_parser(__doc__, SETTINGS)
    flags = parser.parse_args(arguments)
    if flags.model and flags.samples:
        parser.error("--model generates images and --samples names existing images: give only one of the two")
    given = [name for name in ("sampler", *SAMPLING_FLAGS) if getattr(flags, name) != parser.get_default(name)]
    if flags.samples and given:
        parser.error(f"{flag_name(given[0])} is for generating images, and --samples names existing ones")
    check_noise(parser, flags)
    return flags


if __name__ == "__main__":
    run_script(main)

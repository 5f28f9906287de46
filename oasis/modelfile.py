"""Model files: a safetensors file that holds the parameters as {name: array} and the settings as JSON in its metadata.

This file does not need TensorFlow. modules.py turns the arrays into networks.
"""
import json
import os
from pathlib import Path

import safetensors
from einops import EinopsError, repeat

from oasis.files import ROOT, OasisError, replacing
from oasis.modelbytes import FORMAT, model_bytes, model_digest

MAX_INTEGER = 4096        # the largest image size, width or patch size in a file, which limits the network's memory
MAX_TIMESTEPS = 100_000
ORIENTATIONS = ("RAS", "PRS", "IRA", "IAR")  # the values of "axes" in a geometry, see oasis/sources.py
# The errors that wrong settings in a model file cause.
SETTINGS_ERRORS = (KeyError, TypeError, ValueError, ArithmeticError, EinopsError, OasisError)
BUNDLED = ROOT / "checkpoint"  # the folder of the bundled models


def time_of(path):
    """The time of the last write to a file; 0 if the file no longer exists, as when --restart has renamed its run."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def find_runs(folder):
    """The model files of the runs in a folder, the oldest first.

    Runs of earlier phases of a recipe are included: they are one folder deeper.
    """
    if not os.path.isdir(folder):  # of a name that is too long, too, where Path.glob() fails
        return []
    return sorted((file for depth in ("*", "*/*") for file in Path(folder).glob(f"{depth}/model.safetensors")),
                  key=time_of)


def find_model(model, ckpt_path="./checkpoint"):
    """Return (name, file) of a model: a file, a run's folder, a run's name in ckpt_path or a bundled model's name.

    If `model` is "", it is the newest run in ckpt_path, which may be that of an earlier phase of a recipe, or the
    bundled oasis64 if there is no run. Raises OasisError if there is no such model.
    """
    if model:
        places = [Path(model), Path(model) / "model.safetensors", Path(ckpt_path) / model / "model.safetensors",
                  BUNDLED / f"{model}.safetensors"]
        found = [place for place in places if os.path.isfile(place)]
        if not found:
            bundled = ", ".join(sorted(path.stem for path in BUNDLED.glob("*.safetensors"))) or "none"
            folders = ", ".join(sorted({str(file.parent) for file in (*find_runs(ckpt_path), *find_runs(model))}))
            raise OasisError(f"{model}: no model there. Name a run's folder{folders and f' ({folders})'}, a "
                             f".safetensors file or a bundled model ({bundled}).")
        if len(found) > 1 and found[-1].parent == BUNDLED:
            print(f"{model} is a run: the bundled model of this name is {found[-1]}")
    else:
        runs = find_runs(ckpt_path)
        found = [*runs[::-1], *BUNDLED.glob("oasis64.safetensors")]
        if not found:
            raise OasisError(f"{Path(ckpt_path).absolute()}: no trained model there. Run python train.py first, "
                             "or name a model file with --model.")
        if not runs:
            print(f"no run in {Path(ckpt_path).absolute()}: taking the bundled oasis64")
    file = Path(os.path.abspath(found[0]))  # of --model . too, the folder has a name
    return file.parent.name if file.name == "model.safetensors" else file.stem, file


def write_model(path, parameters, settings):
    """Write {name: array} and the settings, a dict that JSON can hold, as one file, completely or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(model_bytes(parameters, settings))


def read_model(path):
    """Return ({name: array}, settings) of a model file. Raises OasisError if it is missing, damaged or no model."""
    try:
        with safetensors.safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            parameters = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise OasisError(f"{path}: there is no such model file") from None
    except Exception as error:  # safetensors raises a class of its own, OSError or ValueError, depending on the damage
        raise OasisError(f"{path}: not a readable safetensors file ({error}). Copy or download it again.") from error
    if metadata.get("format") != FORMAT:
        raise OasisError(f"{path}: a safetensors file, but not a model that train.py wrote")
    if metadata.get("sha256") != model_digest(parameters, metadata.get("settings", "")):
        raise OasisError(f"{path}: damaged: its checksum is wrong. Copy or download it again, or resume its training.")
    try:
        return parameters, dict(json.loads(metadata["settings"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OasisError(f"{path}: its checksum is right, but its settings are unreadable ({error}). "
                         "Use another model.") from error


def check_settings(settings, count):
    """Raise one of SETTINGS_ERRORS unless the settings are valid, for a network of at most `count` parameters.

    Without this check, a wrong number in the settings could build a network of any size.
    """
    dim, mults, pixel_width = settings["dim"], settings["dim_mults"], settings.get("pixel_width", 0)
    integers = [dim, *mults, *(settings[name] for name in ("image_size", "channels", "patch_size")), pixel_width or 1]
    if not all(type(value) is int and 1 <= value <= MAX_INTEGER for value in integers):
        raise OasisError(f"a size or a width is not an integer in 1 … {MAX_INTEGER}")
    timesteps = settings["timesteps"]
    if type(timesteps) is not int or timesteps > MAX_TIMESTEPS or type(settings.get("images", 0)) is not int:
        raise OasisError(f"timesteps must be an integer of at most {MAX_TIMESTEPS}, and images an integer")
    if type(settings.get("condition", "")) is not str:
        raise OasisError("condition is not text")
    if {"slice", "neighbour"} & set(settings.get("condition", "").split(",")):
        indices, geometry = settings["indices"], settings["geometry"]
        if not all(type(index) is int and 0 <= index < MAX_INTEGER for index in [*indices, settings["slice_step"]]) \
                or sorted(indices) != indices or not indices or not settings["slice_step"]:
            raise OasisError("indices are not ascending slice indices, or slice_step is not 1 or more")
        counts = settings.get("index_counts", [1] * len(indices))
        if len(counts) != len(indices) or not all(type(count) is int and 1 <= count < 2**32 for count in counts):
            raise OasisError("index_counts are not the numbers of images with each of the indices")
        if sorted(geometry) != ["axes", "side", "step"] or geometry["axes"] not in ORIENTATIONS:
            raise OasisError("geometry must have the keys axes, side and step, and known axes")
    # The time embedding, the widest 3×3 convolutions and the last convolution have at least this many parameters.
    least = (16 * dim**2, 9 * (dim * max(mults))**2, 9 * pixel_width**2,
             dim * max(settings["channels"], pixel_width) * settings["patch_size"]**2)
    if max(*least, len(mults)) > count:
        raise OasisError("they describe a network with more parameters than the file has")


def enlarge(parameters, settings, network):
    """The parameters of a model file, changed to fit a network with patches as large as the model's or larger.

    network: the settings of this network. If its patches are r times as wide, the result averages blocks of r×r pixels,
    applies the model to this smaller image, and enlarges the output by repetition. The parameters of a
    full-resolution level of another width or patch size are left out. Raises ValueError unless the image size of the
    network is a multiple of the model's.
    """
    if network["image_size"] % settings["image_size"]:
        raise ValueError("the image size is no multiple of that of the model")
    patch = settings["patch_size"]
    ratio = max(network["patch_size"] // patch, 1)
    sizes = dict(i=patch, j=patch, p=ratio, q=ratio)
    parameters = dict(parameters)
    stem, last = parameters["stem.kernel"] / ratio**2, parameters["last_conv.kernel"]
    parameters["stem.kernel"] = repeat(stem, "h w (i j c) d -> h w (i p j q c) d", **sizes)
    parameters["last_conv.kernel"] = repeat(last, "h w d (i j c) -> h w d (i p j q c)", **sizes)
    parameters["last_conv.bias"] = repeat(parameters["last_conv.bias"], "(i j c) -> (i p j q c)", **sizes)
    if (patch, settings.get("pixel_width", 0)) != (network["patch_size"], network["pixel_width"]):
        parameters = {name: array for name, array in parameters.items() if not name.startswith("pixels")}
    return parameters

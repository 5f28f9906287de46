"""The recipes: defaults of the other flags of train.py, in one dict for each phase of a training.

A value that is a function is called with the image size. A phase starts from the EMA of the phase before it.
"""
import argparse

from oasis.files import ROOT, OasisError


def patch_size(image_size):
    """The largest patch size that fits the image size and leaves the network a grid of 64×64 or more."""
    return next((size for size in range(image_size // 64, 1, -1) if image_size % (8 * size) == 0), 1)


RECOMMENDED = dict(patch_size=patch_size, objective="x_start", times="lognormal", flips="auto")
DEMO = dict(path=str(ROOT / "dataset/sample_slices.zip"), number_of_samples=0, image_size=64, dim=32, patch_size=2,
            batch_size=16, max_steps=900, save_every=100, learning_rate=5e-4, recipe="recommended")

# The phases of oasis256; oasis64 is the first of them, oasis128 the first three. A later phase at the same size begins
# with a lower learning rate, and has another seed, so that it does not draw the same noise again. The phases are too
# short for the EMA decay of 0.9999: (1 + step)/(10 + step) is less in every step.
OASIS64 = dict(RECOMMENDED, number_of_samples=0, image_size=64, patch_size=1, dim=32, batch_size=32, max_steps=8000,
               condition="slice,neighbour,mirror", condition_dropout=0.2, max_loss_weight=200.0, loss_weight="learned",
               learning_rate=1e-3, decay_after=1000, ema_decay=0.9999)
OASIS128 = dict(OASIS64, image_size=128, batch_size=16, max_steps=3200, decay_after=500)
OASIS128_LOWER = dict(OASIS128, max_steps=2200, learning_rate=5e-4, decay_after=200, seed=1)
OASIS256 = dict(OASIS128, image_size=256, patch_size=2, pixel_width=32, max_steps=2000, decay_after=500)

RECIPES = {"original": [{}], "recommended": [RECOMMENDED], "oasis64": [OASIS64],
           "oasis128": [OASIS64, OASIS128, OASIS128_LOWER], "oasis256": [OASIS64, OASIS128, OASIS128_LOWER, OASIS256]}


def advise(flags):
    """Print how much --recipe recommended would save, if the original recipe takes smaller patches."""
    patch = patch_size(flags.image_size)
    if flags.recipe == "original" and patch > flags.patch_size:
        print(f"--recipe recommended turns patches of {patch}×{patch} pixels into channels: about "
              f"1/{(patch / flags.patch_size)**2:.3g} of the time and memory of this run")


def advice_for_memory(flags, replicas):
    """Return the flags of train.py to try after an out-of-memory error, in words. replicas: the number of devices."""
    images = flags.batch_size // replicas
    more = next((f"--accumulate {n}" for n in range(flags.accumulate + 1, images + 1) if images % n == 0), None)
    smaller = flags.recipe == "original" and patch_size(flags.image_size) > flags.patch_size
    recipe = "--recipe recommended" if smaller else None
    # The finished phases of a recipe cannot be continued with another batch size.
    batch = "a smaller --batch-size" if len(RECIPES[flags.recipe]) == 1 or not more else None
    return " or ".join(filter(None, (more, batch, recipe)))


def parse(parser, arguments, phase):
    """Parse the command line for one phase of the recipe; phase: its index, -1 for the last. Return the flags.

    A flag that is not given has its value from --demo, else from the recipe's phase, else the parser's default.
    --epochs and --max-steps affect the last phase only. If --epochs is given and --max-steps is not, max_steps is 0.
    A given --seed is added to the seed of the phase.
    """
    defaults = vars(parser.parse_args([]))
    # argparse sets no default where the namespace has a value, so a flag that is None afterwards was not given.
    parsed = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in parsed.items() if value is not None}
    demo = DEMO if given.get("demo") else {}
    recipe = {**defaults, **demo, **given}["recipe"]
    phases, own = RECIPES[recipe], RECIPES[recipe][phase]
    if phase != -1:
        given = {name: value for name, value in given.items() if name not in ("epochs", "max_steps")}
    elif "epochs" in given:
        given.setdefault("max_steps", 0)
    if "seed" in given:
        given["seed"] = (given["seed"] + own.get("seed", 0) + 2**63) % 2**64 - 2**63  # stays an int64
    flags = argparse.Namespace(**{**defaults, **own, **demo, **given})
    if len(phases) > 1 and flags.image_size != own["image_size"]:
        raise OasisError(f"--recipe {recipe} has an image size for each phase: give neither --image-size nor --demo, "
                         "or take another recipe")
    if flags.first_phase > len(phases):
        raise OasisError(f"--first-phase {flags.first_phase}: --recipe {recipe} has no such phase, only {len(phases)}")
    if flags.first_phase > 1 and not flags.initial_model:
        raise OasisError("--first-phase needs --initial-model: the model of the phase before, whose run is in a folder "
                         f"such as {recipe}-phase{flags.first_phase - 1}")
    for name, value in vars(flags).items():
        setattr(flags, name, value(flags.image_size) if callable(value) else value)
    return flags

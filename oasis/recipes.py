"""The recipes: defaults of the other flags of train.py, in one dict for each phase of a training.

A value that is a function is called with the image size. A phase starts from the EMA of the phase before it.
"""
import argparse

from oasis.files import ROOT, OasisError


def patch_size(image_size):
    """The patch size with which the network works on a 64×64 grid."""
    return max(image_size // 64, 1)


RECOMMENDED = dict(patch_size=patch_size, objective="x_start", times="lognormal", flips="auto")
DEMO = dict(path=str(ROOT / "dataset/sample_slices.zip"), number_of_samples=0, image_size=64, dim=32, patch_size=2,
            batch_size=16, max_steps=900, save_every=100, learning_rate=5e-4, recipe="recommended")

# The phases of oasis256, of which the smaller models are the first ones. A later phase at the same size begins with a
# lower learning rate. With an EMA decay of 0.9999, (1 + step)/(10 + step) is less in every step of a phase.
OASIS64 = dict(RECOMMENDED, number_of_samples=0, image_size=64, patch_size=1, dim=32, batch_size=32, max_steps=8000,
               condition="slice,neighbour,mirror", condition_dropout=0.2, max_loss_weight=200.0, loss_weight="learned",
               learning_rate=1e-3, decay_after=1000, ema_decay=0.9999)
OASIS128 = dict(OASIS64, image_size=128, batch_size=16, max_steps=3200, decay_after=500)
OASIS128_LOWER = dict(OASIS128, max_steps=2200, learning_rate=5e-4, decay_after=200, seed=1)
OASIS256 = dict(OASIS128, image_size=256, patch_size=2, pixel_width=32, max_steps=6000, decay_after=1000)

RECIPES = {"original": [{}], "recommended": [RECOMMENDED], "oasis64": [OASIS64],
           "oasis128": [OASIS64, OASIS128, OASIS128_LOWER], "oasis256": [OASIS64, OASIS128, OASIS128_LOWER, OASIS256]}


def advise(flags):
    """Print how much --recipe recommended would save, if the original recipe takes smaller patches."""
    patch = patch_size(flags.image_size)
    if flags.recipe == "original" and patch > flags.patch_size:
        print(f"--recipe recommended turns patches of {patch}×{patch} pixels into channels: about "
              f"1/{(patch // flags.patch_size)**2} of the time and memory of this run")


def parse(parser, arguments, phase):
    """Parse the command line for one phase of the recipe; phase: its index, -1 for the last. Return the flags.

    A flag that is not given has its value from --demo, else from the recipe's phase, else the parser's default. If
    --epochs is given and --max-steps is not, max_steps is 0. A larger --max-steps lengthens only the last phase.
    """
    defaults = vars(parser.parse_args([]))
    parsed = vars(parser.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in parsed.items() if value is not None}
    if "epochs" in given:
        given.setdefault("max_steps", 0)
    demo = DEMO if given.get("demo") else {}
    recipe = {**defaults, **demo, **given}["recipe"]
    flags = argparse.Namespace(**{**defaults, **RECIPES[recipe][phase], **demo, **given})
    phases = RECIPES[flags.recipe]
    if phase != -1 and "max_steps" in given:
        flags.max_steps = min(flags.max_steps, phases[phase]["max_steps"])
    if len(phases) > 1 and flags.image_size != phases[phase]["image_size"]:
        raise OasisError(f"--recipe {flags.recipe} has an image size for each phase: give neither --image-size nor "
                         "--demo, or take another recipe")
    for name, value in vars(flags).items():
        setattr(flags, name, value(flags.image_size) if callable(value) else value)
    return flags

"""train.py: the training step. Where the network does not matter, it is one that is traced quickly."""
import csv
import functools
import re

import numpy as np
import pytest
import tensorflow as tf

import train
from dataset import from_uint8
from helpers import a_batch, awake, files_of, losses_of, same_state, trainer_of
from modules import GaussianDiffusion, UNet
from oasis.adam import Adam
from oasis.devices import resolve_precision
from oasis.files import OasisError
from oasis.log import StepStats
from oasis.modelfile import read_model
from oasis.noise import normal_noise, split_seed
from oasis.settings import flag_name
from train import Trainer


def repeated(batch):
    """An iterator that returns the same batch again and again."""
    return iter(tf.data.Dataset.from_tensors(batch).repeat())


# ------------------------------------------------------------------------------------------------- timesteps, noise

def test_a_step_is_a_function_of_seed_and_step(tiny):
    losses = []
    for _ in range(2):
        trainer = trainer_of(tiny)
        trainer.step.assign(7)
        losses.append(trainer.update(a_batch())[0].numpy())
    np.testing.assert_array_equal(*losses)


def test_the_noise_of_two_steps_differs(tiny):
    """The losses at t = 1 are compared, so that other timesteps alone would not be enough."""
    found = []
    for step in 7, 8:
        trainer = trainer_of(tiny, "--timesteps", "2")
        trainer.step.assign(step)
        losses, t, _ = trainer.update(a_batch())
        found.append(losses.numpy()[t == 1])
    assert len(found[0]) and len(found[1]) and not np.isin(*found).any()


@pytest.mark.parametrize("times", ["uniform", "lognormal"])
def test_timesteps_are_drawn_as_often_as_the_flag_says(tiny, times):
    trainer = trainer_of(tiny, "--timesteps", "8", "--times", times)
    drawn = np.concatenate([trainer.update(a_batch())[1].numpy() for _ in range(40)])
    expected = 320 * trainer.diffusion.timestep_distribution(times)
    assert drawn.min() == 0 and drawn.max() <= 7
    assert np.all(abs(np.bincount(drawn, minlength=8) - expected) <= 4 * np.sqrt(expected))


def test_micro_batches_train_the_same_network(unet, tmp_path):
    """It trains through train.main, which switches Grappler off."""
    trained = []
    for parts in "1", "2":
        train.main([*unet, "--max-steps", "3", "--accumulate", parts, "--restart"])
        trained.append(read_model(tmp_path / "checkpoint/oasis16/model.safetensors")[0])
    for name, value in trained[0].items():
        np.testing.assert_allclose(trained[1][name], value, atol=1e-5, err_msg=name)


@pytest.mark.usefixtures("shared_trainers")
@pytest.mark.parametrize("save_steps, expected", [(1, [3, 6, 9, 12, 14]), (3, [3, 6, 9, 12, 14]), (4, [6, 12, 14])])
def test_it_saves_after_whole_epochs_of_enough_steps(quick, monkeypatch, save_steps, expected):
    monkeypatch.setattr(train, "SAVE_STEPS", save_steps)  # an epoch has 3 steps
    folder = quick("--max-steps", "14")
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == expected
    every_second = expected[1:-1:2] + expected[-1:]
    assert sorted(files_of(folder / "samples")) == [f"step_{step:07d}.png" for step in every_second]


@pytest.mark.usefixtures("shared_trainers")
@pytest.mark.parametrize("batch_size, step, epoch", [("8", 6, "2.0"), ("16", 3, "2.0"), ("20", 2, "1.67")])
def test_epochs_are_passes_over_the_images(quick, batch_size, step, epoch):
    """The training has 24 images. An epoch need not end with a batch."""
    with open(quick("--batch-size", batch_size, "--epochs", "2") / "log.csv", newline="", encoding="utf-8") as file:
        *_, last = csv.DictReader(file)
    assert (int(last["step"]), last["epoch"]) == (step, epoch)


def test_a_quarter_of_t_without_images_has_no_loss():
    stats = StepStats()
    stats.add(np.array([3.0, 2.0, 0.0, 0.0]), np.array([4.0, 2.0, 2.0, 0.0]), 6.0, 1, 4, 8, 1.0)
    row = stats.row()
    assert row["gradient_norm"] == 2.0      # the mean over the three steps that were not skipped
    assert [row[f"loss_t{i}"] for i in (1, 2, 3)] == [0.75, 1.0, 0.0]
    assert np.isnan(row["loss_t4"]) and row["loss"] == 0.625


def test_steps_that_were_all_skipped_have_no_loss():
    stats = StepStats()
    stats.add(np.zeros(4), np.zeros(4), 0.0, 3, 3, 24, 1.0)
    row = stats.row()
    assert np.isnan(row["loss"]) and np.isnan(row["gradient_norm"]) and row["skipped"] == 3


# ---------------------------------------------------------------------------------------------- gradients, optimizer

def test_gradients_of_micro_batches_are_those_of_the_batch(tiny):
    images, t = a_batch(), tf.constant([0, 3, 10, 30, 50, 70, 90, 99])
    noise = tf.random.stateless_normal(images.shape, [1, 2])
    results = []
    for parts in ("1", "4"):
        trainer = trainer_of(tiny, "--accumulate", parts)
        results.append(tf.function(trainer.gradients)(tf.linspace(0.5, 2.0, 8), images, t, noise))
    (losses, gradients), (part_losses, part_gradients) = results
    np.testing.assert_allclose(part_losses, losses, rtol=1e-5)
    largest = max(float(tf.reduce_max(tf.abs(gradient))) for gradient in gradients)
    assert largest > 0
    for gradient, part_gradient in zip(gradients, part_gradients):
        np.testing.assert_allclose(part_gradient, gradient, rtol=1e-3, atol=1e-5 * largest)


@pytest.mark.slow
def test_micro_batches_of_the_full_network_train_twice():
    """Grappler once left temporary variables of the first call behind, and the second call failed because they existed.
    This happens only in large graphs."""
    flags = train.parse_flags(["--image-size", "64", "--batch-size", "32", "--accumulate", "4"])
    trainer = train.make_trainer(flags, resolve_precision("auto"), mirror_axis=1)
    batches = repeated(tf.zeros([32, 64, 64, 1]))
    assert [trainer.train_steps(batches, tf.constant(count), tf.constant(0))[3] for count in (1, 2)] == [0, 0]


def test_the_settings_of_the_step_reach_the_trainer(tiny, monkeypatch):
    given = dict(seed=3, learning_rate=0.01, decay_after=7, ema_decay=0.5, loss="l1", max_loss_weight=9.0,
                 loss_weight="learned", times="lognormal", accumulate=2)
    monkeypatch.setattr(train, "Trainer", lambda network, diffusion, **options: options)
    flags = [f"{flag_name(name)}={value}" for name, value in given.items()]
    options = trainer_of(tiny, *flags, "--condition-dropout", "0.3", precision="float16")
    assert options.pop("prepare").dropout == 0.3
    assert options == {**given, "loss_scale": train.LOSS_SCALE}


def test_the_loss_of_a_step_is_the_training_loss_that_the_flags_describe(tiny):
    flags = ["--objective", "x_start", "--loss", "l1", "--max-loss-weight", "1"]
    trainer, other = trainer_of(tiny, *flags), trainer_of(tiny, *flags)
    losses, t, _ = trainer.update(a_batch())
    noise = normal_noise([8, 16, 16, 1], split_seed(tf.constant([0, 0], tf.int64), 2)[1])
    expected = other.diffusion.training_loss(other.network, a_batch(), t, noise, "l1", 1.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_a_step_uses_and_updates_the_learned_weights(tiny):
    trainer, weights = trainer_of(tiny, "--loss-weight", "learned", "--decay-after", "7"), []
    gradients, means = trainer.gradients, np.linspace(1, 2, 20, dtype=np.float32)
    trainer.gradients = lambda weight, *batch: weights.append(weight) or gradients(weight, *batch)
    trainer.loss_weights.means.assign(means)
    _, t, _ = trainer.update(a_batch())
    learned = trainer.loss_weights
    np.testing.assert_allclose(weights[0], learned.probabilities @ means / means[learned.bins[t]], rtol=1e-5)
    assert np.any(learned.means != means) and trainer.optimizer.decay_after == 7


@pytest.mark.parametrize("decay_after", [0, 2])
@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_adam_is_algorithm_1_of_the_paper(decay_after, scale):
    """With gradients of 1e-6, ε matters: it is ε̂ of the paper's section 2."""
    rng = np.random.default_rng(0)
    parameters = [tf.Variable(rng.standard_normal(shape).astype(np.float32)) for shape in ([3, 5], [7])]
    adam = Adam(parameters, 0.01, decay_after)
    expected = [[parameter.numpy().astype(np.float64), 0.0, 0.0] for parameter in parameters]
    for step in range(1, 6):
        gradients = [scale * rng.standard_normal(parameter.shape).astype(np.float32) for parameter in parameters]
        adam.apply(gradients, 0.5)
        learning_rate = 0.01 / np.sqrt(step / 2) if decay_after and step > 2 else 0.01
        for state, gradient in zip(expected, gradients):
            value, mean, square = state
            mean = 0.9 * mean + 0.1 * (0.5 * gradient)
            square = 0.999 * square + 0.001 * (0.5 * gradient.astype(np.float64))**2
            correction = np.sqrt(1 - 0.999**step)
            value = value - learning_rate * (mean / (1 - 0.9**step)) * correction / (np.sqrt(square) + 1e-7)
            state[:] = value, mean, square
    for parameter, (value, _, _) in zip(parameters, expected):
        np.testing.assert_allclose(parameter, value, atol=1e-6)


@pytest.mark.parametrize("size, scale", [(1.0, 1.0), (1.0, 1024.0), (0.01, 1.0)])
def test_gradients_are_clipped_to_norm_1_at_any_loss_scale(tiny, size, scale):
    trainer = trainer_of(tiny, "--objective", "x_start")
    trainer.loss_scale = scale
    *_, norm = trainer.update(size * tf.ones([8, 16, 16, 1]))
    assert (norm > 2) == (size == 1.0)  # the returned norm is the one before clipping
    means = tf.linalg.global_norm(trainer.optimizer.means)
    np.testing.assert_allclose(means, 0.1 * min(1.0, float(norm)), rtol=1e-4)


def test_the_ema_follows_the_parameters_with_a_warm_up(tiny):
    """The decay of 0.15 is that of the second and third step."""
    trainer = trainer_of(tiny, "--ema-decay", "0.15")
    expected = [parameter.numpy().astype(np.float64) for parameter in trainer.ema_parameters]
    for step in range(3):
        trainer.update(a_batch())
        decay = min(0.15, (1 + step) / (10 + step))
        expected = [decay * old + (1 - decay) * parameter.numpy()
                    for old, parameter in zip(expected, trainer.parameters)]
    for ema, value in zip(trainer.ema_parameters, expected):
        np.testing.assert_allclose(ema, value, atol=1e-7)


def test_no_parameter_keeps_the_value_of_the_ema_if_memory_is_short(tiny, monkeypatch):
    trainer, calls, identity = trainer_of(tiny), [], tf.identity
    trainer.update(a_batch())
    before = [variable.numpy() for variable in (*trainer.parameters, *trainer.ema_parameters)]

    def exhausted(tensor):
        calls.append(1)
        if len(calls) == 4:  # for the EMA of the second parameter
            raise tf.errors.ResourceExhaustedError(None, None, "OOM")
        return identity(tensor)
    monkeypatch.setattr(tf, "identity", exhausted)
    with pytest.raises(tf.errors.ResourceExhaustedError), trainer.using_ema():
        raise AssertionError("it must not be entered")
    for variable, value in zip((*trainer.parameters, *trainer.ema_parameters), before):
        np.testing.assert_array_equal(variable, value)


# ------------------------------------------------------------------------------------------------------------- graph

def test_many_steps_trace_once(tiny):
    trainer = trainer_of(tiny)
    traces, gradients = [], trainer.gradients
    trainer.gradients = lambda *arguments: traces.append(1) or gradients(*arguments)
    batches, bad_steps = repeated(a_batch()), tf.constant(0)
    for count in (1, 2, 5):
        *_, bad_steps = trainer.train_steps(batches, tf.constant(count), bad_steps)
    assert int(trainer.step) == 8
    assert len(traces) <= 2  # the loop's body is traced a second time when its variables' shapes are settled


def takes_parameters_as_inputs(compiled):
    """Whether the parameters are inputs of an XLA program. As constants they would make XLA compile in every step."""
    program = compiled.experimental_get_compiler_ir(a_batch())(stage="hlo")
    inputs, constants = (re.findall(rf"= f32\[([\d,]+)\]\S* {kind}\(", program) for kind in ("parameter", "constant"))
    kernel = "3,3,16,16"
    return kernel in inputs and kernel not in constants


def test_the_step_compiles_under_xla(unet):
    trainer, other = trainer_of(unet), trainer_of(unet)
    awake(trainer.network), awake(other.network)
    losses, t, norm = trainer.update(a_batch())
    compiled = tf.function(functools.partial(Trainer.update, other), jit_compile=True, autograph=False)
    xla_losses, xla_t, xla_norm = compiled(a_batch())
    np.testing.assert_array_equal(xla_t, t)
    np.testing.assert_allclose(xla_losses, losses, rtol=1e-4)
    np.testing.assert_allclose(xla_norm, norm, rtol=1e-3)
    for xla_mean, mean in zip(other.optimizer.means, trainer.optimizer.means):  # a tenth of the clipped gradient
        np.testing.assert_allclose(xla_mean, mean, atol=1e-3 * np.abs(mean).max())
    assert takes_parameters_as_inputs(compiled)


def test_xla_takes_the_parameters_of_every_step_as_inputs(unet):
    trainer = trainer_of(unet, "--accumulate", "2", "--condition", "mirror", "--loss-weight", "learned")
    assert takes_parameters_as_inputs(tf.function(trainer.update, jit_compile=True, autograph=False))


def test_losses_are_summed_for_each_quarter_of_t(tiny):
    trainer, other = trainer_of(tiny), trainer_of(tiny)
    losses, t, norm = trainer.update(a_batch())
    results = other.train_steps(repeated(a_batch()), tf.constant(1), tf.constant(0))
    quarters = t.numpy() * 4 // 100
    np.testing.assert_allclose(results[0], np.bincount(quarters, losses, 4), rtol=1e-5)
    np.testing.assert_array_equal(results[1], np.bincount(quarters, minlength=4))
    assert float(results[2]) == pytest.approx(float(norm), rel=1e-5)


def test_training_learns(tiny):
    trainer = trainer_of(tiny, "--learning-rate", "0.03", "--objective", "x_start")
    batches, losses = repeated(tf.zeros([8, 16, 16, 1]) + 0.5), []
    for _ in range(2):
        loss_sums, counts, *_ = trainer.train_steps(batches, tf.constant(30), tf.constant(0))
        losses.append(float(tf.reduce_sum(loss_sums) / tf.reduce_sum(counts)))
    assert losses[1] < losses[0] / 4


# --------------------------------------------------------------------------------------------------------- condition

class LabelTable(tf.keras.Model):
    """A network that returns constant images: the value in its table for the label, which is its third argument."""

    def __init__(self):
        super().__init__()
        self.table = tf.keras.layers.Embedding(5, 1)
        self.table.build(None)

    def call(self, x, t, cond):
        return 0 * x + self.table(cond)[:, :, None, None]


LABELS = np.array([3, 0, 1, 4, 1, 3, 3, 0])                # all but label 2
PIXELS = np.array([[30], [60], [90], [120], [150]])        # the grey level of each label
GREYS = PIXELS / 127.5 - 1


@pytest.fixture(params=[1, 2], ids=["whole", "accumulate 2"])
def conditional(request):
    """A Trainer of a LabelTable that holds the right grey for every label."""
    trainer = Trainer(LabelTable(), GaussianDiffusion(100, "x_start"), accumulate=request.param)
    for parameter in (*trainer.parameters, *trainer.ema_parameters):
        parameter.assign(GREYS)
    return trainer


def images_of(values, labels):
    """Constant images (N, 16, 16, 1) with the value of each label."""
    return np.broadcast_to(values[labels][:, :, None, None], [len(labels), 16, 16, 1])


@pytest.mark.parametrize("wrong", [0, 4, 7])
def test_each_image_is_denoised_with_its_own_condition(conditional, wrong):
    """The loss is 0, except for the one image whose condition is wrong."""
    images, cond = tf.constant(images_of(GREYS, LABELS), tf.float32), LABELS.copy()
    np.testing.assert_allclose(conditional.update((images, tf.constant(cond)))[0], 0, atol=1e-9)
    for parameter in conditional.parameters:
        parameter.assign(GREYS)
    cond[wrong] = 2
    losses = conditional.update((images, tf.constant(cond)))[0].numpy()
    assert losses[wrong] > 1e-3
    np.testing.assert_allclose(np.delete(losses, wrong), 0, atol=1e-9)


def test_batches_with_a_condition_train_its_parameters(conditional):
    """Adam moves each row of the table whose label is in the batch towards the grey of its images, and no other row."""
    batch = tf.constant(images_of(GREYS + 0.5, LABELS), tf.float32), tf.constant(LABELS)
    *_, skipped, _ = conditional.train_steps(repeated(batch), tf.constant(2), tf.constant(0))
    moved = conditional.parameters[0].numpy() - GREYS
    assert int(skipped) == 0 and int(conditional.step) == 2
    assert np.all(moved[[0, 1, 3, 4]] > 1e-5)
    assert abs(moved[2, 0]) < 1e-6


def test_validation_has_the_timesteps_of_training_in_random_order(tiny, monkeypatch):
    """Of 400 images, each timestep gets its expected number in training, within one image."""
    trainer, calls = trainer_of(tiny, "--times", "lognormal", "--flips", "1"), []
    monkeypatch.setattr(trainer, "loss_fn", lambda *parts, cond: calls.append(parts) or np.ones(len(parts[1])))
    pixels = np.random.default_rng(0).integers(0, 256, [400, 16, 16, 1], dtype=np.uint8)
    trainer.validation_loss(pixels)
    images, t, noise = (np.concatenate(part) for part in zip(*calls))
    np.testing.assert_array_equal(images, from_uint8(pixels))               # no image is mirrored
    assert abs(noise.std() - 1) < 0.02 and len(np.unique(noise[:, 0, 0, 0])) == 400
    expected = 400 * trainer.diffusion.timestep_distribution("lognormal")
    assert np.abs(np.bincount(t, minlength=100) - expected).max() < 1
    assert abs(np.corrcoef(np.arange(400), t)[0, 1]) < 0.2


def test_the_validation_loss_takes_a_condition(conditional, monkeypatch):
    """It is that of the EMA: the parameters themselves are 0."""
    images = images_of(PIXELS, LABELS).astype(np.uint8)
    for parameter in conditional.parameters:
        parameter.assign(tf.zeros_like(parameter))
    assert conditional.validation_loss((images, LABELS)) < 1e-9
    assert conditional.validation_loss((images, LABELS[::-1])) > 1e-3
    last, losses = LABELS.copy(), []
    last[-1] = 2                        # the mean is over all images, also if the last batch is not full
    for batch_size in 3, 4, 100:
        monkeypatch.setattr(train, "VALIDATION_BATCH", batch_size)
        losses.append(conditional.validation_loss((images, last)))
    assert losses[0] > 1e-4 / len(LABELS) and losses == pytest.approx([losses[0]] * 3, rel=1e-5)


# ------------------------------------------------------------------------------------------------------- not finite

def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny):
    trainer = trainer_of(tiny)
    before = [variable.numpy() for variable in (*trainer.parameters, *trainer.ema_parameters)]
    bad = a_batch().numpy()
    bad[3, 5, 5] = np.nan
    *_, skipped, bad_steps = trainer.train_steps(repeated(bad), tf.constant(3), tf.constant(4))
    assert int(skipped) == 3 and int(bad_steps) == 7 and int(trainer.step) == 3
    for old, variable in zip(before, (*trainer.parameters, *trainer.ema_parameters)):
        np.testing.assert_array_equal(old, variable.numpy())
    *_, bad_steps = trainer.train_steps(repeated(a_batch()), tf.constant(1), bad_steps)
    assert int(bad_steps) == 0


@pytest.mark.parametrize("precision", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_an_overflow_is_skipped_and_counted(tiny, monkeypatch, precision):
    if precision == "float16":
        monkeypatch.setattr(train, "UNet", functools.partial(UNet, dim_mults=(1,)))
    trainer = trainer_of(tiny, precision=precision)
    before = [parameter.numpy() for parameter in trainer.parameters]
    factor = 1e6 if precision == "float16" else 1e30
    *_, skipped, bad_steps = trainer.train_steps(repeated(factor * a_batch()), tf.constant(1), tf.constant(0))
    assert (int(skipped), int(bad_steps), int(trainer.step)) == (1, 1, 1)
    assert all(np.array_equal(old, parameter) for old, parameter in zip(before, trainer.parameters))
    *_, skipped, bad_steps = trainer.train_steps(repeated(a_batch()), tf.constant(1), bad_steps)
    assert (int(skipped), int(bad_steps)) == (0, 0)
    assert not all(np.array_equal(old, parameter) for old, parameter in zip(before, trainer.parameters))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_batches_that_are_not_finite_are_skipped(quick, monkeypatch, value):
    """Batches 5 to 7 are not finite. The second row of the log has one of these steps, the third row has two."""
    batches = train.make_dataset

    def bad_batches(images, batch_size, seed, start, *more):
        steps = tf.data.Dataset.counter(start)
        good = batches(images, batch_size, seed, start, *more)
        return tf.data.Dataset.zip((steps, good)).map(
            lambda step, batch: tf.where((step >= 5) & (step < 8), value, 1.0) * batch)
    monkeypatch.setattr(train, "make_dataset", bad_batches)
    folder = quick("--max-steps", "12")
    assert [row["skipped"] for row in losses_of(folder)] == ["0", "1", "2", "0"]
    assert all(np.isfinite(float(value)) for row in losses_of(folder) for value in row.values())


def test_gradients_that_are_not_finite_are_skipped(quick, monkeypatch):
    """They occur in the steps 5 to 7."""
    gradients = Trainer.gradients

    def bad_gradients(trainer, *arguments):
        losses, (first, *others) = gradients(trainer, *arguments)
        return losses, [first + tf.where((trainer.step >= 5) & (trainer.step < 8), np.nan, 0.0), *others]
    monkeypatch.setattr(Trainer, "gradients", bad_gradients)
    assert [row["skipped"] for row in losses_of(quick("--max-steps", "12"))] == ["0", "1", "2", "0"]


@pytest.mark.parametrize("where", ["parameters", "ema_parameters"])
def test_parameters_that_are_not_finite_are_never_saved(quick, tmp_path, monkeypatch, where):
    """The parameters, or their EMA, are infinite after the save at step 3, so the save at step 6 fails."""
    run = Trainer.train_steps

    def spoil(trainer, iterator, count, bad_steps):
        if int(trainer.step) >= 3:
            variable = getattr(trainer, where)[0]
            variable.assign(tf.fill(variable.shape, np.inf))
        return run(trainer, iterator, count, bad_steps)
    monkeypatch.setattr(Trainer, "train_steps", spoil)
    with pytest.raises(OasisError, match="NaN or infinite values at step 6.*--precision float32.*--restart"):
        quick("--max-steps", "12")
    assert read_model(tmp_path / "checkpoint" / "oasis16" / "model.safetensors")[1]["step"] == 3
    monkeypatch.setattr(Trainer, "train_steps", run)
    same_state(quick("--max-steps", "9"), quick("--max-steps", "9", ckpt_path="whole"))


def test_a_loss_that_is_never_finite_stops_with_advice(tiny, monkeypatch):
    bad = tf.data.Dataset.from_tensors(tf.fill([8, 16, 16, 1], np.nan)).repeat()
    monkeypatch.setattr(train, "make_dataset", lambda *_: bad)
    with pytest.raises(OasisError, match="--precision float32.*--restart and a lower --learning-rate"):
        train.main([*tiny, "--max-steps", "200"])

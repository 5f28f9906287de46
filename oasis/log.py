"""The statistics of training steps, and the files that show them: log.csv and loss.png."""
import csv

import numpy as np
from matplotlib.figure import Figure

from oasis.files import replacing

LOSSES = ["loss", "loss_t1", "loss_t2", "loss_t3", "loss_t4", "validation_loss"]
COLUMNS = ["step", "epoch", "images", *LOSSES, "gradient_norm", "skipped", "images_per_second", "seconds"]


class StepStats:
    """The statistics of the training steps since the last row of log.csv. The arguments are the items of as_dict()."""

    def __init__(self, loss_sums=(0, 0, 0, 0), counts=(0, 0, 0, 0), norm_sum=0.0, skipped=0, steps=0, images=0,
                 seconds=0.0):
        self.loss_sums, self.counts = np.array(loss_sums, np.float64), np.array(counts, np.float64)
        self.norm_sum, self.skipped, self.steps, self.images, self.seconds = norm_sum, skipped, steps, images, seconds

    def as_dict(self):
        """Return {argument of __init__: value}, which JSON can hold."""
        return {**vars(self), "loss_sums": self.loss_sums.tolist(), "counts": self.counts.tolist()}

    def add(self, loss_sums, counts, norm_sum, skipped, steps, images, seconds):
        """Add the sums that Trainer.train_steps returned for some steps to those of the next row.

        images: the number of images in these steps. seconds: their duration. Both are 0 for the first step of each
        phase in a process, because its duration includes compiling, which images_per_second leaves out.
        """
        self.loss_sums += loss_sums
        self.counts += counts
        self.norm_sum += float(norm_sum)
        self.skipped += int(skipped)
        self.steps += steps
        self.images += images
        self.seconds += seconds

    @property
    def loss(self):
        """The mean training loss of an image since the last row of log.csv; nan if all steps were skipped."""
        return self.loss_sums.sum() / self.counts.sum() if self.counts.any() else float("nan")

    @property
    def images_per_second(self):
        return self.images / self.seconds if self.seconds else float("nan")

    def __str__(self):
        """The text beside the progress bar: the loss and, as soon as it is known, the speed."""
        return f"loss {self.loss:.4f}" + (f", {self.images_per_second:.1f} images/s" if self.seconds else "")

    def row(self):
        """Return the next row of log.csv, {column: value}, of the steps since the last row; nan if all were skipped."""
        good_steps = self.steps - self.skipped
        quarters = np.where(self.counts > 0, self.loss_sums, np.nan) / np.maximum(self.counts, 1)
        return dict(loss=round(self.loss, 6), **{f"loss_t{i + 1}": round(loss, 6) for i, loss in enumerate(quarters)},
                    gradient_norm=round(self.norm_sum / good_steps, 4) if good_steps else float("nan"),
                    skipped=self.skipped, images_per_second=round(self.images_per_second, 2),
                    seconds=round(self.seconds, 1))

    def take_row(self):
        """Return row() and start again from zero."""
        row = self.row()
        self.__init__()
        return row


def write_log(path, rows):
    """Write the rows of the log as a CSV file with the COLUMNS. A row is {column: value}; others are left out."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def plot_losses(path, rows, loss_name):
    """Write a PNG with the curves of the LOSSES in the rows over their steps. loss_name: the label of the y axis."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")  # pyplot would keep it in memory if saving fails
    axes = figure.subplots()
    steps = [int(row["step"]) for row in rows]
    labels = {"loss": "training", "validation_loss": "validation (EMA)"}
    labels.update({f"loss_t{i}": f"training, quarter {i} of t" for i in (1, 2, 3, 4)})
    for name, label in labels.items():
        axes.plot(steps, [float(row[name]) for row in rows], label=label, lw=1 if "_t" in name else 2,
                  alpha=0.5 if "_t" in name else 1, marker="." if len(steps) == 1 else "")
    axes.set(xlabel="step", ylabel=loss_name, yscale="log")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)

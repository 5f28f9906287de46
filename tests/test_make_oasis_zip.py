"""dataset/make_oasis_zip.py: discs of OASIS-1, imitated with the sample slices, become the published layout."""
import importlib.util
import io
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from dataset import load_slices, slice_subjects
from helpers import ROOT, T88, sample_head, write_session
from oasis.files import OasisError

SPEC = importlib.util.spec_from_file_location("make_oasis_zip", ROOT / "dataset" / "make_oasis_zip.py")
maker = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(maker)
pytestmark = pytest.mark.usefixtures("cache")


def test_discs_become_the_published_layout(tmp_path, capsys):
    """Slices of any brightness are scaled to 0 … 255. Their indices, their positions and their labels are right."""
    write_session(tmp_path / "disc1", 1, row=0)
    write_session(tmp_path / "disc2" / "deeper", 402, row=1, scale=3)
    write_session(tmp_path / "disc2", 441, row=2)
    write_session(tmp_path / "disc2", 73)                               # absent from the published zip
    write_session(tmp_path / "disc2", 2, session=2)                     # a second session
    for name in "self", "again":
        (tmp_path / "disc2" / "deeper" / name).symlink_to(tmp_path / "disc2")
    output = tmp_path / "oasis.zip"
    maker.main([str(tmp_path / "disc1"), str(tmp_path / "disc2"), "--output", str(output)])
    printed = capsys.readouterr()
    assert "train: 1 of 302 subjects, 32 slices" in printed.out
    assert "warning: these are not all subjects" in printed.err and "masked" not in printed.err
    for split, subject, row in ("train", 1, 0), ("validate", 402, 1), ("test", 441, 2):
        head, numbers = sample_head(row)
        images = load_slices(output, split, 256)[..., 0]
        assert set(slice_subjects(output, split)) == {subject}
        assert np.array_equal(images[numbers], head)
        assert not images[[k for k in range(32) if k not in numbers]].any()
        with zipfile.ZipFile(output) as archive:
            name = f"keras_png_slices_data/keras_png_slices_seg_{split}/seg_{subject:03}_slice_{numbers[1]}.nii.png"
            labels = np.asarray(Image.open(io.BytesIO(archive.read(name))))
        field = np.s_[40:216, 24:232]
        assert np.array_equal(labels[field], head[1][field] // 64 * 85) and labels.sum() == labels[field].sum()


def test_a_masked_volume_serves_where_there_is_no_other(tmp_path, capsys):
    masked = T88.replace("t88_gfc", "t88_masked_gfc")
    write_session(tmp_path, 1, row=1, name=masked, labels=False)
    write_session(tmp_path, 3, row=1, name=masked)
    write_session(tmp_path, 3, row=2, name=T88)
    maker.main([str(tmp_path), "--output", str(tmp_path / "oasis.zip")])
    images = load_slices(tmp_path / "oasis.zip", "train", 256)[..., 0]
    for subject, row in enumerate((1, 2)):
        head, numbers = sample_head(row)
        assert np.array_equal(images[32 * subject:][numbers], head)
    assert "1 subjects have only a masked volume" in capsys.readouterr().err
    with zipfile.ZipFile(tmp_path / "oasis.zip") as archive:
        assert not any("seg_001" in name for name in archive.namelist())


def test_faults_are_one_line_and_leave_the_old_zip(tmp_path):
    output = tmp_path / "oasis.zip"
    output.write_bytes(b"old")

    def refused(*words):
        with pytest.raises(OasisError) as caught:
            maker.main([str(tmp_path / "disc"), "--output", str(output)])
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
        assert output.read_bytes() == b"old" and not list(tmp_path.glob(".oasis*"))

    refused("disc", "not a folder")
    (tmp_path / "disc").mkdir()
    refused("no OAS1_0001_MR1")
    session = write_session(tmp_path / "disc", 1)
    volume = next(session.glob("PROCESSED/MPRAGE/T88_111/*.hdr"))
    damaged = volume.with_suffix(".img")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    refused(damaged.stem, "from the disc again")
    nibabel.save(nibabel.AnalyzeImage(np.zeros((8, 8, 8), np.int16), np.eye(4)), volume)
    refused(volume.name, "shape (8, 8, 8), not (176, 208, 176)")
    volume.unlink()
    refused("OAS1_0001_MR1", "t88_gfc.hdr")

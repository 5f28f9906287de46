"""Damaged, hostile and extreme input is read correctly or refused in one line. The same command writes the same
bytes."""
import collections
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import predict
import train
from dataset import load_slices, make_dataset
from helpers import (a_batch, files_of, mutate, outcome, png, png_of, slice_pixels, trainer_of, write_slices,
                     write_small_model, zip_folder)
from modules import load_model
from oasis.files import OasisError

NAME = "keras_png_slices_train/case_001_slice_0.nii.png"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("run") / "oasis16" / "model.safetensors", dim_mults=(1,))


# --------------------------------------------------------------------------------------------------------------- PNG

def png_chunks(data):
    """Return [(type, data)] of a PNG."""
    chunks, at = [], 8
    while at < len(data):
        length = int.from_bytes(data[at:at + 4], "big")
        chunks.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    return chunks


OTHER_CHUNKS = (b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"iCCP", b"gAMA", b"eXIf")


def mutate_png(data, rng):
    """A PNG whose chunks are damaged, missing, repeated, out of order or foreign, with correct checksums."""
    chunks = png_chunks(data)
    at = rng.integers(len(chunks))
    kind, content = chunks[at]
    fault = rng.integers(5)
    if fault == 0:
        chunks[at] = kind, mutate(content, rng) if content else b"x"
    elif fault == 1:
        del chunks[at]
    elif fault == 2:
        chunks.insert(rng.integers(len(chunks)), chunks[at])
    elif fault == 3:
        chunks.insert(1, (OTHER_CHUNKS[rng.integers(9)], rng.bytes(30)))
    else:
        raw = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
        chunks[[kind for kind, _ in chunks].index(b"IDAT")] = b"IDAT", zlib.compress(mutate(raw, rng))
    return png_of(chunks)


# --------------------------------------------------------------------------------------------------------------- zip

@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_zips_are_read_or_refused(count, tmp_path, monkeypatch):
    """Nothing is unpacked. Half of the zips are damaged anywhere, a quarter in the table of contents, and a quarter are
    intact but hold damaged PNGs."""
    monkeypatch.setenv("OASIS_CACHE", str(tmp_path / "file" / "cache"))  # below a file, so that nothing is cached
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    write_slices(tmp_path / "data", subjects=(1,), slices=(0, 1), size=16)
    path = zip_folder(tmp_path / "data", tmp_path / "data.zip")
    rng, outcomes, intact = np.random.default_rng(0), collections.Counter(), path.read_bytes()
    table = intact.index(b"PK\1\2")
    before = sorted(tmp_path.rglob("*"))
    for i in range(count):
        if i % 4 < 2:
            kind, data = "anywhere", mutate(intact, rng)
        elif i % 4 == 2:
            kind, data = "table", intact[:table] + mutate(intact[table:], rng)
        else:
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr(NAME, png(slice_pixels(1, 0, 16)))
                archive.writestr(NAME.replace("slice_0", "slice_1"), mutate_png(png(slice_pixels(1, 1, 16)), rng))
            kind, data = "png", path.read_bytes()
        path.write_bytes(data)
        outcomes[kind, outcome(lambda: load_slices(path, image_size=16))] += 1
    print(outcomes)
    assert sorted(tmp_path.rglob("*")) == before
    assert all(outcomes[kind, "refused"] > count // 20 for kind in ("anywhere", "table", "png"))


@pytest.mark.parametrize("name", [f"../../../{NAME}", f"/tmp/{NAME}", "C:\\" + NAME.replace("/", "\\")])
def test_a_name_that_leads_out_of_a_zip_is_read_in_place(tmp_path, name):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    pixels, path = slice_pixels(1, 0, 16), tmp_path / "a" / "b" / "c" / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, png(pixels))
    assert np.array_equal(load_slices(path, image_size=16)[0, :, :, 0], pixels)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("name", ["keras_png_slices_train/case_{}_slice_0.nii.png", "scan_{}_1.png"])
def test_a_zip_with_a_name_of_5000_digits_is_refused(tmp_path, name):
    path = tmp_path / "long.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name.format("1" * 5000), png(slice_pixels(1, 0, 32)))
    with pytest.raises(OasisError, match="a file name of more than 4096 characters"):
        load_slices(path)


@pytest.mark.parametrize("method, size", [
    (zipfile.ZIP_DEFLATED, 2**28), (zipfile.ZIP_LZMA, 1000), (zipfile.ZIP_BZIP2, 1000)])
def test_a_zip_bomb_costs_no_memory(tmp_path, method, size):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(NAME, "w") as member:
        member.write(png(slice_pixels(1, 0, 16)))
        for _ in range(size // 2**20):
            member.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    expected = "ok" if method == zipfile.ZIP_DEFLATED else "refused"
    assert outcome(lambda: load_slices(path, image_size=16), memory=2**28) == expected


def test_a_png_that_claims_to_be_huge_costs_no_memory(tmp_path):
    """Its header names the largest size that is allowed, but it holds nearly no data."""
    path = tmp_path / "huge.zip"
    (kind, header), *others = png_chunks(png(slice_pixels(1, 0, 16)))
    assert kind == b"IHDR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(NAME, png_of([(kind, struct.pack(">II", 4096, 4096) + header[8:]), *others]))
    assert outcome(lambda: load_slices(path, image_size=16), memory=2**28) == "refused"


def test_a_folder_or_zip_that_holds_only_the_zip_is_refused(make_zip, tmp_path):
    path = make_zip()
    (tmp_path / "dataset").mkdir()
    inner = Path(shutil.move(path, tmp_path / "dataset"))
    with pytest.raises(OasisError, match=f"holds no images, but {inner}"):
        load_slices(tmp_path / "dataset")
    with pytest.raises(OasisError, match=f"outer.zip: holds no images, but {inner.name}"):
        load_slices(zip_folder(tmp_path / "dataset", tmp_path / "outer.zip"))


@pytest.mark.parametrize("limit, size", [(0, 16), (-1, 16), (None, 0), (None, -5), (3, 10**9), (None, 10**18)])
def test_an_impossible_number_of_slices_is_refused(make_zip, limit, size):
    with pytest.raises(OasisError):
        load_slices(make_zip(), image_size=size, limit=limit)


# ------------------------------------------------------------------------------------------------------------- seeds

def test_seeds_of_64_bits_are_all_different(model, tmp_path):
    """Larger seeds are refused."""
    network, diffusion, _ = load_model(model)
    seeds = [0, 2**32, 2**63 - 1, -2**63, -1]
    (_, images, _), = predict.generate({"CPU:0": network}, diffusion, seeds, sampler="dpm", steps=2)
    assert len({image.tobytes() for image in images}) == len(seeds)
    flags = ["--model", str(model), "--gif-path", str(tmp_path), "--seed", str(2**63 - 1), "--number-of-images", "2"]
    with pytest.raises(OasisError, match="64 bits.*--seed"):
        predict.main(flags)


def test_all_bits_of_a_training_seed_count(tiny):
    """They count in the initial parameters, in the timesteps and noise of a step, and in the order of the images."""
    seeds, parameters, losses, batches = (1, 2**32 + 1, 2**63 - 1), set(), set(), set()
    images = np.arange(24, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 1), np.uint8)
    for seed in seeds:
        trainer = trainer_of(tiny, f"--seed={seed}")
        parameters.add(trainer.parameters[0].numpy().tobytes())
        for parameter in trainer.parameters:
            parameter.assign(tf.zeros_like(parameter))
        losses.add(trainer.update(a_batch())[0].numpy().tobytes())
        batches.add(next(iter(make_dataset(images, 8, seed))).numpy().tobytes())
    assert len(parameters) == len(losses) == len(batches) == len(seeds)


# --------------------------------------------------------------------------------------------------------- exactness

def test_the_same_command_writes_the_same_bytes(tiny, model, tmp_path):
    files = []
    for folder in tmp_path / "one", tmp_path / "two":
        train.main([*tiny, "--max-steps", "7", "--save-every", "7", "--ckpt-path", str(folder)])
        predict.main(["--model", str(model), "--gif-path", str(folder), "--number-of-images", "2", "--sampler", "ddim",
                      "--steps", "5", "--frames", "3"])
        files.append(files_of(folder))
    names = [name for name in files[0]
             if name.endswith((".safetensors", ".gif")) or "seed" in name or "samples" in name]
    assert len(names) == 1 + 2 + 3 + 1
    assert all(files[0][name] == files[1][name] for name in names)

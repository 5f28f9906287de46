"""The bytes of a model file: safetensors with {name: array}, and the settings as JSON in the metadata.

This file needs numpy and safetensors alone, so a program without TensorFlow can write a model too.
"""
import hashlib
import json

import numpy as np
import safetensors.numpy

FORMAT = "oasis-brain-slice-diffusion"


def model_bytes(parameters, settings):
    """The bytes of a model file with {name: array} and settings that JSON can hold. Equal models have equal bytes."""
    settings = json.dumps(settings)
    metadata = {"format": FORMAT, "settings": settings, "sha256": model_digest(parameters, settings)}
    return sort_metadata(safetensors.numpy.save(parameters, metadata))


def model_digest(parameters, settings):
    """Return the SHA-256, in hexadecimal, of a model: of its settings and of the name, type, shape and bytes of each
    parameter. parameters: {name: array}. settings: a JSON text."""
    digest = hashlib.sha256(settings.encode())
    for name, array in sorted(parameters.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def sort_metadata(file):
    """The bytes of a safetensors file with its metadata sorted, which safetensors writes in random order."""
    length = int.from_bytes(file[:8], "little")
    header = json.loads(file[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # keeps the arrays aligned
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(file)[8 + length:]])

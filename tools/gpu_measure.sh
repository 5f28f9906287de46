#!/bin/sh
# Measures training and denoising on a GPU, of this repository and of two PyTorch repositories, in at most 6 minutes.
#
#     python tools/gpu_table.py prepare programs      first, where TensorFlow and jax==0.10.2 are; --tiny tries it out
#     sh tools/gpu_measure.sh programs                then, on the machine with the GPU, without TensorFlow
#
# Results go to $OUT (./gpu-results) as JSON, and the table is printed last. It needs JAX, PyTorch and
#     pip install denoising-diffusion-pytorch==2.1.1 ema-pytorch==0.8.3 diffusers==0.42.1 flatbuffers safetensors
# PYTHON names another interpreter, SECONDS_OURS and SECONDS_PEERS divide the time.
PROGRAMS=${1:?is the folder with the exported programs}
OUT=${OUT:-gpu-results}
PYTHON=${PYTHON:-python3}
TABLE=$(dirname "$0")/gpu_table.py
mkdir -p "$OUT" || exit 1
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
OURS=${SECONDS_OURS:-200}
PEERS=${SECONDS_PEERS:-105}
# A program that is compiling does not look at the clock, so each part is ended some seconds later.
timeout -k 5 $((OURS + 25)) "$PYTHON" "$TABLE" ours "$PROGRAMS" "$OUT" --seconds "$OURS" >"$OUT/ours.log" 2>&1
timeout -k 5 $((PEERS + 20)) "$PYTHON" "$TABLE" peers "$PROGRAMS" "$OUT" --seconds "$PEERS" >"$OUT/peers.log" 2>&1
tail -n 3 "$OUT/ours.log" "$OUT/peers.log"
"$PYTHON" "$TABLE" print "$OUT"

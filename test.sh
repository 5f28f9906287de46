#!/bin/sh
# Proves that the installation works: makes an environment (or reuses it), runs the tests, then the four scripts.
#
#     sh test.sh                        with python3
#     PYTHON=python3.12 sh test.sh      with another interpreter
#     sh test.sh -m slow                arguments go to pytest
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
ENVIRONMENT=.venv-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -x "$ENVIRONMENT/bin/python" ] || "$PYTHON" -m venv "$ENVIRONMENT"
"$ENVIRONMENT/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-evaluate.txt
export PATH="$PWD/$ENVIRONMENT/bin:$PATH"

python -m pytest -q "$@"

echo "smoke run of the four scripts"
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
python train.py --demo --max-steps 3 --dim 16 --batch-size 4 --ckpt-path "$SCRATCH/checkpoint"
python train.py --demo --max-steps 6 --dim 16 --batch-size 4 --ckpt-path "$SCRATCH/checkpoint"
python predict.py --model "$SCRATCH/checkpoint/demo64" --sampler dpm --number-of-images 2 --gif-path "$SCRATCH/gif"
python evaluate.py --model "$SCRATCH/checkpoint/demo64" --path dataset/sample_slices.zip --number-of-images 20 --batch-size 10 \
    --output "$SCRATCH/evaluation"
echo "all is well"

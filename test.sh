#!/bin/sh
# Proves that the installation works: creates an environment, or reuses it, and runs the three scripts on the sample slices.
#
#     sh test.sh                        with python3, a few minutes
#     PYTHON=python3.12 sh test.sh      with another interpreter
#     sh test.sh --all                  all tests before that; further arguments go to pytest
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
ENVIRONMENT=.venv-$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ -x "$ENVIRONMENT/bin/python" ] || "$PYTHON" -m venv "$ENVIRONMENT"
"$ENVIRONMENT/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-evaluate.txt \
    -r requirements-volumes.txt
export PATH="$PWD/$ENVIRONMENT/bin:$PATH"

if [ "$1" = "--all" ]; then
    shift
    python -m pytest -q --durations=15 "$@"
fi

echo "smoke run: train, resume, generate, judge"
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT
DEMO="--demo --dim 16 --batch-size 4 --ckpt-path $SCRATCH/runs"
python train.py $DEMO --max-steps 3
python train.py $DEMO --max-steps 6
python predict.py --model "$SCRATCH/runs/demo64" --sampler dpm --number-of-images 2 --gif-path "$SCRATCH/gif"
python evaluate.py --model "$SCRATCH/runs/demo64" --path dataset/sample_slices.zip --number-of-images 20 --batch-size 10 \
    --output "$SCRATCH/evaluation"
echo "all is well"

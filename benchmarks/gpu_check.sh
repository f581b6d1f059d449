#!/usr/bin/env bash
# Everything that needs a CUDA device: the tests marked gpu, then a short table of timings.
# Needs torch, pytest, pytest-xdist and hypothesis; no installation of structmat.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export TRITON_INTERPRET=0  # compiled kernels, not the interpreter of the CPU tests
python=${PYTHON:-python3}

"$python" -c "import torch, triton; print(torch.cuda.get_device_name(), 'torch', torch.__version__, 'triton', triton.__version__)"
"$python" -m pytest -m gpu -q -n "${JOBS:-$(($(nproc) < 14 ? $(nproc) : 14))}" -p no:cacheprovider "$@"
"$python" benchmarks/kernels.py --quick

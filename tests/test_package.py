"""Importing is light: no triton, no GPU, no optional dependency."""

import subprocess
import sys

import structmat

OPTIONAL = ["triton", "matplotlib", "transformers", "hypothesis", "gensim", "pandas"]


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_pulls_in_nothing_optional():
    code = (
        "import sys, torch; before = set(sys.modules); import structmat, structmat_kernels;"
        f"print([m for m in {OPTIONAL} if m in sys.modules and m not in before], torch.cuda.is_initialized())"
    )
    assert run(code) == "[] False"


def test_public_names_exist():
    for name in structmat.__all__:
        assert hasattr(structmat, name), name
    assert len(set(structmat.__all__)) == len(structmat.__all__)


def test_kernels_do_not_import_structmat():
    code = "import sys, structmat_kernels.monarch, structmat_kernels.block_diagonal; print('structmat' in sys.modules)"
    assert run(code) == "False"

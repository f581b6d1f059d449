"""Operations on raw tensors that structmat's classes are made of, one folder each; never imports structmat.

Each folder holds ``reference.py``: plain PyTorch, readable, the definition of the operation; Triton kernels with their
launchers; and ``op.py``, which registers the operation and its derivatives. Triton is imported when one first runs.
"""

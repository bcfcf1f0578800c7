"""Operators over the packed pages: one public op, one signature.

`reference.py` is plain torch: the oracle of every kernel, and what torch.compile compiles. Kernels
(`triton_*.py`) have the same names and signatures; the two never import each other.
"""

"""Triton kernels: device functions, and one record per kernel from which eager and compiled code follow.

Each kernel module holds, in this order: device functions that compute a tile; the kernel, which stores it; ``plan``,
``grid``, ``heuristic`` and ``candidates``; the record. See ``kernel.py``.
"""

"""Triton kernels of the selected branch: device functions, eager kernels, launchers and the Inductor shells.

Each kernel module holds, in this order: device functions (``*_tile``, ``*_step``) that compute a tile and return it;
the eager kernel, which calls them and stores; ``meta``, the compile-time constants and launch options for a problem;
and ``launch``. The ``.jinja`` shell beside it calls the same device functions, so there is one source for eager and
for Inductor.
"""

"""Measures the constants of the cost model on the GPU that is here: ``python -m fsa_compile.calibrate``.

``grid`` is what is measured, ``timing`` how; ``fit`` turns times into constants, ``report`` says what they are worth on
the half of the grid that the fit has not seen.
"""

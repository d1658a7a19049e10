"""What tests and benchmarks of this package, and of packages built on it, share.

``specs`` names problems and ``inputs`` makes their tensors; ``calls`` calls an operator, its reference and its backward
on them; ``budget`` holds the error against a float64 reference; ``strategies`` draws specs (needs hypothesis);
``fake_gpu`` shows the code that Inductor emits for a GPU that is not there; ``compile_only`` compiles kernels for one.
Nothing else in the package imports from here, but for ``calibrate``, which draws its selections as the benchmarks do.
"""

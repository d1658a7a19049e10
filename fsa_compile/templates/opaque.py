"""What the compiler is not to see."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def at_run_time(x):
    """``x``, an int32, of which the compiler does not see what it is.

    A template's lengths: where they are constants, ptxas takes the matrix products of dk and dv one after the other,
    for want of registers (13.0 ms for 10.9). A loop's counter: where LLVM sees it, each of a thread's addresses is
    carried by itself, for two more instructions and two registers each (a window's forward 1.42 ms for 1.36).
    """
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("", "=r,0", [x], dtype=tl.int32, is_pure=True, pack=1)

"""Triton's interpreter, made to round as a GPU does."""

import dataclasses

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def round_bf16_to_nearest() -> None:
    """Make float32 -> bf16 round to nearest even in the interpreter of this process.

    The interpreter cuts the lower bits off, where compiled Triton and the hardware round; with
    that, a right kernel has twice the error of torch, and no tolerance could tell it from a wrong
    one.
    """
    cut = interpreter._convert_float

    def convert(value, input_dtype, output_dtype, rounding_mode):
        if input_dtype != tl.float32 or output_dtype != tl.bfloat16:
            return cut(value, input_dtype, output_dtype, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(value, np.float32)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(value.shape)

    interpreter._convert_float = convert


def multiply_as_a_gpu() -> None:
    """Make tl.dot in the interpreter of this process multiply bf16 numbers, and all rows alike.

    The interpreter keeps bf16 as 16-bit integers and hands those to numpy; and there the BLAS adds
    up in another order at the edge of a tile, on some machines, so that the bits of a row depend on
    its place. A loop over the products does not.
    """

    def wide(self, x):
        assert x.dtype.scalar.primitive_bitwidth > 8, f"{x.dtype} is not multiplied as it is"
        return self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self, a, b, d, *rest):
        a, b = wide(self, a).data, wide(self, b).data
        how = {"dtype": d.data.dtype, "casting": "unsafe", "optimize": False}
        products = np.einsum("...ik,...kj->...ij", a, b, **how)
        return interpreter.TensorHandle(products + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def patch_the_language_once() -> None:
    """Let a jitted helper run in the language as its kernel's launch has patched it.

    The interpreter looks through all of triton.language at each call of a helper, such as tl.sum:
    a millisecond, where a small program takes five.
    """
    patch = interpreter._patch_lang

    def patch_if_new(function):
        modules = [value for value in function.__globals__.values() if value in (tl, tl.core)]
        if any(tl.core.is_builtin(module.load) for module in modules):
            return patch(function)

    interpreter._patch_lang = patch_if_new


def skip_overflow_checks() -> None:
    """Do integer arithmetic once, not again in int64 to compare: a third of a program's time.

    The shapes of these tests are far from 2^31; a GPU does not check either.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

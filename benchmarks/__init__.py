"""Benchmarks of the ops, and what the compilers make of the kernels."""

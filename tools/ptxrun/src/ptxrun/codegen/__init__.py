"""Kernel -> basic blocks -> one generated Python function per block, over arrays of lanes."""

from .blocks import Block, CompiledKernel, compile_kernel, with_instructions

__all__ = ["Block", "CompiledKernel", "compile_kernel", "with_instructions"]

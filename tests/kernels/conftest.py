"""Triton's interpreter runs these tests where there is no GPU."""

from tests.kernels.quick_interpreter import quicken_the_interpreter

quicken_the_interpreter()

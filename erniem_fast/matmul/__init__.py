"""The float32 matrix products on the CPU, by the library that is fastest there."""

from .dispatch import library_of, linear, may_choose
from .fastest import FORWARD, KINDS
from .libraries import NATIVE

__all__ = ["FORWARD", "KINDS", "NATIVE", "library_of", "linear", "may_choose"]

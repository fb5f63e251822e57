"""The classifier two-sample test of the sbi benchmark; it lives in the package."""

from pyro_invman.diagnostics import c2st

__all__ = ["c2st"]

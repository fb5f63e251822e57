"""Densities over incomplete rows, in torch alone."""

"""The command line: ``python -m pyro_invman``, or ``invman``."""

from pyro_invman.cli.fitting import held_out_report
from pyro_invman.cli.printed import quantile_rows
from pyro_invman.cli.run import main

__all__ = ["held_out_report", "main", "quantile_rows"]

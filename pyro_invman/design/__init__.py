"""Which measurement next: the information gain of any Pyro model, with bounds, and designs that raise it."""

from pyro_invman.design.campaign import Campaign
from pyro_invman.design.experiment import Draws, Experiment, Site
from pyro_invman.design.gain import expected_information_gain
from pyro_invman.design.optimum import optimize
from pyro_invman.design.sequential import Search, Sequential
from pyro_invman.design.told import total_information

__all__ = [
    "Campaign",
    "Draws",
    "Experiment",
    "Search",
    "Sequential",
    "Site",
    "expected_information_gain",
    "optimize",
    "total_information",
]

"""Which measurement next: the information gain of any Pyro model, with bounds, and designs that raise it."""

from pyro_invman.design.campaign import Campaign
from pyro_invman.design.experiment import Draws, Experiment, Site

__all__ = ["Campaign", "Draws", "Experiment", "Site"]

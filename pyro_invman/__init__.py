"""Inverse problems that recur: one joint density over incomplete rows, every conditional of it a Pyro distribution."""

from pyro_invman import design, diagnostics, simulators
from pyro_invman.completion import Completion
from pyro_invman.data import from_columns, read, validate
from pyro_invman.declared import Simulator
from pyro_invman.density.coupling import Coupling
from pyro_invman.density.queries import QueryMix
from pyro_invman.density.velocity import Solver
from pyro_invman.distributions import ConditionalFlow
from pyro_invman.identification import UnidentifiedConditional
from pyro_invman.inference_data import to_datatree
from pyro_invman.information import MutualInformation
from pyro_invman.joint import JointFlow
from pyro_invman.populations import SmallPopulation, UnfamiliarCondition
from pyro_invman.saved import load
from pyro_invman.tasks.manifold import ProcessManifold
from pyro_invman.tasks.posterior import TaskPosterior
from pyro_invman.tasks.typicality import UnfamiliarTask
from pyro_invman.training import Schedule
from pyro_invman.transport import ConditionalTransport
from pyro_invman.variables import DataError, Variable, Variables

__version__ = "0.1.0"
__all__ = [
    "Completion",
    "ConditionalFlow",
    "ConditionalTransport",
    "Coupling",
    "DataError",
    "JointFlow",
    "MutualInformation",
    "ProcessManifold",
    "QueryMix",
    "Schedule",
    "Simulator",
    "SmallPopulation",
    "Solver",
    "TaskPosterior",
    "UnfamiliarCondition",
    "UnfamiliarTask",
    "UnidentifiedConditional",
    "Variable",
    "Variables",
    "design",
    "diagnostics",
    "from_columns",
    "load",
    "read",
    "simulators",
    "to_datatree",
    "validate",
]

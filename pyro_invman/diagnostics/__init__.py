"""Can the answer be trusted: calibration, coverage, two-sample tests, predictive checks, verdicts, reports."""

from pyro_invman.diagnostics.answers import Answers, HeldOut, answers, ask
from pyro_invman.diagnostics.calibration import coverage, sbc, tarp
from pyro_invman.diagnostics.page import page
from pyro_invman.diagnostics.predictive import predictive_check
from pyro_invman.diagnostics.recalibration import Conformal, Temperature, Tempered, conformal, temperature
from pyro_invman.diagnostics.reference import Reference
from pyro_invman.diagnostics.report import report
from pyro_invman.diagnostics.two_sample import c2st
from pyro_invman.diagnostics.uniform import simultaneous_band, uniformity
from pyro_invman.diagnostics.verdict import Verdict, judge

__all__ = [
    "Answers",
    "Conformal",
    "HeldOut",
    "Reference",
    "Temperature",
    "Tempered",
    "Verdict",
    "answers",
    "ask",
    "c2st",
    "conformal",
    "coverage",
    "judge",
    "page",
    "predictive_check",
    "report",
    "sbc",
    "simultaneous_band",
    "tarp",
    "temperature",
    "uniformity",
]

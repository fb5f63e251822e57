r"""Laser melting of metal powder: tasks are alloys on machines whose absorptivity and true beam are hidden.

A fast stand-in for experiments with known truth, not a predictor for practice. The melt pool is the melting
isotherm of the Eagar-Tsai solution; above a threshold of the keyhole number (the normalised enthalpy)

.. math::
    \mathrm{Ke} = \frac{A P}{\pi \rho c (T_m - T_0) \sqrt{a v r^3}}, \qquad e = 0.4\, (\mathrm{Ke} - 1.4)\, r

vapour digs a keyhole of depth e below a beam of radius r, and far above it leaves pores; where neighbouring
tracks and layers do not overlap, powder stays unmelted.

References:
    | Temperature fields produced by traveling distributed heat sources (Eagar & Tsai, 1983)
    | Observation of keyhole-mode laser melting in laser powder-bed fusion (King et al., 2014)
    | A simple methodology for predicting laser-weld properties (Hann, Iammi & Folkes, 2011)
    | Universal scaling laws of keyhole stability and porosity in 3D printing of metals (Gan et al., 2021)
    | Prediction of lack-of-fusion porosity for powder bed fusion (Tang, Pistorius & Beuth, 2017)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_invman.data import from_tensor, validate
from pyro_invman.simulators import eagar_tsai
from pyro_invman.variables import DataError, Variable, Variables

if TYPE_CHECKING:
    import xarray as xr

AMBIENT_K = 300.0
HATCH_UM = 80.0  # distance between neighbouring tracks
RESOLUTION_UM = 0.5  # a dimension d is seen as sqrt(d^2 + RESOLUTION_UM^2), also where nothing melts
NOISE = {"depth_um": 0.08, "width_um": 0.05, "length_um": 0.10, "porosity_pct": 0.20}
"""Standard deviation of the logarithm of what an experiment records."""
ABSORPTIVITY_SPREAD = 0.6  # the hidden logit lies uniformly within this of the alloy's nominal one
BEAM_OFFSET_UM = 12.0  # the true beam is wider than its setting by at most this, or narrower
CALORIMETRY_ERROR = 0.15  # error of the logit of the absorptivity that an analytic row is computed with

ALLOYS = {  # density kg/m^3, heat capacity J/kg/K, conductivity W/m/K, melting point K, nominal absorptivity
    "Ti-6Al-4V": (4430.0, 560.0, 7.2, 1923.0, 0.35),
    "Ti": (4510.0, 523.0, 17.0, 1941.0, 0.40),
    "316L": (7950.0, 500.0, 16.3, 1690.0, 0.35),
    "304L": (8000.0, 500.0, 16.2, 1697.0, 0.35),
    "17-4PH": (7780.0, 460.0, 18.0, 1713.0, 0.36),
    "H13": (7760.0, 460.0, 24.4, 1727.0, 0.36),
    "Maraging 300": (8100.0, 450.0, 20.0, 1686.0, 0.35),
    "IN718": (8190.0, 435.0, 11.4, 1609.0, 0.38),
    "IN625": (8440.0, 410.0, 9.8, 1623.0, 0.38),
    "Hastelloy X": (8220.0, 486.0, 9.2, 1628.0, 0.37),
    "CoCrMo": (8300.0, 452.0, 13.0, 1680.0, 0.40),
    "Invar 36": (8050.0, 515.0, 10.5, 1700.0, 0.35),
    "NiTi": (6450.0, 490.0, 10.0, 1583.0, 0.38),
    "AlSi10Mg": (2670.0, 915.0, 130.0, 867.0, 0.20),
    "CuSn10": (8780.0, 377.0, 50.0, 1270.0, 0.20),
}
"""Handbook values, rounded, at about room temperature."""

SOURCES = ("experiment", "analytic")
VARIABLES = Variables(
    [
        Variable("power_W", "parameter", "positive", "W"),
        Variable("speed_mm_s", "parameter", "positive", "mm/s"),
        Variable("beam_um", "parameter", "positive", "um"),
        Variable("layer_um", "parameter", "positive", "um"),
        Variable("absorptivity", "parameter", "interval", "1", 0.0, 1.0),
        Variable("beam_offset_um", "parameter", "interval", "um", -BEAM_OFFSET_UM, BEAM_OFFSET_UM),
        Variable("rho_kg_m3", "condition", "positive", "kg/m^3"),
        Variable("cp_J_kgK", "condition", "positive", "J/kg/K"),
        Variable("k_W_mK", "condition", "positive", "W/m/K"),
        Variable("tmelt_K", "condition", "positive", "K"),
        Variable("depth_um", "observation", "positive", "um"),
        Variable("width_um", "observation", "positive", "um"),
        Variable("length_um", "observation", "positive", "um"),
        Variable("porosity_pct", "observation", "positive", "%"),
    ]
)

_PROPERTIES = VARIABLES.with_role("condition")
_PROPERTY_SPREAD = 0.10
_HIDDEN = ("absorptivity", "beam_offset_um")
_LOWEST = {"power_W": 60.0, "speed_mm_s": 100.0, "beam_um": 60.0, "layer_um": 20.0}
_HIGHEST = {"power_W": 500.0, "speed_mm_s": 2500.0, "beam_um": 130.0, "layer_um": 80.0}
_LEAST_KE, _MOST_KE = 1.25, 15.0  # at nominal absorptivity and beam; every track then melts in truth
_SETTING_UNREPORTED = 0.15  # share of tasks that do not report the beam, and likewise the layer
_POROSITY_RECORDED = 0.10
_RECORDS = (  # how often an experiment records which of depth, width, length
    (0.35, (True, True, False)),  # section
    (0.25, (True, False, False)),  # section, depth alone reported
    (0.25, (False, True, True)),  # view from above
    (0.15, (False, True, False)),  # view from above, width alone reported
)
_POROSITY_FLOOR = 0.05  # per cent
_POWDER_VOIDS = 0.45  # share of unmelted powder that is empty


class MeltPool(NamedTuple):
    """Depth, width and length of the melt pool and porosity of the part, all of one shape."""

    depth_um: Tensor
    width_um: Tensor
    length_um: Tensor
    porosity_pct: Tensor


def forward(
    power_W: Tensor | float,
    speed_mm_s: Tensor | float,
    beam_um: Tensor | float,
    layer_um: Tensor | float,
    rho_kg_m3: Tensor | float,
    cp_J_kgK: Tensor | float,
    k_W_mK: Tensor | float,
    tmelt_K: Tensor | float,
    absorptivity: Tensor | float,
    beam_offset_um: Tensor | float = 0.0,
    *,
    source: str = "experiment",
) -> MeltPool:
    r"""Melt pool without noise, differentiable (once) in every argument.

    An experiment records each of these times `exp(NOISE[name] * e)`, with e standard normal. The source
    "analytic" is cheap and biased: a point source at high speed after Rosenthal, without beam or keyhole,

    .. math::
        W = 2 D = \sqrt{\frac{8 A P}{\pi e \rho c v (T_m - T_0)}}, \qquad L = \frac{A P}{2 \pi k (T_m - T_0)}

    Where nothing melts, the dimensions come out as `RESOLUTION_UM`. Computed in float64 and returned in the
    widest floating type of the tensors among the arguments, float64 if there is none.

    Arguments:
        power_W, speed_mm_s, beam_um, layer_um: Laser power, speed, beam diameter (1/e^2) and layer thickness;
            positive.
        rho_kg_m3, cp_J_kgK, k_W_mK, tmelt_K: Density, heat capacity, conductivity; melting point above
            `AMBIENT_K`.
        absorptivity: Share of the power that heats the metal, in (0, 1].
        beam_offset_um: The true beam diameter, `beam_um + beam_offset_um`, must be positive.
        source: "experiment" or "analytic".

    All broadcast; NaN gives NaN. Raises `DataError` for any other value without meaning.

    Example:
        >>> rho, cp, k, tmelt, absorptivity = ALLOYS["316L"]
        >>> pool = forward(200.0, 800.0, 80.0, 40.0, rho, cp, k, tmelt, absorptivity)
        >>> [round(size.item()) for size in pool[:3]]
        [102, 128, 516]
    """
    given = {"power_W": power_W, "speed_mm_s": speed_mm_s, "beam_um": beam_um, "layer_um": layer_um}
    given |= {"rho_kg_m3": rho_kg_m3, "cp_J_kgK": cp_J_kgK, "k_W_mK": k_W_mK, "tmelt_K": tmelt_K}
    given |= {"absorptivity": absorptivity, "beam_offset_um": beam_offset_um}
    if source not in SOURCES:
        raise DataError(f"source is {source!r}; expected one of {', '.join(SOURCES)}")
    types = [value.dtype for value in given.values() if isinstance(value, Tensor) and value.is_floating_point()]
    rows = torch.broadcast_tensors(*(torch.as_tensor(value, dtype=torch.float64) for value in given.values()))
    values = dict(zip(given, rows, strict=True))
    _check(values)
    dtype = reduce(torch.promote_types, types) if types else torch.float64
    return MeltPool(*(size.to(dtype) for size in _melt(_track(values), source)))


class _Track(NamedTuple):
    """A melt track in SI units; the intensity is 1/e^2 at `radius`, `rise` is from ambient to melting."""

    absorbed: Tensor
    speed: Tensor
    radius: Tensor
    layer: Tensor
    heat_capacity: Tensor
    conductivity: Tensor
    rise: Tensor

    @property
    def diffusivity(self) -> Tensor:
        return self.conductivity / self.heat_capacity

    @property
    def keyhole_number(self) -> Tensor:
        """Ke; 2.65 a/r keeps it in step with the peak temperature where heat leaves before the beam does."""
        speed = self.speed + 2.65 * self.diffusivity / self.radius
        enthalpy = math.pi * self.heat_capacity * self.rise
        return self.absorbed / (enthalpy * (self.diffusivity * speed * self.radius**3).sqrt())


def _track(values: Mapping[str, Tensor]) -> _Track:
    return _Track(
        absorbed=values["absorptivity"] * values["power_W"],
        speed=values["speed_mm_s"] * 1e-3,
        radius=(values["beam_um"] + values["beam_offset_um"]) * 0.5e-6,
        layer=values["layer_um"] * 1e-6,
        heat_capacity=values["rho_kg_m3"] * values["cp_J_kgK"],
        conductivity=values["k_W_mK"],
        rise=values["tmelt_K"] - AMBIENT_K,
    )


def _check(values: Mapping[str, Tensor]) -> None:
    checked = dict(values)
    checked["beam_um + beam_offset_um"] = checked["beam_um"] + checked.pop("beam_offset_um")
    for name, value in checked.items():
        least = AMBIENT_K if name == "tmelt_K" else 0.0
        most = 1.0 if name == "absorptivity" else torch.finfo(value.dtype).max
        wrong = ((value <= least) | (value > most)).reshape(-1)
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise DataError(
                f"{name} is {value.reshape(-1)[row].item():g} in row {row}; expected a value above {least:g}"
                f"{' and at most 1' if most == 1 else ', finite'}; check the units"
            )


def _melt(track: _Track, source: str) -> MeltPool:
    if source == "analytic":
        heat = track.heat_capacity * track.rise
        width = (8 * track.absorbed / (math.pi * math.e * heat * track.speed)).sqrt()
        length = track.absorbed / (2 * math.pi * track.conductivity * track.rise)
        depth, pores = width / 2, torch.zeros_like(width)
    else:
        waist = track.radius / 2**0.5
        level = math.pi**1.5 * track.conductivity * waist * track.rise / track.absorbed
        pool = eagar_tsai.isotherm(track.speed * waist / (4 * track.diffusivity), level)
        ke = track.keyhole_number
        keyhole, pores = 0.4 * track.radius * _hinge(ke - 1.4), 0.25 * _hinge(ke - 6)
        depth = ((pool.depth * waist) ** 4 + keyhole**4) ** 0.25
        width, length = pool.width * waist, pool.length * waist
    depth, width, length = (((1e6 * size).square() + RESOLUTION_UM**2).sqrt() for size in (depth, width, length))
    porosity = _POROSITY_FLOOR + pores + _unmelted(1e6 * track.layer, depth, width)
    return MeltPool(depth, width, length, porosity)


def _hinge(x: Tensor) -> Tensor:
    """max(x, 0), with the corner rounded over 0.2."""
    return torch.nn.functional.softplus(x, beta=5.0)


def _unmelted(layer: Tensor, depth: Tensor, width: Tensor) -> Tensor:
    r"""Voids (per cent) that lack of fusion leaves in a cell of `HATCH_UM` by one layer.

    Tracks are half ellipses of semi-axes W/2 and D: at distance y from a track, the layer is melted to the
    depth :math:`\min(L, D \sqrt{1 - (2y/W)^2})`. Nothing is left if :math:`(H/W)^2 + (L/D)^2 \le 1`.
    """
    rounding = 1e-12  # keeps gradients finite where an arc ends
    half, reach = HATCH_UM / width, (1 - (layer / depth).square()).clamp_min(rounding).sqrt()
    full = torch.minimum(reach, half)  # as far as the layer is melted through
    arc = [s.asin() + s * (1 - s.square()).sqrt() for s in (full, half.clamp_max(1 - rounding))]
    covered = (full + depth / layer * (arc[1] - arc[0]).clamp_min(0) / 2) / half
    return 100 * _POWDER_VOIDS * (1 - covered).clamp_min(0)


def simulate(
    num_tasks: int,
    rows_per_task: int,
    seed: int,
    sources: Sequence[str] = ("experiment",),
    missing: bool = True,
    reveal_hidden: float = 0.5,
) -> xr.Dataset:
    """Melt tracks of many alloys on many machines, incomplete as in practice.

    A task is a variant of an alloy (properties within 10 % of the table's) on a machine; a machine, with its
    beam offset, serves four tasks on average. Settings are drawn log-uniformly where the metal melts without
    drilling, anew for each source. An experiment records a section (depth and width, or depth alone) or a
    view from above (width and length, or width alone), seldom porosity; some tasks do not report beam or
    layer. The analytic source records depth, width and length; its absorptivity comes from calorimetry, with
    an error of its own in each row.

    The same seed gives the same tracks whatever is hidden; `missing=False, reveal_hidden=1.0` shows it all.

    Arguments:
        num_tasks: Number of tasks T.
        rows_per_task: Rows of each task from each source.
        seed: Of everything that is drawn.
        sources: One or both of "experiment" and "analytic".
        missing: Whether cells go missing; the hidden truths are governed by `reveal_hidden` alone.
        reveal_hidden: Share of tasks in which `absorptivity` and `beam_offset_um`, constant in a task, are
            known.

    Returns:
        Rows with coordinates `task` and `source`, ordered by task, then source.

    Example:
        >>> runs = simulate(num_tasks=4, rows_per_task=5, seed=0)
        >>> runs.sizes["row"], len(runs.data_vars)
        (20, 14)
    """
    for label, count in (("num_tasks", num_tasks), ("rows_per_task", rows_per_task)):
        if count < 1:
            raise DataError(f"{label} is {count}; expected at least 1")
    if not sources or len(set(sources)) < len(sources) or not set(sources) <= set(SOURCES):
        raise DataError(f"sources is {sources!r}; expected some of {', '.join(SOURCES)}, each once")
    if not 0 <= reveal_hidden <= 1:
        raise DataError(f"reveal_hidden is {reveal_hidden}; expected a share between 0 and 1")
    generator = torch.Generator().manual_seed(seed)
    names, task = _draw_tasks(num_tasks, generator)
    hidden = _some(num_tasks, 1 - reveal_hidden, generator)
    left_out = dict.fromkeys(_HIDDEN, hidden)
    for name in ("beam_um", "layer_um"):
        left_out[name] = _some(num_tasks, _SETTING_UNREPORTED, generator) & missing
    seeds = dict(zip(SOURCES, torch.randint(2**62, (len(SOURCES),), generator=generator).tolist(), strict=True))
    parts = [_draw_rows(task, rows_per_task, source, seeds[source], missing) for source in sources]
    columns = {name: torch.cat([cells[name] for cells in parts], -1) for name in VARIABLES.names}
    columns |= {name: columns[name].masked_fill(tasks, math.nan) for name, tasks in left_out.items()}
    rows = from_tensor(torch.stack(list(columns.values()), -1).flatten(0, 1), VARIABLES)
    task_of_row = [name for name in names for _ in range(len(sources) * rows_per_task)]
    source_of_row = [source for source in sources for _ in range(rows_per_task)] * num_tasks
    labelled = rows.assign_coords(task=("row", task_of_row), source=("row", source_of_row))
    return validate(labelled, training=False)


def _uniform(lower: float, upper: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return lower + (upper - lower) * torch.rand(shape, dtype=torch.float64, generator=generator)


def _some(num_tasks: int, share: float, generator: torch.Generator) -> Tensor:
    """A share of the tasks, drawn at random: bool (T, 1)."""
    return torch.randperm(num_tasks, generator=generator).unsqueeze(-1) < round(share * num_tasks)


def _draw_tasks(num_tasks: int, generator: torch.Generator) -> tuple[list[str], dict[str, Tensor]]:
    """Names of the tasks, and what is constant in each, (T, 1): properties, hidden truths and `nominal`."""
    alloys = torch.randint(len(ALLOYS), (num_tasks,), generator=generator)
    machines = torch.randint(-(-num_tasks // 4), (num_tasks,), generator=generator)
    offsets = _uniform(-BEAM_OFFSET_UM, BEAM_OFFSET_UM, (num_tasks,), generator)
    spread = _uniform(1 - _PROPERTY_SPREAD, 1 + _PROPERTY_SPREAD, (num_tasks, len(_PROPERTIES)), generator)
    shift = _uniform(-ABSORPTIVITY_SPREAD, ABSORPTIVITY_SPREAD, (num_tasks, 1), generator)
    *properties, nominal = torch.tensor(list(ALLOYS.values()), dtype=torch.float64)[alloys].split(1, -1)
    task = {name: p * s for name, p, s in zip(_PROPERTIES, properties, spread.split(1, -1), strict=True)}
    task |= {"nominal": nominal, "absorptivity": (nominal.logit() + shift).sigmoid()}
    task["beam_offset_um"] = offsets[machines].unsqueeze(-1)
    labels = enumerate(zip(alloys.tolist(), machines.tolist(), strict=True))
    return [f"{list(ALLOYS)[alloy]} {t} on machine {machine}" for t, (alloy, machine) in labels], task


def _draw_rows(
    task: Mapping[str, Tensor], rows_per_task: int, source: str, seed: int, missing: bool
) -> dict[str, Tensor]:
    """All cells of one source, (T, rows) each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(task["nominal"]), rows_per_task)
    known = {name: task[name].expand(shape) for name in (*_PROPERTIES, *_HIDDEN)}
    settings = _draw_settings(task, shape, generator)
    noise = torch.randn((len(NOISE), *shape), dtype=torch.float64, generator=generator)
    form = torch.multinomial(
        torch.tensor([share for share, _ in _RECORDS]), noise[0].numel(), True, generator=generator
    )
    recorded = torch.tensor([(*seen, False) for _, seen in _RECORDS])[form].reshape(*shape, len(NOISE))
    recorded[..., 3] = torch.rand(shape, generator=generator) < _POROSITY_RECORDED
    if source == "analytic":
        believed = (known["absorptivity"].logit() + CALORIMETRY_ERROR * noise[0]).sigmoid()
        recorded = torch.tensor([True, True, True, False]).expand_as(recorded)
        sizes = torch.stack(_melt(_track(settings | known | {"absorptivity": believed}), source))
    else:
        scale = torch.tensor(list(NOISE.values()), dtype=torch.float64).reshape(-1, 1, 1)
        sizes = torch.stack(_melt(_track(settings | known), source)) * (scale * noise).exp()
    if missing:
        sizes = sizes.masked_fill(~recorded.movedim(-1, 0), math.nan)
    return settings | known | dict(zip(NOISE, sizes, strict=True))


def _draw_settings(task: Mapping[str, Tensor], shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Settings (T, rows), drawn anew where a track of nominal absorptivity would not melt or would drill."""
    fixed = {name: task[name].expand(shape) for name in _PROPERTIES}
    fixed |= {"absorptivity": task["nominal"], "beam_offset_um": torch.zeros(())}
    settings = {name: torch.zeros(shape, dtype=torch.float64) for name in _LOWEST}
    wanted = torch.ones(shape, dtype=torch.bool)
    while wanted.any():
        for name in settings:
            drawn = _uniform(math.log(_LOWEST[name]), math.log(_HIGHEST[name]), shape, generator).exp()
            settings[name] = torch.where(wanted, drawn, settings[name])
        ke = _track(settings | fixed).keyhole_number
        wanted = (ke < _LEAST_KE) | (ke > _MOST_KE)
    return settings

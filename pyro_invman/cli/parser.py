"""What can be typed: commands, their options, and a worked example of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from pyro_invman.cli.asking import impute, infer, predict
from pyro_invman.cli.demo import demo
from pyro_invman.cli.describe import describe
from pyro_invman.cli.designs import design
from pyro_invman.cli.fitting import fit
from pyro_invman.cli.project import NAME
from pyro_invman.cli.reporting import report
from pyro_invman.cli.tasks import fingerprint
from pyro_invman.tasks.inference import METHODS
from pyro_invman.tasks.manifold import PRIORS

Command = Callable[[argparse.Namespace], None]

_START = f"""\
from a table of your own:
  {{prog}} describe runs.csv                  what is in it, and a first {NAME} to check
  {{prog}} fit runs.csv --out model           learn from it
  {{prog}} infer model --given depth=120      which settings made it
  {{prog}} predict model --given power=200    what would be measured
or watch it on a simulated process:
  {{prog}} demo
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as of any other failure; exit status 2."""
        self.exit(2, f"{self.prog}: {message} (--help says what can be typed)\n")


def _count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least 1")
    return int(text)


def _sheet(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def parser(prog: str) -> argparse.ArgumentParser:
    """The parser of all commands, for a program that is called `prog`."""
    top = _Parser(
        prog,
        description="Inverse problems, learned from incomplete tables.",
        epilog=_START.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.set_defaults(prog=prog)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.".replace("%%", "%"),
            epilog="example:\n" + "\n".join(f"  {prog} {line}" for line in example.splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        command.add_argument(
            "--threads", type=_count, default=1, help="of the processor (default: 1, which disturbs least)"
        )
        return command

    _demo(add("demo", demo, "fit a simulated laser-melting process and ask it an inverse question", "demo --out demo"))
    _describe(
        add(
            "describe",
            describe,
            f"say what is in a table and what it likely means, and write a first {NAME}",
            "describe runs.csv\ndescribe runs.csv --look --json",
        )
    )
    _fit(
        add(
            "fit",
            fit,
            "learn from a table with holes: a joint density, or a manifold over tasks where a column names them",
            "fit runs.csv --out model\n"
            "fit runs.csv --roles power_W=parameter,depth_um=observation --supports power_W=positive --out model",
        )
    )
    _ask(
        add(
            "infer",
            infer,
            "which settings made it: p(parameters | given), median and 90 %% interval",
            "infer model --given depth_um=120 --targets power_W,speed_mm_s\n"
            "infer model --given depth_um=120 --rows new_task.csv\n"
            "infer model --table questions.csv --out draws.csv",
        ),
        "parameters",
    )
    _ask(
        add(
            "predict",
            predict,
            "what would be measured: p(observations | given), median and 90 %% interval",
            "predict model --given power_W=200,speed_mm_s=800\n"
            "predict model --given power_W=200,speed_mm_s=800 --rows new_task.csv",
        ),
        "observations",
    )
    _impute(
        add("impute", impute, "complete a table's missing cells by draws", "impute model runs.csv --out filled.csv")
    )
    _fingerprint(
        add(
            "fingerprint",
            fingerprint,
            "whether a task belongs to what was learned, and which known tasks it is like",
            "fingerprint model --rows new_task.csv\nfingerprint model --rows runs.csv --of Ti64",
        )
    )
    _design(
        add(
            "design",
            design,
            "which rows of a task to measure next, by information gained for what it costs",
            "design model --rows new_task.csv --grid power_W=100:400:7,speed_mm_s=200:2000:7 --n 3\n"
            "design model --rows new_task.csv --candidates could_do.csv --cost hours --objective predict=depth_um",
        )
    )
    _report(
        add(
            "report",
            report,
            "whether answers can be trusted: a verdict on each direction, from rows that were kept from the fit",
            "report model --out report.html\nreport model --table other_runs.csv --out report.html",
        )
    )
    return top


# ---------------------------------------------------------------------------------------------- options
def _seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="the same gives the same numbers")


def _tables(command: argparse.ArgumentParser, where: str) -> None:
    group = command.add_argument_group("how tables are written, in place of what the project file says")
    group.add_argument("--project", metavar="FILE", help=f"project file (default: {where})")
    group.add_argument("--sep", help="what separates the cells of a .csv")
    group.add_argument("--decimal", help="its decimal mark")
    group.add_argument("--encoding", help="its encoding")
    group.add_argument("--missing", metavar="TEXT,…", help="texts that mean 'not measured'")
    group.add_argument("--sheet", type=_sheet, help="sheet of an .xlsx, by name or place from 0")


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", default="demo", help="folder for the model and the pictures")
    command.add_argument("--seconds", type=float, default=75.0, help="wall time of the fit")
    command.add_argument("--tracks", type=_count, default=60, help="of each simulated alloy")
    _seed(command)


def _describe(command: argparse.ArgumentParser) -> None:
    command.add_argument("table", help=".csv, .tsv, .xlsx or .parquet")
    command.add_argument("--out", metavar="FILE", help=f"project file to write (default: {NAME} beside the table)")
    command.add_argument("--force", action="store_true", help="overwrite a project file that is there")
    command.add_argument("--look", action="store_true", help="only print, write nothing")
    command.add_argument("--sep", help="what separates the cells (default: guessed)")
    command.add_argument("--decimal", choices=(".", ","), help="the decimal mark (default: guessed)")
    command.add_argument("--encoding", help="default: guessed")
    command.add_argument("--sheet", type=_sheet, help="sheet of an .xlsx, by name or place from 0 (default: 0)")


def _fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("table", help=".csv, .tsv, .xlsx, .parquet, .nc or .zarr")
    command.add_argument("--out", required=True, metavar="FOLDER", help="folder of the model")
    command.add_argument("--roles", help="column=parameter|observation|condition,…")
    command.add_argument("--supports", help="column=real|positive|categorical|interval:LOWER:UPPER,…")
    command.add_argument("--units", help="column=units,…")
    command.add_argument("--task", metavar="COLUMN", help="names the task of each row")
    command.add_argument("--source", metavar="COLUMN", help="names the source of each row")
    command.add_argument(
        "--model", choices=("flow", "manifold"), help="default: a manifold where there is a task column, else a flow"
    )
    command.add_argument("--latent-dim", type=_count, default=4, help="of a manifold: dimensions of a task's latent")
    command.add_argument("--task-prior", choices=PRIORS, default="normal", help="of a manifold: prior over tasks")
    command.add_argument("--reference-source", metavar="NAME", help="of a manifold: the source that answers are about")
    command.add_argument("--max-seconds", type=float, help="wall time of the training, at most")
    command.add_argument(
        "--test-share", type=float, default=0.1, help="rows (or tasks) kept from the fit, to report on"
    )
    command.add_argument("--resume", action="store_true", help="go on with a fit that was interrupted")
    _seed(command)
    _tables(command, f"{NAME} beside the table, or in this folder")


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help="folder that `fit` wrote")
    _seed(command)
    _tables(command, f"{NAME} that `fit` kept with the model")


def _of_task(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("the task that is asked about, of a manifold")
    group.add_argument("--rows", metavar="TABLE", help="what was measured of it so far")
    group.add_argument("--of", metavar="TASK", help="take the rows of this task only")
    group.add_argument("--conditions", metavar="NAME=VALUE,…", action="append", help="what is known of it as a whole")
    group.add_argument("--method", choices=METHODS, default="amortized", help="how it is inferred")


def _ask(command: argparse.ArgumentParser, what: str) -> None:
    _model(command)
    command.add_argument(
        "--given", metavar="NAME=VALUE,…", action="append", help="what is known of the row; the rest is unknown"
    )
    command.add_argument(
        "--table", metavar="TABLE", help="rows to answer, each given its own cells and --given; none of those in --rows"
    )
    command.add_argument("--targets", metavar="NAME,…", help=f"what is asked for (default: all {what} not given)")
    command.add_argument("--num-samples", type=_count, default=2000, help="draws")
    command.add_argument("--out", metavar="FILE", help="the draws: .csv, or .nc or .zarr with units")
    _of_task(command)


def _impute(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("table")
    command.add_argument("--out", required=True, metavar="FILE", help=".csv with one completed copy a draw")
    command.add_argument("--num-samples", type=_count, default=20, help="draws")


def _fingerprint(command: argparse.ArgumentParser) -> None:
    _model(command)
    _of_task(command)
    command.add_argument("--nearest", type=_count, default=5, help="how many known tasks to name")
    command.add_argument("--out", metavar="FILE", help="the result as JSON")


def _design(command: argparse.ArgumentParser) -> None:
    _model(command)
    _of_task(command)
    command.add_argument("--candidates", metavar="TABLE", help="rows that could be measured, with their settings")
    command.add_argument("--grid", metavar="NAME=LOW:HIGH:COUNT,…", action="append", help="or all of such a grid")
    command.add_argument("--n", type=_count, default=1, help="how many rows to suggest")
    command.add_argument(
        "--objective",
        action="append",
        metavar="KIND",
        help="task (the default), parameters=NAME,… or predict=NAME,…; several weigh alike",
    )
    command.add_argument("--parameters-of", metavar="TABLE", help="rows whose parameters are asked for")
    command.add_argument("--at", metavar="TABLE", help="rows to predict at (default: the candidates)")
    command.add_argument("--cost", help="a column of the candidates (default: cost, if there is one), or a number")
    command.add_argument("--out", metavar="FILE", help=".csv with the suggested rows, to be filled in")


def _report(command: argparse.ArgumentParser) -> None:
    _model(command)
    command.add_argument("--table", help="rows that the model was not fitted to (default: those that `fit` kept)")
    command.add_argument("--max-questions", type=_count, default=200, help="of a direction, at most")
    command.add_argument("--out", metavar="FILE", help=".html for the page, .nc or .zarr for all numbers")

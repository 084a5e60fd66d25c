"""Run experiments, train unmarked models, print tables, draw figures, measure speed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from countermark.cli.options import AsJson, ModelArguments, Settings, parse_pairs, show_result
from countermark.cli.program import make_group
from countermark.errors import ConfigError, DataError

app = make_group(
    "Repeat the experiments of the papers: run them, print their tables, draw their figures."
)


Experiment = Annotated[
    str,
    typer.Argument(metavar="EXPERIMENT", help="A TOML file, or its name: wang2020/mlp."),
]
Results = Annotated[Path, typer.Option(help="Folder of the results.")]
# The value of `hosts.model_zoo.CACHE`, repeated so that `--help` need not import that module.
CACHE = Path(".cache/hosts")


@app.command("run")
def run_experiment(
    experiment: Experiment,
    jobs: Annotated[int, typer.Option(help="Processes side by side, one thread each.")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="Run them on a local Ray cluster.")] = False,
    row: Annotated[
        list[str] | None, typer.Option(metavar="LABEL", help="Only this row; can be repeated.")
    ] = None,
    results: Results = Path("results"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document a cell.")] = False,
) -> int:
    """Compute the cells of an experiment that have no result yet; finished cells are kept.

    A cell that fails is recorded with its traceback, and the other cells go on. The exit code is
    then 2, and the next run tries the cell again.

    \b
    Example:
        python -m countermark_lab run experiments/digits.toml --jobs 2
        python -m countermark_lab run experiments/digits.toml --row "not embedded"
    """
    from countermark_lab.experiments.experiment_types import find_experiment
    from countermark_lab.experiments.run import run

    found, failed = find_experiment(experiment), 0
    for ended in run(found, results, jobs=jobs, ray=ray, rows=row or ()):
        cell, line = ended.cell, f"{ended.cell.label}, seed {ended.cell.seed}: "
        if ended.result is None:
            failed += 1
            # The last line of a traceback names the error; the results folder has the rest.
            last = (ended.failure or "").strip().rpartition("\n")[2]
            typer.echo(f"{line}failed: {last}", err=True)
            continue
        if as_json:
            typer.echo(json.dumps({"label": cell.label, "seed": cell.seed, **ended.result}))
            continue
        measured = ended.result["cell"]["figures"].items()
        # Curves and tables are in the results; a line for people holds single numbers only.
        figures = {name: value for name, value in measured if not isinstance(value, (list, dict))}
        typer.echo(f"{line}{json.dumps(figures)}")
    return 2 if failed else 0


@app.command("null-zoo")
def train_null_zoo(
    data: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="What the hosts learn.")
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME|module:factory", help="The host.")] = "mlp",
    model_arguments: ModelArguments = None,
    count: Annotated[int, typer.Option(help="How many hosts.")] = 64,
    first: Annotated[int, typer.Option(metavar="SEED", help="Seed of the first host.")] = 1000,
    epochs: Annotated[int, typer.Option(help="Of each host.")] = 5,
    train: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    grey28: Annotated[bool, typer.Option("--grey28", help="Grey, the middle 28 x 28.")] = False,
    base: Annotated[
        int | None,
        typer.Option(metavar="SEED", help="Siblings: fine-tunes of one unmarked base."),
    ] = None,
    base_epochs: Annotated[int, typer.Option(help="Of the base, where there is one.")] = 5,
    at_a_time: Annotated[int, typer.Option(help="Small MLPs trained in one batched product.")] = 16,
    cache: Annotated[Path, typer.Option(metavar="DIR", help="Where the hosts lie.")] = CACHE,
    measure: Annotated[
        bool, typer.Option("--measure", help="Only measure how many are best trained at a time.")
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Train the unmarked models that the cache lacks, to test null hypotheses on.

    Seeds count up from --first, one for each model. With --base all models begin with the weights
    of one trained base and differ in the order of the data. A run that was killed goes on where it
    stopped. Accuracies are in percent. With --measure, print for several numbers of MLPs how many
    times less CPU time they take when trained together than one by one (takes a minute).

    \b
    Example:
        python -m countermark_lab null-zoo --data digits --count 4 --epochs 1
        python -m countermark_lab null-zoo --data digits --count 4 --epochs 1 --base 7 --json
    """
    if measure == (data is not None):
        raise ConfigError("null-zoo needs either --data NAME|DIR or --measure, on digits")
    if data is None:
        return _print_speed_ups(as_json)
    # Imported after the options are checked, because it loads torch.
    from countermark_lab.hosts import model_zoo as zoo

    like = zoo.HostSpec(
        data, first, epochs=epochs, rows=None if train is None else (0, train), grey28=grey28,
        model=model, arguments=zoo.sort_fields(parse_pairs(model_arguments, "--model-arg")),
    )  # fmt: skip
    # The base differs from the models only in its seed and epochs.
    root = None if base is None else replace(like, seed=base, epochs=base_epochs)
    done = zoo.extend_zoo(like, count, cache=cache, base=root, at_a_time=at_a_time)
    # `accuracies` are shares of 1.
    percent = [100 * share for share in done.accuracies]
    mean, least, most = sum(percent) / count, min(percent), max(percent)
    shown = {
        "cache": str(cache), "there": done.there, "trained": done.trained, "seconds": done.seconds,
        "accuracy": {"mean": mean, "least": least, "most": most},
    }  # fmt: skip
    text = (
        f"{cache}: {done.there} hosts were there, {done.trained} trained in {done.seconds:.2f} s "
        f"of CPU time\ntest accuracy {mean:.2f} % ({least:.2f} to {most:.2f})"
    )
    show_result(shown, as_json, text)
    return 0


def _print_speed_ups(as_json: bool) -> int:
    """Measure and print how much CPU time it saves to train several MLPs together."""
    from countermark_lab.speed.speed import find_best_speed_up, speed_ups

    measured = speed_ups()
    quickest = find_best_speed_up(measured).at_a_time
    shown = {"ratios": {str(each.at_a_time): each.median for each in measured}, "best": quickest}
    lines = [f"{each.at_a_time} at a time: {each.median:.2f} times less" for each in measured]
    text = "\n".join(["CPU time, one by one the yardstick:", *lines, f"best: {quickest} at a time"])
    show_result(shown, as_json, text)
    return 0


@app.command("speed")
def measure_speed(
    write: Annotated[
        Path | None, typer.Option(metavar="MD", help="Also write the page to this file.")
    ] = None,
) -> int:
    """Measure the cost of marking and verifying, as ratios of CPU time; takes minutes.

    The exit code is 1 if a ratio exceeds its limit.

    \b
    Example:
        python -m countermark_lab speed --write docs/performance.md
    """
    from countermark_lab.speed.speed import measure_all

    return measure_all(write)


@app.command("mpai")
def evaluate_mpai(
    scheme: Annotated[str, typer.Argument(metavar="SCHEME", help="See `schemes`.")],
    networks: Annotated[int, typer.Option(metavar="M", help="Unmarked networks.")] = 2,
    payloads: Annotated[int, typer.Option(metavar="D", help="Marks in each of them.")] = 2,
    model: Annotated[
        str, typer.Option(metavar="NAME|module:factory", help="The host; mlp or unet.")
    ] = "",
    data: Annotated[
        str, typer.Option(metavar="NAME|DIR", help="What it learns; digits or drawn.")
    ] = "",
    train: Annotated[int | None, typer.Option(help="Only the first so many images.")] = None,
    epochs: Annotated[int, typer.Option(help="Of each network, and of each marking.")] = 3,
    siblings: Annotated[
        int,
        typer.Option(metavar="N", help="Unmarked relatives of each, where a scheme needs them."),
    ] = 8,
    alpha: Annotated[float, typer.Option(metavar="P", help="Of the detector.")] = 1e-6,
    only: Annotated[
        list[str] | None, typer.Option(metavar="ATTACK", help="Only this one; repeatable.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> int:
    """Evaluate a scheme by the standard MPAI-NNW: imperceptibility, robustness, cost.

    M networks are marked with D payloads each, all are modified in the same ways, and the detector
    runs on every network. Symbols are the raw bits of the message, or the labels of triggers. All
    keys are test keys and are assumed to be dated. Networks of deep_watermarking absorb the
    barrier; they learn the task in --set task=….

    \b
    Example:
        python -m countermark_lab mpai uchida --set layer=2.weight --networks 1 --payloads 1 --train 1000 \\
            --epochs 1 --only noise --only permute --json
    """
    from countermark_lab.mpai import run
    from countermark_lab.mpai.page import render_evaluation
    from countermark_lab.mpai.trial import Trial

    done = run(Trial(
        scheme, parse_pairs(settings, "--set"), model, data, train, epochs, networks, payloads, siblings,
        alpha,
    ), only)  # fmt: skip
    show_result(done, as_json, render_evaluation(done))
    return 0


@app.command("table")
def print_table(
    name: Annotated[
        str,
        typer.Argument(metavar="TABLE", help="A table or an experiment: its name, or a TOML file."),
    ],
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> int:
    """Print a table: our figures, the paper's, the difference. For an experiment: every figure.

    \b
    Example:
        python -m countermark_lab table experiments/digits.toml --json
    """
    from countermark_lab.tables.pages import render_named_table

    shown, text = render_named_table(name, results)
    show_result(shown, as_json, text)
    return 0


@app.command("figure")
def draw_figure(
    name: Annotated[str, typer.Argument(metavar="FIGURE", help="Such as wang2020/figure4.")],
    out: Annotated[Path | None, typer.Option(metavar="PNG", help="The picture to write.")] = None,
    results: Results = Path("results"),
    as_json: AsJson = False,
) -> int:
    """Draw a figure from the results, or print its values with --json.

    \b
    Example:
        python -m countermark_lab figure uchida2017/pruning --out pruning.png
    """
    from countermark_lab.experiments.experiment import EXPERIMENTS
    from countermark_lab.figures import draw_png, find_figure

    # Drawing needs matplotlib, the values do not: with --json and no --out nothing is drawn.
    figure = find_figure(name)
    shown = figure.shown(EXPERIMENTS, results)
    if not shown:
        raise DataError(
            f"{name}: none of its experiments has run to its end: python -m countermark_lab run"
        )
    if out is None and not as_json:
        raise ConfigError("a figure needs --out PNG, or --json for its values")
    if out is not None:
        draw_png(figure, shown, out)
    show_result(dict(shown), as_json, f"{out}: {figure.caption}")
    return 0

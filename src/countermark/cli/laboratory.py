"""The commands of thieves and researchers: attack list, attack run, bench run, bench table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from countermark.cli.options import AsJson, Settings, pairs, show_result
from countermark.errors import ConfigError

attack_app = typer.Typer(
    help="Do to a model what a thief would.", rich_markup_mode=None, no_args_is_help=True
)
bench_app = typer.Typer(
    help="Run experiments and print their tables.", rich_markup_mode=None, no_args_is_help=True
)


@attack_app.command("list")
def attack_list(as_json: AsJson = False) -> int:
    """List the attacks and what each one does.

    \b
    Example:
        countermark attack list --json
    """
    from countermark.attacks import ATTACKS

    rows = {
        name: {"does": attack.does, "source": attack.source, "needs_data": attack.needs_data}
        for name, attack in ATTACKS.items()
    }
    show_result(rows, as_json, "\n".join(f"{name}: {row['does']}" for name, row in rows.items()))
    return 0


@attack_app.command("run")
def attack_run(
    name: Annotated[str, typer.Argument(help="See `attack list`.")],
    victim: Annotated[Path, typer.Argument(metavar="IN", help="The model file; unchanged.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The file to write.")],
    settings: Settings = None,
    as_json: AsJson = False,
) -> int:
    """Attack a copy of a model file and say what it cost.

    \b
    Example:
        countermark attack run prune m.safetensors --out pruned.safetensors --set fraction=0.5
        countermark verify pruned.safetensors --key acme.key
    """
    from countermark.attacks import attack_named
    from countermark.attacks.base import NamedTensors
    from countermark.weights import load_state, save_weights

    attack = attack_named(name).from_fields(pairs(settings, "--set"))
    if out.exists():
        raise ConfigError(f"{out} exists: choose another name or move it away")
    attacked = attack.run(NamedTensors(load_state(victim)))
    save_weights(attacked.model.state_dict(), out)
    cost = attacked.cost
    done = {
        "attack": name,
        "fields": attack.to_fields(),
        "model": str(out),
        "cost": {"seconds": cost.seconds, "epochs": cost.epochs, "data_share": cost.data_share},
    }
    show_result(done, as_json, f"{out}: {attack} in {cost.seconds:.2f} s of CPU time")
    return 0


@bench_app.command("run")
def bench_run(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="A TOML file.")],
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
) -> int:
    """Compute the cells of an experiment that have no result yet; finished ones are kept.

    \b
    Example:
        countermark bench run experiments/digits.toml
    """
    from countermark.bench.experiment import load_experiment, run

    for cell, result in run(load_experiment(experiment), results):
        figures = {k: v for k, v in result["cell"]["figures"].items() if k != "pruned"}
        typer.echo(f"{cell.label}, seed {cell.seed}: {json.dumps(figures)}")
    return 0


@bench_app.command("table")
def bench_table(
    experiment: Annotated[Path, typer.Argument(metavar="EXPERIMENT", help="A TOML file.")],
    results: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results"),
    as_json: AsJson = False,
) -> int:
    """Print the table of an experiment: ours, the paper's, the difference.

    \b
    Example:
        countermark bench table experiments/digits.toml --json
    """
    from countermark.bench.experiment import load_experiment
    from countermark.bench.tables import page, table

    rows = table(load_experiment(experiment), results)
    show_result({"rows": rows}, as_json, page([experiment], results))
    return 0

"""The `attack` commands: change a model as a thief would."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countermark._internal.output_paths import require_free_path
from countermark.cli.options import AsJson, ModelArguments, Settings, parse_pairs, show_result
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from countermark.attacks.base import Attack
    from countermark.training.data import Dataset


def list_attacks(as_json: AsJson = False) -> int:
    """List the attacks and what each one does.

    \b
    Example:
        countermark attack list --json
    """
    from countermark.attacks import ATTACKS

    rows = {
        name: {
            "does": attack.does,
            "source": attack.source,
            "needs_data": attack.needs_data,
            "needs_model": attack.needs_model,
            "fields": attack.list_default_fields(),
        }
        for name, attack in ATTACKS.items()
    }
    show_result(rows, as_json, "\n".join(f"{name}: {row['does']}" for name, row in rows.items()))
    return 0


def run_attack(
    name: Annotated[str, typer.Argument(help="See `attack list`.")],
    victim: Annotated[Path, typer.Argument(metavar="IN", help="The model file; unchanged.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The file to write.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME|module:factory", help="The host, where an attack needs it."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|DIR", help="The thief's data, likewise.")
    ] = None,
    settings: Settings = None,
    model_arguments: ModelArguments = None,
    as_json: AsJson = False,
) -> int:
    """Attack a copy of a model file and print the cost of the attack.

    `attack list --json` says which attacks need --model, because they follow the architecture, and
    which need --data as well, because they train or ask the model. With --data the test accuracy
    before and after the attack is printed.

    \b
    Example:
        countermark attack run prune m.safetensors --out pruned.safetensors --set fraction=0.5
        countermark verify pruned.safetensors --key acme.key
        countermark attack run fine_tune m.safetensors --out tuned.safetensors \\
            --model mlp --data digits --set lr=0.001
    """
    from countermark.attacks import find_attack
    from countermark.attacks.base import NamedTensors
    from countermark.checkpoints import load_state

    attack = find_attack(name).from_fields(parse_pairs(settings, "--set"))
    # Refuse an existing file and wrong options before an attack that may train for hours.
    require_free_path(out)
    _check_host_options(attack, model, data, model_arguments)
    # Without --model the attack changes the tensors alone, and no architecture is built.
    host: nn.Module
    if model:
        host, dataset = _load_host(victim, model, parse_pairs(model_arguments, "--model-arg"), data)
    else:
        host, dataset = NamedTensors(load_state(victim)), None
    attacked = attack.run(host, dataset)
    _save_attacked_model(attacked.model, out)
    cost = attacked.cost
    done: dict[str, Any] = {
        "attack": name,
        "fields": attack.to_fields(),
        "model": str(out),
        "cost": {"seconds": cost.seconds, "epochs": cost.epochs, "data_share": cost.data_share},
        "found": dict(attacked.found),
    }
    text = f"{out}: {attack} in {cost.seconds:.2f} s of CPU time"
    text += "".join(f"\n{name}: {value}" for name, value in attacked.found.items())
    if dataset:
        before, after = _measure_accuracy(host, dataset), _measure_accuracy(attacked.model, dataset)
        done |= {"accuracy_before": before, "accuracy_after": after}
        text += f"\ntest accuracy {_format_percent(before)} before, {_format_percent(after)} after"
    show_result(done, as_json, text)
    return 0


def _check_host_options(
    attack: Attack, model: str | None, data: str | None, arguments: list[str] | None
) -> None:
    """Check that the options an attack needs are given, and no option without effect.

    Raises:
        ConfigError: an option is missing or superfluous.
    """
    given = {"--model": model, "--data": data, "--model-arg": arguments}
    if attack.needs_data and not (model and data):
        raise ConfigError(
            f"{attack.name} asks a model about data: give it --model NAME and --data NAME|DIR, "
            "with the --model-arg the model was made with"
        )
    if attack.needs_model and not model:
        raise ConfigError(
            f"{attack.name} follows the architecture: give it --model NAME, with the --model-arg "
            "the model was made with; with --data NAME|DIR it also prints accuracies"
        )
    if not (attack.needs_data or attack.needs_model) and any(given.values()):
        idle = ", ".join(option for option, value in given.items() if value)
        raise ConfigError(f"{attack.name} works on the tensors alone: leave out {idle}")


def _save_attacked_model(model: nn.Module, out: Path) -> None:
    """Write the attacked model as a weight file, or as an ONNX graph if the model is one."""
    from countermark.attacks.isomorph import OnnxModel
    from countermark.checkpoints import save_weights

    # A graph keeps what the attack did to its operators; a weight file would hold tensors only.
    if isinstance(model, OnnxModel) and out.suffix == ".onnx":
        model.save(out)
    else:
        save_weights(model.state_dict(), out)


def _load_host(
    victim: Path, model: str, arguments: dict[str, Any], data: str | None
) -> tuple[nn.Module, Dataset | None]:
    """Load the victim as a callable model, on the device that `embed` would use, and the data.

    Returns: the model, and the data set or None without --data.
    """
    from countermark.training.data import load_data
    from countermark.training.embed_classifier import load_into
    from countermark.training.loop import Course
    from countermark.training.models import build

    host = build(model, arguments)
    load_into(host, victim)
    # The course trains nothing here; it only knows which device `embed` would choose.
    host = host.to(Course(epochs=0).resolve_device())
    return host, load_data(data) if data else None


def _measure_accuracy(model: nn.Module, data: Dataset) -> float | None:
    """Return the test accuracy, 0 to 1; None if the model has another number of classes."""
    from countermark.attacks.base import compute_first_scores
    from countermark.training.loop import accuracy

    # An attack may replace the last layer, for example to learn another task.
    return (
        accuracy(model, data)
        if compute_first_scores(model, data).shape[1] == data.classes
        else None
    )


def _format_percent(share: float | None) -> str:
    """Return an accuracy as text in percent."""
    return "undefined (other classes)" if share is None else f"{100 * share:.2f} %"

"""One cell: train a host, marked or not, and measure it before and after attacks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import rfc8785
import torch
from filelock import FileLock

from countermark.alignment import Reference, SuspectWithReference
from countermark.attacks import find_attack
from countermark.attacks.prune import Prune
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import ALPHA, VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.weights import MASK
from countermark.training.build_embedding import check_fields, make_embedding, make_scheme
from countermark.training.data import BUNDLED, Dataset, check_place, load_data
from countermark.training.embed_classifier import load_into
from countermark.training.loop import Checkpoint, Course, accuracy, count_batches, fit, seed_torch
from countermark.training.models import build, recipe
from countermark.training.siblings import TrainedSiblings, train_siblings
from countermark.training.weight_history import TensorWatch
from countermark.verification.verify import examine, read_suspect
from countermark_lab.experiments.experiment import AttackChain, AttackStep, Cell, PruningPlan
from countermark_lab.experiments.fresh_triggers import measure_fired_share, measure_forgeries
from countermark_lab.experiments.suspect_groups import build_host, judge_group, make_unmarked_spec
from countermark_lab.experiments.trigger_evaluation import evaluate_triggers
from countermark_lab.hosts.grey_images import convert_to_grey28
from countermark_lab.hosts.model_zoo import CACHE, host_path, sort_fields, train_hosts

Asking: TypeAlias = Callable[[torch.nn.Module], dict[str, Any]]


def check_host_cell(cell: Cell) -> None:
    """Check the names, fields and data sets of a cell before anything is computed.

    Raises:
        CountermarkError: a model, scheme or attack is unknown, a field of one is wrong, or a data
            set is missing.
    """
    recipe(cell.host.model, cell.host.recipe)
    if cell.scheme != "none":
        check_fields(cell.scheme, cell.fields)
    steps = [step for attacks in cell.attacks for step in attacks.steps]
    for step in steps:
        find_attack(step.attack).from_fields(step.fields)
    # An empty name is a step on the host's own data; the digits are part of the package.
    given = (cell.host.data, *(s.data for s in steps), *(s.data for s in cell.suspects))
    for name in {each for each in given if each not in ("", BUNDLED)}:
        check_place(name)


_SUPPLIED = (90_001, 90_002)  # seeds of unmarked strangers, as an examiner would supply some


def compute_host_cell(cell: Cell, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train one host, marked or not, and measure it before and after attacks.

    Args:
        cell: the specification.
        checkpoint: a file from which an interrupted training goes on; removed at the end.

    Returns: accuracy in percent; for a marked host the number of wrong bits, E_R (L2) per bit in
        nats, log10 p and outcome, and the share of fresh triggers that fire; the same figures at
        every pruned fraction and after every attack; the answers to forged triggers and to
        transformed images; the readings of every group of suspects; and statistics of the watched
        tensor.
    """
    data = _load_cached_data(cell.host.data).subset(cell.host.train, cell.host.test)
    data = replace(data, unit_pixels=cell.host.unit_pixels)
    saving = Checkpoint(checkpoint) if checkpoint else None
    watch = TensorWatch(cell.watch) if cell.watch else None
    model, key = _train_host(cell, data, saving, watch)
    fresh, supplied = _make_fresh_measurement(cell, key, data), _collect_unmarked(cell, key)
    figures = (
        measure_reading(model, key, supplied=supplied)
        | fresh(model)
        | {"accuracy": 100 * accuracy(model, data)}
    )
    # A mask in the key says which weights its reader looks at; the count goes into the tables.
    masks = [] if key is None else [m for n, m in key.frozen.items() if n.startswith(MASK)]
    if masks:
        figures["selected"] = sum(int(mask.sum()) for mask in masks)
    if watch:
        figures["watched"] = watch.summarise_epochs(key)
    if key is not None and cell.fresh and cell.scheme == DeepStego.name:
        figures["forgeries"] = measure_forgeries(model, key, cell.fresh, data)
    if key is not None:
        figures |= evaluate_triggers(model, key, cell, data)
    if cell.prune:
        figures["pruned"] = [
            where | after | fresh(thinned) | {"accuracy": 100 * accuracy(thinned, data)}
            for where, thinned, after in _measure_prunings(model, cell.prune, key, supplied)
        ]
    if cell.attacks:
        figures["attacked"] = [
            {"label": attacks.label}
            | _measure_attacks(cell, model, attacks, data, key, (fresh, supplied))
            for attacks in cell.attacks
        ]
    if key is not None and cell.suspects:
        start = _prepare_start(cell)
        figures["suspects"] = [
            judge_group(
                group,
                list(group.list_host_specs(cell.host, cell.seed, start)),
                key,
                cell.seed,
                supplied,
            )
            for group in cell.suspects
        ]
    if saving:
        saving.remove()
    return figures


def _train_host(
    cell: Cell, data: Dataset, checkpoint: Checkpoint | None, watch: TensorWatch | None
) -> tuple[torch.nn.Module, Key | None]:
    """Train the host of a cell; return the model and its key, None for an unmarked host."""
    model, host_recipe = _build_initial_host(cell), recipe(cell.host.model, cell.host.recipe)
    course = Course(cell.host.epochs, cell.seed, cell.host.precision, watch=watch)
    if cell.host.teacher:  # the teacher is the host before training
        teacher = _build_initial_host(cell).eval().to(course.resolve_device())
        course = replace(course, teacher=teacher)
    if cell.scheme == "none":
        fit(model, data, host_recipe, course, checkpoint=checkpoint)
        return model, None
    batches = cell.host.epochs * count_batches(data, host_recipe)
    scheme = make_scheme(cell.scheme, cell.fields, data, batches, stored=True)
    siblings = TrainedSiblings()
    if cell.host.siblings and scheme.needs_siblings:
        folder = CACHE / "siblings" / _compute_host_digest(cell)
        folder.mkdir(parents=True, exist_ok=True)
        # Cells with the same host share the siblings, and several processes compute cells.
        with FileLock(folder.with_suffix(".lock")):
            siblings = train_siblings(
                lambda: _build_initial_host(cell), data, host_recipe, replace(course, watch=None),
                count=cell.host.siblings, folder=folder,
            )  # fmt: skip
    material = KeyMaterial.from_test_seed(cell.seed)
    with make_embedding(
        scheme, model, data, owner="bench", material=material, siblings=siblings
    ) as mark:
        fit(model, data, host_recipe, course, mark=mark, checkpoint=checkpoint)
    # `drawn_key`, unlike `key`, does not raise when embedding failed: a failure is a result too.
    return model, mark.drawn_key


def _make_fresh_measurement(cell: Cell, key: Key | None, data: Dataset) -> Asking:
    """Return a function that measures the answers to fresh triggers, if the key makes any."""
    if key is None or cell.fresh is None or cell.scheme != DeepStego.name:
        return lambda _: {}
    images = cell.fresh.images
    return lambda model: {"fresh_fired": measure_fired_share(model, key, images, data)}


def _build_initial_host(cell: Cell) -> torch.nn.Module:
    """Build the host as it is before training."""
    # A marked and an unmarked host of the same seed start from the same weights.
    seed_torch(cell.seed, "init")
    model = build(cell.host.model, cell.host.model_arguments)
    start = _prepare_start(cell)
    if start is not None:
        load_into(model, start)
    return model


def _prepare_start(cell: Cell) -> Path | None:
    """Return the weight file that the host starts from, trained if needed; None for no start."""
    host, base = cell.host, cell.host.start
    if base is None:
        return None
    like = make_unmarked_spec(host, host.data, base.seed)
    spec = replace(like, epochs=base.epochs, recipe=sort_fields(base.recipe))
    train_hosts([spec], CACHE)
    return host_path(spec, CACHE)


def _compute_host_digest(cell: Cell) -> str:
    """Compute a short hash of everything that determines the unmarked siblings of a cell."""
    content: dict[str, Any] = {"host": cell.host.model_dump(mode="json"), "seed": cell.seed}
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]


def _collect_unmarked(cell: Cell, key: Key | None) -> list[torch.nn.Module]:
    """Train unmarked models that a learnt reader is compared with.

    They have the architecture of the host and initial weights of their own. The list is empty for a
    key that needs no comparison.
    """
    if key is None or not getattr(load_scheme(key), "needs_siblings", False) or not key.tensors:
        return []
    hosts = [make_unmarked_spec(cell.host, cell.host.data, seed) for seed in _SUPPLIED]
    return [build_host(spec, arrays) for spec, arrays in train_hosts(hosts, CACHE)]


def measure_reading(
    model: torch.nn.Module, key: Key | None, alpha: float | None = None, *,
    supplied: Sequence[torch.nn.Module] = (),
) -> dict[str, Any]:  # fmt: skip
    """Read a key from a model and return the figures; an empty dictionary without a key.

    Args:
        model: the suspect.
        key: its key.
        alpha: significance level of the verdict; the default level if None.
        supplied: unmarked models that the verdict of a learnt reader compares with.
    """
    if key is None:
        return {}
    # Experiments use test keys without a timestamp, so that results are reproducible.
    terms = VerificationOptions(alpha or ALPHA, assume_dated=True, allow_test_key=True)
    verdict = examine(model, key, terms, unmarked=supplied)
    evidence = read_suspect(model, key) if _has_key_tensors(model, key) else None
    matched = evidence.match_count if evidence else verdict.matched
    return {
        "bits": verdict.bits,
        "wrong": None if matched is None else verdict.bits - matched,
        "E_R": evidence.cross_entropy if evidence else None,
        "log10_p": verdict.log10_p,
        "outcome": verdict.outcome,
    }


def _has_key_tensors(model: torch.nn.Module, key: Key) -> bool:
    """Return true if the model has all tensors that the key reads, with the same shapes.

    The answer is true for a key that reads no tensors.
    """
    state = model.state_dict()
    return all(n in state and tuple(state[n].shape) == shape for n, shape in key.tensors.items())


def _measure_aligned(
    cell: Cell, attacks: AttackChain, models: tuple[torch.nn.Module, torch.nn.Module], key: Key
) -> dict[str, Any]:
    """Read a key from an attacked copy after alignment and return the figures.

    Args:
        cell: gives the start of the host, if that is the reference.
        attacks: says which reference to align to.
        models: the attacked copy, and the marked host.
        key: the key of the marked host.
    """
    copied, marked = models
    reference = marked if attacks.reference == "marked" else _build_initial_host(cell)
    whole = SuspectWithReference(copied, Reference.from_module(reference))
    verdict = examine(whole, key, VerificationOptions(assume_dated=True, allow_test_key=True))
    aligned_to = verdict.subject.reference
    return {
        "wrong": None if verdict.matched is None else verdict.bits - verdict.matched,
        "log10_p": verdict.log10_p,
        "outcome": verdict.outcome,
        "null": verdict.null,
        "similarity": None if aligned_to is None else aligned_to.similarity,
    }


def _measure_prunings(
    model: torch.nn.Module, prune: PruningPlan, key: Key | None,
    supplied: Sequence[torch.nn.Module],
) -> Iterator[tuple[dict[str, Any], torch.nn.Module, dict[str, Any]]]:  # fmt: skip
    """Yield, for every order and fraction, the setting, the pruned model and its reading."""
    for order in prune.orders or ("ascending",):
        for fraction in prune.fractions:
            thinned = Prune(fraction, order, layers=prune.layers).run(model).model
            # Old results have no order: a cell that sets none keeps their form.
            where = {"order": order} if prune.orders else {}
            read = measure_reading(thinned, key, prune.alpha, supplied=supplied)
            yield where | {"fraction": fraction}, thinned, read


def _measure_attacks(  # noqa: PLR0917 - what `compute_host_cell` has at hand
    cell: Cell, model: torch.nn.Module, attacks: AttackChain, data: Dataset, key: Key | None,
    asked_beside: tuple[Asking, Sequence[torch.nn.Module]],
) -> dict[str, Any]:  # fmt: skip
    """Run a chain of attacks and measure the result.

    Args:
        cell: the cell of the host.
        model: the marked host.
        attacks: the chain.
        data: what the host learnt.
        key: the key of the host; None for an unmarked host.
        asked_beside: a function that measures fresh triggers, and unmarked models to compare with.

    Returns: the reading after the last step, and accuracy in percent, on the data that the thief
        last trained for.
    """
    wanted, marked, share = data, model, 0.0
    fresh, supplied = asked_beside
    for step in attacks.steps:
        given = _load_step_data(step, data)
        wanted = given if step.data else wanted
        attacked = find_attack(step.attack).from_fields(step.fields).run(model, given)
        model, cost = attacked.model, attacked.cost
        # Count in epochs of the host's own data, since a thief's data set may be smaller.
        share += cost.epochs * cost.data_share * len(given.train_labels) / len(data.train_labels)
    figures = measure_reading(model, key, supplied=supplied) | fresh(model)
    figures |= {"accuracy": 100 * accuracy(model, wanted)}
    if attacks.cost:  # in percent of the host's own training
        figures["cost"] = 100 * share / cell.host.epochs
    if attacks.reference and key is not None and getattr(load_scheme(key), "linear", False):
        figures["aligned"] = _measure_aligned(cell, attacks, (model, marked), key)
    return figures


def _load_step_data(step: AttackStep, data: Dataset) -> Dataset:
    """Return the data set that a step of an attack trains on."""
    if not step.data:
        return data
    given = _load_grey_data(step.data) if step.grey28 else _load_cached_data(step.data)
    return replace(given, unit_pixels=data.unit_pixels)  # the stolen model expects this scale


# All cells of an experiment use the same few data sets; decoding one takes seconds to minutes.
@lru_cache(maxsize=4)
def _load_cached_data(name: str) -> Dataset:
    """Load a data set, or return it from the cache."""
    return load_data(name)


@lru_cache(maxsize=1)
def _load_grey_data(name: str) -> Dataset:
    """Load a data set as grey images of 28 × 28, or return it from the cache."""
    return convert_to_grey28(_load_cached_data(name))

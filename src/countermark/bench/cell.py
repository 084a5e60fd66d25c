"""One cell: train a host, marked or not, and measure it before and after what a thief does."""

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
from countermark.bench.asking import asked
from countermark.bench.data import BUNDLED, Dataset, check_place, load_data
from countermark.bench.embed import load_into
from countermark.bench.experiment import Attacks, Cell, Prunings, Step
from countermark.bench.fresh import fired, forgeries
from countermark.bench.marking import check_fields, marking, scheme_for
from countermark.bench.models import build, recipe
from countermark.bench.pictures import grey28
from countermark.bench.siblings import Siblings, train_siblings
from countermark.bench.suspects import judged, live, unmarked
from countermark.bench.train import Checkpoint, Course, accuracy, batches_of, fit, seeded
from countermark.bench.watch import Watch
from countermark.bench.zoo import CACHE, host_path, pairs, train_hosts
from countermark.keys.key import Key, KeyMaterial
from countermark.results.verdict import ALPHA, VerificationOptions
from countermark.schemes import load_scheme
from countermark.schemes.deepstego.scheme import DeepStego
from countermark.schemes.weights import MASK
from countermark.verification.verify import examine, read_suspect

Asking: TypeAlias = Callable[[torch.nn.Module], dict[str, Any]]


def check(cell: Cell) -> None:
    """What can be known to be wrong before anything is computed.

    Raises:
        CountermarkError: an unknown model, scheme or attack, a wrong field of one, or a data set
            that is not there.
    """
    recipe(cell.host.model, cell.host.recipe)
    if cell.scheme != "none":
        check_fields(cell.scheme, cell.fields)
    steps = [step for attacks in cell.attacks for step in attacks.steps]
    for step in steps:
        find_attack(step.attack).from_fields(step.fields)
    given = (cell.host.data, *(s.data for s in steps), *(s.data for s in cell.suspects))
    for name in {each for each in given if each not in ("", BUNDLED)}:
        check_place(name)


_SUPPLIED = (90_001, 90_002)  # seeds of unmarked strangers, as an examiner would supply some


def compute(cell: Cell, checkpoint: Path | None = None) -> dict[str, Any]:
    """Train one host, marked or not, and measure it before and after what a thief does.

    Returns: accuracy in percent; for a marked host the bits that are right, E_R (L2) per bit in
        nats, log10 p and outcome, and the share of fresh triggers that fire; the same at every
        pruned fraction and after every attack; what forgeries of triggers do, and what handled
        images are answered; what the key reads in every group of suspects; and what was watched
        of the weights.
    """
    data = _data(cell.host.data).subset(cell.host.train, cell.host.test)
    data = replace(data, unit_pixels=cell.host.unit_pixels)
    saving = Checkpoint(checkpoint) if checkpoint else None
    watch = Watch(cell.watch) if cell.watch else None
    model, key = _trained(cell, data, saving, watch)
    fresh, supplied = _fresh(cell, key, data), _collect_unmarked(cell, key)
    figures = (
        measured(model, key, supplied=supplied)
        | fresh(model)
        | {"accuracy": 100 * accuracy(model, data)}
    )
    masks = [] if key is None else [m for n, m in key.frozen.items() if n.startswith(MASK)]
    if masks:
        figures["selected"] = sum(int(mask.sum()) for mask in masks)
    if watch:
        figures["watched"] = watch.figures(key)
    if key is not None and cell.fresh and cell.scheme == DeepStego.name:
        figures["forgeries"] = forgeries(model, key, cell.fresh, data)
    if key is not None:
        figures |= asked(model, key, cell, data)
    if cell.prune:
        figures["pruned"] = [
            where | after | fresh(thinned) | {"accuracy": 100 * accuracy(thinned, data)}
            for where, thinned, after in _pruned(model, cell.prune, key, supplied)
        ]
    if cell.attacks:
        figures["attacked"] = [
            {"label": attacks.label} | _attacked(cell, model, attacks, data, key, (fresh, supplied))
            for attacks in cell.attacks
        ]
    if key is not None and cell.suspects:
        start = _start(cell)
        figures["suspects"] = [
            judged(group, list(group.specs(cell.host, cell.seed, start)), key, cell.seed, supplied)
            for group in cell.suspects
        ]
    if saving:
        saving.remove()
    return figures


def _trained(
    cell: Cell, data: Dataset, checkpoint: Checkpoint | None, watch: Watch | None
) -> tuple[torch.nn.Module, Key | None]:
    model, host_recipe = _host(cell), recipe(cell.host.model, cell.host.recipe)
    course = Course(cell.host.epochs, cell.seed, cell.host.precision, watch=watch)
    if cell.host.teacher:  # it is what the host starts as
        teacher = _host(cell).eval().to(course.resolved_device())
        course = replace(course, teacher=teacher)
    if cell.scheme == "none":
        fit(model, data, host_recipe, course, checkpoint=checkpoint)
        return model, None
    batches = cell.host.epochs * batches_of(data, host_recipe)
    scheme = scheme_for(cell.scheme, cell.fields, data, batches, stored=True)
    siblings = Siblings()
    if cell.host.siblings and scheme.needs_siblings:
        folder = CACHE / "siblings" / _host_digest(cell)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # cells of one host share them
            siblings = train_siblings(
                lambda: _host(cell), data, host_recipe, replace(course, watch=None),
                count=cell.host.siblings, folder=folder,
            )  # fmt: skip
    material = KeyMaterial.from_test_seed(cell.seed)
    with marking(scheme, model, data, owner="bench", material=material, siblings=siblings) as mark:
        fit(model, data, host_recipe, course, mark=mark, checkpoint=checkpoint)
    return model, mark.drawn_key  # whether or not the mark took: what happened is recorded


def _fresh(cell: Cell, key: Key | None, data: Dataset) -> Asking:
    """Asks a model about fresh triggers, where its key can make some."""
    if key is None or cell.fresh is None or cell.scheme != DeepStego.name:
        return lambda _: {}
    images = cell.fresh.images
    return lambda model: {"fresh_fired": fired(model, key, images, data)}


def _host(cell: Cell) -> torch.nn.Module:
    """The host before training."""
    seeded(cell.seed, "init")
    model = build(cell.host.model, cell.host.model_arguments)
    start = _start(cell)
    if start is not None:
        load_into(model, start)
    return model


def _start(cell: Cell) -> Path | None:
    """The weight file the host begins with, trained if need be."""
    host, base = cell.host, cell.host.start
    if base is None:
        return None
    like = unmarked(host, host.data, base.seed)
    spec = replace(like, epochs=base.epochs, recipe=pairs(base.recipe))
    train_hosts([spec], CACHE)
    return host_path(spec, CACHE)


def _host_digest(cell: Cell) -> str:
    """What the unmarked siblings of a cell's host follow from."""
    content: dict[str, Any] = {"host": cell.host.model_dump(mode="json"), "seed": cell.seed}
    return hashlib.sha256(rfc8785.dumps(content)).hexdigest()[:16]


def _collect_unmarked(cell: Cell, key: Key | None) -> list[torch.nn.Module]:
    """The unmarked models that a learnt reader is judged beside, strangers of the host's kind."""
    if key is None or not getattr(load_scheme(key), "needs_siblings", False) or not key.tensors:
        return []
    hosts = [unmarked(cell.host, cell.host.data, seed) for seed in _SUPPLIED]
    return [live(spec, arrays) for spec, arrays in train_hosts(hosts, CACHE)]


def measured(
    model: torch.nn.Module, key: Key | None, alpha: float | None = None, *,
    supplied: Sequence[torch.nn.Module] = (),
) -> dict[str, Any]:  # fmt: skip
    """What a key reads from a model, as figures; none without a key."""
    if key is None:
        return {}
    terms = VerificationOptions(alpha or ALPHA, assume_dated=True, allow_test_key=True)
    verdict = examine(model, key, terms, unmarked=supplied)
    evidence = read_suspect(model, key) if _as_the_key_knows(model, key) else None
    matched = evidence.match_count if evidence else verdict.matched
    return {
        "bits": verdict.bits,
        "wrong": None if matched is None else verdict.bits - matched,
        "E_R": evidence.cross_entropy if evidence else None,
        "log10_p": verdict.log10_p,
        "outcome": verdict.outcome,
    }


def _as_the_key_knows(model: torch.nn.Module, key: Key) -> bool:
    """Whether the tensors that a key reads have their names and shapes; it may read none."""
    state = model.state_dict()
    return all(n in state and tuple(state[n].shape) == shape for n, shape in key.tensors.items())


def _aligned(
    cell: Cell, attacks: Attacks, models: tuple[torch.nn.Module, torch.nn.Module], key: Key
) -> dict[str, Any]:
    """What a key reads from a copy after alignment, as figures."""
    copied, marked = models
    reference = marked if attacks.reference == "marked" else _host(cell)
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


def _pruned(
    model: torch.nn.Module, prune: Prunings, key: Key | None,
    supplied: Sequence[torch.nn.Module],
) -> Iterator[tuple[dict[str, Any], torch.nn.Module, dict[str, Any]]]:  # fmt: skip
    """What was pruned, the model, and what the key reads then."""
    for order in prune.orders or ("ascending",):
        for fraction in prune.fractions:
            thinned = Prune(fraction, order, layers=prune.layers).run(model).model
            where = {"order": order} if prune.orders else {}
            read = measured(thinned, key, prune.alpha, supplied=supplied)
            yield where | {"fraction": fraction}, thinned, read


def _attacked(  # noqa: PLR0917 - what `compute` has at hand
    cell: Cell, model: torch.nn.Module, attacks: Attacks, data: Dataset, key: Key | None,
    asked_beside: tuple[Asking, Sequence[torch.nn.Module]],
) -> dict[str, Any]:  # fmt: skip
    """What is left after a chain of attacks; accuracy on the data that the thief wants it for."""
    wanted, marked, share = data, model, 0.0
    fresh, supplied = asked_beside
    for step in attacks.steps:
        given = _of_step(step, data)
        wanted = given if step.data else wanted
        attacked = find_attack(step.attack).from_fields(step.fields).run(model, given)
        model, cost = attacked.model, attacked.cost
        share += cost.epochs * cost.data_share * len(given.train_labels) / len(data.train_labels)
    figures = measured(model, key, supplied=supplied) | fresh(model)
    figures |= {"accuracy": 100 * accuracy(model, wanted)}
    if attacks.cost:  # in percent of the host's own training
        figures["cost"] = 100 * share / cell.host.epochs
    if attacks.reference and key is not None and getattr(load_scheme(key), "linear", False):
        figures["aligned"] = _aligned(cell, attacks, (model, marked), key)
    return figures


def _of_step(step: Step, data: Dataset) -> Dataset:
    if not step.data:
        return data
    given = _grey(step.data) if step.grey28 else _data(step.data)
    return replace(given, unit_pixels=data.unit_pixels)  # the stolen model asks for them


@lru_cache(maxsize=4)
def _data(name: str) -> Dataset:
    return load_data(name)


@lru_cache(maxsize=1)
def _grey(name: str) -> Dataset:
    return grey28(_data(name))

"""The first argument of `verify` as a suspect: a weight file, a live model, or a service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from countermark._internal.output_paths import require_free_path
from countermark.errors import ConfigError

if TYPE_CHECKING:
    from countermark.alignment import Reference, SuspectWithReference
    from countermark.checkpoints import Suspect
    from countermark.keys.key import Key
    from countermark.predictors.base import Predictor
    from countermark.predictors.remote import RemoteOptions
    from countermark.schemes.triggers import FreshTriggers
    from countermark.verification.disclosure import TriggerDisclosure
    from countermark.verification.unmarked_models import Supplied


Host = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="NAME|module:factory",
        help="What the file is the weights of, for a key of triggers or --reference; else as "
        "the key says.",
    ),
]
Ask = Annotated[
    list[str] | None,
    typer.Option(
        "--ask",
        metavar="K=V",
        help="How a service is asked, such as protocol=oip; @FILE for a file's text.",
    ),
]
BlindChoice = Annotated[
    bool,
    typer.Option(
        "--blind-choice",
        help="You state that whoever chose the suspect's pictures did not know what the key reads "
        "in them; whoever chose opened triggers not their labels; whoever chose covers of fresh "
        "ones, or ordered class_names, not the answers. Recorded.",
    ),
]
TranscriptFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write what was asked and answered; must not exist."),
]
Recorded = Annotated[
    bool,
    typer.Option("--recorded", help="The suspect is such a transcript: judge it, ask nobody."),
]
ReferenceFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Your own model: also read the suspect after its neurons were put into the order "
        "and scale of this one. Best is one from before the mark.",
    ),
]
SuspectDate = Annotated[
    str | None,
    typer.Option(
        metavar="DATE", help="You state that the suspect is not older than this; recorded."
    ),
]
ClaimsCounted = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where claims are counted: p is multiplied by them."),
]
NullName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Another null of the scheme: fresh_keys or unmarked_models, both for a large --alpha.",
    ),
]
UnmarkedFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--unmarked",
        metavar="FILE",
        help="A model that you know to be unmarked, of the suspect's kind (a folder of images for "
        "a key of outputs); repeat it, with the public bases. Learnt readers and ranks among "
        "unmarked models prove nothing without.",
    ),
]
ReaderCode = Annotated[
    str | None,
    typer.Option(metavar="module:factory", help="A key's own reader, if you trust its code."),
]


@dataclass(frozen=True)
class SuspectOptions:
    """The options of the command line that say how to load or ask a suspect.

    Attributes:
        options: options of a service, by name; a value that begins with @ names a file.
        model, arguments: the model that a weight file belongs to; None means the key's model.
        transcript: a file to write questions and answers to.
        reference: a weight file that the suspect is aligned to.
        replay: whether the suspect is a transcript.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    transcript: Path | None = None
    reference: Path | None = None
    replay: bool = False


def load_unmarked_models(
    files: list[Path] | None, key: Key | TriggerDisclosure, asking: SuspectOptions
) -> list[Supplied]:
    """Return the unmarked models in the form that `verify` takes.

    Args:
        files: weight files or folders; a file that is named twice counts once.
        key: for a key of triggers, each file becomes a live model.
        asking: names the model that the files are the weights of.

    Raises:
        SuspectError: a file cannot be read.
        ConfigError: a file does not fit the model.
    """
    from countermark.keys.key import Key
    from countermark.schemes import load_scheme
    from countermark.schemes.triggers import TriggerScheme

    # Significance grows with the number of unmarked models, so the same file must not count twice.
    given = list({each.resolve(): each for each in files or []}.values())
    if not isinstance(key, Key) or not isinstance(load_scheme(key), TriggerScheme):
        return [*given]
    from countermark.training.load_predictor import load_file_predictor

    return [load_file_predictor(each, key, asking.model, asking.arguments) for each in given]


# What each family of schemes reads, in words for an error message.
_WANTED = {"weights": "a weight file", "outputs": "a folder of images"}


@contextmanager
def open_suspect(
    suspect: str, key: Key | TriggerDisclosure, asking: SuspectOptions
) -> Iterator[Suspect | Predictor | SuspectWithReference]:
    """Open a suspect in the form that `verify` takes.

    Args:
        suspect: a path or a URL.
        key: decides whether the suspect is read or asked.
        asking: the options of the command line.

    Yields: a path, a suspect with a reference model, or a function from images to classes. A
        transcript is written however the block is left.

    Raises:
        ConfigError: options that do not go with this key or suspect.
        SuspectError: a file cannot be read.
    """
    from countermark.keys.key import Key
    from countermark.schemes import load_scheme
    from countermark.schemes.triggers import TriggerScheme

    remote = suspect.startswith(("http://", "https://"))
    if isinstance(key, Key) and not isinstance(load_scheme(key), TriggerScheme):
        scheme = load_scheme(key)
        aligned_to = _load_reference(key, asking)
        # --model and --model-arg belong to the reference, which has used them; take them out so
        # that any option that is left is a mistake.
        if aligned_to is not None:
            asking = replace(asking, model=None, arguments={}, reference=None)
        if remote or asking != SuspectOptions():
            raise ConfigError(
                f"a key of {key.scheme} reads {scheme.family}: expected {_WANTED[scheme.family]}, "
                "without --model, --ask and --transcript, and no transcript"
            )
        yield (
            Path(suspect)
            if aligned_to is None
            else _make_suspect_with_reference(Path(suspect), aligned_to)
        )
    elif asking.reference:
        raise ConfigError("--reference is for keys that read weights: expected a weight file")
    elif asking.replay:
        yield _load_transcript(Path(suspect))
    elif remote:
        with _connect_service(suspect, key, asking) as service:
            yield service
    elif asking.options or asking.transcript:
        raise ConfigError("--ask and --transcript are for a service: expected a URL")
    else:
        from countermark.training.load_predictor import load_file_predictor

        yield load_file_predictor(Path(suspect), key, asking.model, asking.arguments)


def _load_reference(key: Key, asking: SuspectOptions) -> Reference | None:
    """Return the reference model that the suspect is aligned to, or None without --reference.

    Its architecture is that of --model, or else of the key's model. Without torch, or if neither is
    given, the layers of the file have to be a plain chain.

    Raises:
        ConfigError: the model cannot be built or traced, or the key names its own code as model.
        SuspectError: the file does not fit the model.
    """
    from countermark.alignment import Reference

    path, name = asking.reference, asking.model or key.model
    if path is None or name is None:
        return None if path is None else Reference(path)
    # A key comes from the owner, and building module:factory runs the owner's code. Run it only
    # if the examiner names it.
    if asking.model is None and ":" in name:
        raise ConfigError(
            "the key names code of its own as its host: if you trust it, repeat it as --model"
        )
    try:
        from countermark.training.embed_classifier import load_into
        from countermark.training.models import build
    # Without torch: a plain chain of layers can be aligned by its tensors alone.
    except ImportError:
        return Reference(path)
    own = {} if asking.model else dict(key.model_arguments)
    built = build(name, dict(asking.arguments) or own)
    load_into(built, path)
    return Reference.from_module(built, path)


def _make_suspect_with_reference(suspect: Path, reference: Reference) -> SuspectWithReference:
    """Return a suspect together with the reference model that it is aligned to."""
    from countermark.alignment import SuspectWithReference

    return SuspectWithReference(suspect, reference)


def make_fresh_triggers(key: Key | TriggerDisclosure, data: str, count: int) -> FreshTriggers:
    """Return fresh triggers, made of the first test images of a data set.

    Args:
        key: the key that makes the triggers.
        data: the name of a data set or a folder.
        count: how many test images are used.

    Raises:
        ConfigError: `count` is less than one, or a disclosure is given in place of a key.
        DataError: the data cannot be read.
    """
    from countermark.keys.key import Key
    from countermark.schemes.triggers import FreshTriggers
    from countermark.training.data import load_data

    if not isinstance(key, Key):
        raise ConfigError("--fresh makes new triggers, for which the key is needed: give --key")
    if count < 1:
        raise ConfigError(f"--fresh-images is {count}: expected at least one")
    loaded = load_data(data)
    return FreshTriggers(
        key, loaded.test_images[:count].numpy(), loaded.test_labels[:count].numpy()
    )


def _load_transcript(path: Path) -> Predictor:
    """Return the recorded answers of a transcript as a function from images to classes."""
    from countermark.predictors.remote import Transcript

    return Transcript.load(path).make_replay()


@contextmanager
def _connect_service(
    url: str, key: Key | TriggerDisclosure, asking: SuspectOptions
) -> Iterator[Predictor]:
    """Connect to a prediction service, and write the transcript when the block is left."""
    from countermark.predictors.remote import connect

    # Check the transcript's name first: questions to a service may cost money and cannot be undone.
    if asking.transcript:
        require_free_path(asking.transcript)
    with connect(url, _parse_service_options(asking.options, key)) as endpoint:
        try:
            yield endpoint
        # Also after an error: the answers so far are evidence.
        finally:
            if asking.transcript:
                endpoint.transcript.save(asking.transcript)


def _parse_service_options(given: Mapping[str, Any], key: Key | TriggerDisclosure) -> RemoteOptions:
    """Return the options of a service from --ask.

    Raises:
        ConfigError: an unknown option, a missing protocol, or a file that cannot be read.
    """
    from dataclasses import fields

    from countermark.errors import suggest_nearest
    from countermark.predictors.remote import RemoteOptions

    known = [each.name for each in fields(RemoteOptions)]
    for name in given:
        if name not in known:
            raise ConfigError(f"--ask has no {name!r}: {suggest_nearest(name, known)}")
    if "protocol" not in given:
        raise ConfigError(
            "how is the service asked? Give --ask protocol=oip, tf_serving, mlflow, image or json"
        )
    values = {name: _read_option_text(value) for name, value in given.items()}
    # The key has mean and deviation for pixels from 0 to 255; a service takes pixels from 0 to 1.
    if values.get("pixels") == "normalised":
        scale = {"mean": key.fields["mean"], "std": key.fields["deviation"]}
        values = {n: tuple(v / 255 for v in each) for n, each in scale.items()} | values
    return RemoteOptions(**values)


def _read_option_text(value: Any) -> Any:
    """Return the value of an option, or the text of a file if the value begins with @.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not isinstance(value, str) or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--ask …={value}: the file cannot be read ({error})") from None

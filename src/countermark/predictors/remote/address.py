"""The url of a remote suspect: checked, completed for its protocol, and shown without secrets."""

from __future__ import annotations

from urllib.parse import SplitResult, quote, urlsplit

from countermark.errors import ConfigError
from countermark.predictors.remote.options import RemoteOptions

# The protocols whose path names a model: the part before the model's name, and after it.
_MODELS = {"oip": ("/v2", "/infer"), "tf_serving": ("/v1", ":predict")}


def complete_url(url: str, options: RemoteOptions) -> str:
    """Complete the url that requests go to: append the path, keep the query, drop the fragment.

    Args:
        url: the url as the user gave it.
        options: the protocol, and the name of the model if the url does not hold it.

    Raises:
        ConfigError: the url is not http(s), names no host, holds a user's name or password, or
            lacks the name of a model. The message does not repeat the url, which may be secret.
    """
    parts = _split_url(url)
    path = _complete_path(parts.path, options)
    return parts._replace(path=path, fragment="").geturl()


def redact_url(url: str) -> str:
    """Return a url without query and fragment, which may hold tokens."""
    return urlsplit(url)._replace(query="", fragment="").geturl()


def _split_url(url: str) -> SplitResult:
    """Split a url into its parts.

    Raises:
        ConfigError: the url cannot be used; see `complete_url`.
    """
    if not url.isprintable() or " " in url:
        raise ConfigError("the url of a suspect holds a space or a control character: remove it")
    try:
        parts = urlsplit(url)
        # `port` raises only when it is read, so it is read here.
        known, host, _ = parts.scheme in {"http", "https"}, parts.hostname, parts.port
    except ValueError:
        raise ConfigError("the url of a suspect has a host or port that cannot be read") from None
    if not known or not host:
        raise ConfigError("the url of a suspect must begin with http:// or https:// and a host")
    # The url goes into transcripts and error messages, where a password must never stand.
    if "@" in parts.netloc:
        raise ConfigError(
            "the url of a suspect holds a user's name or password: leave it out, and put an "
            "Authorization header into the file that COUNTERMARK_HEADERS_FILE names"
        )
    return parts


def _complete_path(path: str, options: RemoteOptions) -> str:
    """Complete the path of a url for a protocol.

    Raises:
        ConfigError: the name of the model is missing, or is in the url as well as in the options.
    """
    bare = path.rstrip("/")
    if options.protocol == "mlflow":
        return bare if bare.endswith("/invocations") else f"{bare}/invocations"
    if options.protocol not in _MODELS:
        return path or "/"
    version, verb = _MODELS[options.protocol]
    carried = bare.endswith(verb) or f"{version}/models/" in bare
    if carried and options.model is not None:
        raise ConfigError(f"the url already names a model of {options.protocol}: leave model out")
    if not carried and options.model is None:
        raise ConfigError(
            f"{options.protocol} needs the name of a model: give model, or a url that ends in "
            f"{version}/models/NAME{verb}"
        )
    if options.model is None:
        return bare if bare.endswith(verb) else bare + verb
    root = bare.removesuffix("/models").removesuffix(version)
    return f"{root}{version}/models/{quote(options.model, safe='')}{verb}"

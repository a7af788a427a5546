"""The real `kaggle` package, and what its commands do not say by their exit code.

A refused source, a kernel that lands under another name and a file that failed to upload all end well there. Here each
is an error, and every request has a time limit.
"""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any, TypeVar

from ..run.errors import UserError
from .folders import DESCRIPTION
from .kernels import PLACEHOLDER, Kernel

log = logging.getLogger(__name__)
T = TypeVar("T")
TIMEOUT = 120.0  # seconds without an answer
REASONS = {
    401: "Kaggle refuses the credentials; make a new token at kaggle.com/settings",
    403: "not allowed, or no such thing under this name; check owner and slug",
    404: "no such thing; check owner and slug",
    429: "too many requests; wait a few minutes",
}
REFUSED = ("tags", "dataset_sources", "competition_sources", "kernel_sources", "model_sources")


def credentials() -> str:
    """Checks the credentials that the `kaggle` package would use, in its own order, without showing them.

    Returns:
        Where they come from.

    Raises:
        UserError: If there are none, or if the file is broken, which the package passes over in silence.
    """
    home = Path.home() / ".kaggle"
    if os.environ.get("KAGGLE_API_TOKEN"):
        return "KAGGLE_API_TOKEN"
    for token in (home / "access_token", home / "access_token.txt"):
        if token.is_file():
            return str(token)
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        return "KAGGLE_USERNAME and KAGGLE_KEY"
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), home, Path.home() / ".config" / "kaggle"]
    files = [Path(folder) / "kaggle.json" for folder in folders if folder]
    file = next((file for file in files if file.is_file()), None)
    if file is None and (home / "credentials.json").is_file():
        return str(home / "credentials.json")  # of `kaggle auth login`
    if file is None:
        advice = f"put a token of kaggle.com/settings into {home / 'access_token'} or KAGGLE_API_TOKEN"
        older = f"the older way: save kaggle.json from there as {home / 'kaggle.json'}"
        raise UserError(f"no Kaggle credentials; {advice}, or run `kaggle auth login`; {older}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        names = {name: found[name] for name in ("username", "key")}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not a credentials file; kaggle.json.example shows its shape") from error
    if PLACEHOLDER in names.values():
        raise UserError(f"{file}: still has the placeholders of kaggle.json.example; put your name and key into it")
    if os.name == "posix" and file.stat().st_mode & 0o077:
        log.warning("%s can be read by others; chmod 600 %s", file, file)
    return str(file)


def connect(timeout: float = TIMEOUT) -> Any:
    """The `kaggle` package's interface, signed in.

    Raises:
        ModuleNotFoundError: If the package is not installed.
        UserError: If there are no credentials.
    """
    source = credentials()
    api = call("signing in", _sign_in, timeout=timeout)
    log.info("Kaggle credentials: %s", source)
    return api


def _sign_in() -> Any:
    from kaggle.api.kaggle_api_extended import KaggleApi  # asks the server as soon as it is imported

    class Api(KaggleApi):
        """Fails where a file fails to upload; the package tries ten times and continues without it."""

        def _upload_file(self, file_name: str, full_path: str, *more: Any, **named: Any) -> Any:
            uploaded = super()._upload_file(file_name, full_path, *more, **named)
            if uploaded is None:
                raise UserError(f"{full_path}: the upload failed; run the same command again")
            return uploaded

    api = Api()
    api.authenticate()
    return api


def call(what: str, function: Callable[..., T], *arguments: Any, timeout: float = TIMEOUT, **named: Any) -> T:
    """Calls the package, what it prints logged, what it raises turned into one line.

    Raises:
        UserError: With what was being done, and why it failed.
    """
    import requests

    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), _time_limit(timeout):
            return function(*arguments, **named)
    except requests.HTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        reason = REASONS.get(status, "Kaggle's server failed; try again later" if status >= 500 else "")
        said_it = " ".join(str(error).split()).partition(" for url:")[0]  # addresses may be signed
        raise UserError(f"{what}: {said_it} ({status}){reason and f'; {reason}'}") from error
    except requests.Timeout as error:
        raise UserError(f"{what}: no answer from Kaggle within {timeout:g} s; try again") from error
    except requests.ConnectionError as error:
        raise UserError(f"{what}: Kaggle cannot be reached; check the internet connection") from error
    except (ValueError, OSError, SystemExit) as error:
        detail = said.getvalue().strip() if isinstance(error, SystemExit) else error
        raise UserError(f"{what}: {' '.join(str(detail).split())}") from error
    finally:
        for line in said.getvalue().splitlines():
            log.debug("kaggle: %s", line)


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Gives every request a time limit; the package sets none, and would wait for ever."""
    import requests

    plain = requests.Session.send

    def send(session: requests.Session, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        options["timeout"] = options.get("timeout") or seconds
        return plain(session, request, **options)

    requests.Session.send = send  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        requests.Session.send = plain  # type: ignore[method-assign]


def push(api: Any, kernel: Kernel, timeout: float = TIMEOUT) -> int:
    """Pushes a kernel, which also runs it.

    Returns:
        Its version.

    Raises:
        UserError: If it was refused, or if anything that it asks for was.
    """
    what = f"pushing {kernel.id}"
    found = call(what, api.kernels_push, str(kernel.folder), timeout=timeout)
    if found is None or found.error:
        raise UserError(f"{what}: {found.error if found is not None else 'no answer'}")
    refused = {name: getattr(found, f"invalid_{name}") for name in REFUSED}
    refused = {name: values for name, values in refused.items() if values}
    if refused:
        listed = "; ".join(f"{name.replace('_', ' ')} {', '.join(values)}" for name, values in refused.items())
        raise UserError(f"{what}: Kaggle took it without its {listed}; publish or correct these and push again")
    if not found.version_number:
        raise UserError(f"{what}: Kaggle answered without a version number, so nothing was pushed; try again")
    return found.version_number


def status(api: Any, kernel: str, timeout: float = TIMEOUT) -> tuple[str, str]:
    """State of a kernel's last run in small letters (queued, running, complete, error, ...), and its message."""
    found = call(f"status of {kernel}", _session, api, kernel, timeout=timeout)
    name = getattr(found.status, "name", str(found.status))
    return name.lower(), found.failure_message or ""


def _session(api: Any, kernel: str) -> Any:
    """The package's own kernels_status hides what the server answered."""
    from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

    request = ApiGetKernelSessionStatusRequest()
    request.user_name, _, request.kernel_slug = kernel.partition("/")
    with api.build_kaggle_client() as client:
        return client.kernels.kernels_api_client.get_kernel_session_status(request)


def quota(api: Any, kernels: int, hours: int, timeout: float = TIMEOUT) -> list[str]:
    """What is left of the weekly GPU hours and what some kernels may take of them, as lines; none without a GPU."""
    if not kernels:
        return []
    try:
        found = call("asking for the quota", api.quota_view, timeout=timeout)
        used, every = (
            one.total_seconds() / 3600 for one in (found.gpu_quota.time_used, found.gpu_quota.total_time_allowed)
        )
    except UserError as error:
        return [f"{error}; the GPU hours left are not known"]
    except AttributeError:  # an answer without them
        return ["GPU hours left: not known"]
    until = f", until {found.quota_refresh_time:%Y-%m-%d}" if found.quota_refresh_time else ""
    most = f"{kernels} kernel{'s' if kernels > 1 else ''} with a GPU take at most {kernels * hours} h"
    return [f"{every - used:.1f} of {every:.0f} GPU hours are left this week{until}; {most}"]


def submit(api: Any, kernel: str, version: int, competition: str, message: str, timeout: float = TIMEOUT) -> str:
    """Submits the `submission.csv` of a version of a kernel to a code competition; returns Kaggle's message."""
    what = f"submitting {kernel} version {version}"
    submitted = api.competition_submit_code
    found = call(what, submitted, "submission.csv", message, competition, kernel, version, True, timeout=timeout)
    return found.message


def publish(api: Any, folder: Path, notes: str, timeout: float = TIMEOUT) -> str:
    """Makes a dataset of a folder with a dataset-metadata.json, or a new version of it.

    Returns:
        Its address.

    Raises:
        UserError: If it was refused, or if a file could not be uploaded.
    """
    reference = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))["id"]
    if reference.startswith(PLACEHOLDER):
        raise UserError(f"{PLACEHOLDER!r} is a placeholder; put your Kaggle name into kernels/owner.json")
    what = f"publishing {reference}"
    if is_there(api, reference, "dataset", timeout):
        found = call(what, api.dataset_create_version, str(folder), notes, True, False, False, "zip", timeout=timeout)
    else:
        found = call(what, api.dataset_create_new, str(folder), False, True, False, "zip", timeout=timeout)
    if found.error or found.status.lower() not in ("ok", ""):
        raise UserError(f"{what}: {found.error or found.status}")
    return found.url


def is_there(api: Any, source: str, kind: str, timeout: float = TIMEOUT) -> bool:
    """Whether there is a `dataset` or a `kernel` called `owner/slug` that these credentials may read."""
    import requests

    def asked() -> bool:
        try:
            api.dataset_status(source) if kind == "dataset" else _session(api, source)
        except requests.HTTPError as error:
            if error.response is not None and error.response.status_code in (403, 404):
                return False
            raise
        return True

    return call(f"looking for the {kind} {source}", asked, timeout=timeout)


def missing(api: Any, kernel: Kernel, coming: Set[str], timeout: float = TIMEOUT) -> list[str]:
    """The datasets and kernels among a kernel's sources that are neither on Kaggle nor coming."""
    kinds = [(name.partition("_")[0], name) for name in ("dataset_sources", "kernel_sources")]
    sources = [(kind, source) for kind, name in kinds for source in kernel.metadata[name]]
    return [one for kind, one in sources if one not in coming and not is_there(api, one, kind, timeout)]

"""Where a run is stored: a folder, or a place in an object store with a local folder as working copy."""

import argparse
from pathlib import Path
from urllib.parse import urlparse

from evolve_ray.errors import UserError
from evolve_ray.store.object_store import PACKAGES


def is_uri(name: str) -> bool:
    """Whether `name` is in an object store; `file://` names a folder."""
    return "://" in name and not name.startswith("file://")


def run_argument(text: str) -> Path:
    """Returns the folder in the RUN argument of a command that reads a run directory; argparse calls it."""
    if is_uri(text):
        raise argparse.ArgumentTypeError(f"{text} is in an object store; give the folder that the run works in (its --work)")
    return Path(text)


def check_uri(name: str) -> tuple[str, str]:
    """Returns (the URI without a trailing slash, the path of its working copy below the folder of working copies).

    UserError for a URI that cannot hold a run.
    """
    url = urlparse(name)
    if url.username or url.password or url.query or url.fragment:
        raise UserError(
            "the URI of a run is stored with it, so it must hold no credentials and no query; give SCHEME://BUCKET/PREFIX"
        )
    if url.scheme not in PACKAGES:
        raise UserError(f"{name}: {url.scheme}:// is not supported; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    parts = [part for part in url.path.split("/") if part]
    if not url.netloc or not parts or {".", ".."} & {url.netloc, *parts}:
        raise UserError(f"{name}: must name a bucket and a prefix without . or ..; give {url.scheme}://BUCKET/PREFIX")
    return "/".join([f"{url.scheme}:/", url.netloc, *parts]), "/".join([url.scheme, url.netloc, *parts])


def places(name: str, work: str | None) -> tuple[Path, str]:
    """Returns (the folder that a run works in, the URI of the object store that holds its committed work or "").

    `name` is the --run of a command, `work` its --work.
    """
    if is_uri(name):
        uri, below = check_uri(name)
        return run_folder(work or f"runs/{below}"), uri
    if work:
        raise UserError(f"--work {work}: is only for runs in an object store; give the folder as --run")
    return run_folder(name), ""


def run_folder(name: str) -> Path:
    """Returns the absolute path of a folder on a local or shared file system; UserError for a place in an object store."""
    url = urlparse(name)
    if url.scheme == "file":
        return Path(url.path).resolve()
    if is_uri(name):
        raise UserError(f"{name}: is in an object store; give a folder on storage that all nodes share")
    return Path(name).resolve()

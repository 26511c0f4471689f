"""Where a run is: a folder on a file system, or a place in an object store with a folder to work in."""

import argparse
from pathlib import Path
from urllib.parse import urlparse

from evolve_ray.errors import UserError
from evolve_ray.store.object_store import PACKAGES


def is_uri(name: str) -> bool:
    """A place in an object store, not a folder (`file://` is one)."""
    return "://" in name and not name.startswith("file://")


def run_argument(text: str) -> Path:
    """The RUN of a command that reads a folder."""
    if is_uri(text):
        raise argparse.ArgumentTypeError(f"{text} is in an object store; give the folder that the run works in (its --work)")
    return Path(text)


def check_uri(name: str) -> tuple[str, str]:
    """(URI without a slash at its end, path of it below a folder of working copies); UserError for one that cannot hold a run."""
    url = urlparse(name)
    if url.username or url.password or url.query or url.fragment:
        raise UserError("a URI is stored with the run and must hold no credentials or query; give SCHEME://BUCKET/PREFIX")
    if url.scheme not in PACKAGES:
        raise UserError(f"{name}: {url.scheme}:// is not supported; give a folder, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX")
    parts = [part for part in url.path.split("/") if part]
    if not url.netloc or not parts or {".", ".."} & {url.netloc, *parts}:
        raise UserError(f"{name}: names no place for a run; give {url.scheme}://BUCKET/PREFIX")
    return "/".join([f"{url.scheme}:/", url.netloc, *parts]), "/".join([url.scheme, url.netloc, *parts])


def places(name: str, work: str | None) -> tuple[Path, str]:
    """The folder that a run works in, and the URI of the object store that holds what it commits; "" where there is none."""
    if is_uri(name):
        uri, below = check_uri(name)
        return run_folder(work or f"runs/{below}"), uri
    if work:
        raise UserError(f"--work {work}: is for runs of an object store only; give the folder as --run")
    return run_folder(name), ""


def run_folder(name: str) -> Path:
    """A folder on a local or shared file system."""
    url = urlparse(name)
    if url.scheme == "file":
        return Path(url.path).resolve()
    if is_uri(name):
        raise UserError(f"{name}: is in an object store; give a folder on storage that all nodes share")
    return Path(name).resolve()

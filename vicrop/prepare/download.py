"""One large file over a bad line: goes on where a broken download stopped, and checks that all of it came."""

import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

TRIES = 5
PAUSE = 2.0  # seconds before the second try; doubled for each further one
CHUNK = 1 << 20


class Unavailable(Exception):
    """A file that cannot be had; the sentence says why and what to do."""


def download(url, path):
    """Fetch a URL to a path, unless it is there already; returns the path.

    What has come is kept in `path`.part, and a later call (or try) asks for the rest only. The file gets its name once
    it has as many bytes as the server said.

    Raises:
        Unavailable: the server refuses, or all tries have failed.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            size = _fetch_rest(url, part, path.name)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is more than there should be
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):  # too slow, too many: later perhaps
                raise Unavailable(f"{url} cannot be had: {error.code} {error.reason}") from error
            failure = error
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            failure = error
        else:
            have = part.stat().st_size
            if size is None or have == size:
                part.replace(path)
                part.with_name(part.name + ".version").unlink(missing_ok=True)
                return path
            failure = f"{have} of {size} bytes came"
            if have > size:
                part.unlink()
    raise Unavailable(f"{url} could not be fetched in {TRIES} tries: {failure}; the same command goes on from there")


def _fetch_rest(url, part, name):
    """Append to `part` what is missing of it; the size of the whole, or None if the server does not say."""
    version = part.with_name(part.name + ".version")
    have = part.stat().st_size if part.exists() and version.exists() else 0  # of what version is it else?
    # All of it comes again if the file has changed since.
    headers = {"Range": f"bytes={have}-", "If-Range": version.read_text()} if have else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return have  # nothing is missing: a kill came before the last step
        raise
    with answer:
        resumed = answer.status == 206
        if not resumed:
            have = 0  # the server sends all of it again
        length = answer.headers.get("Content-Length")
        size = None if length is None else have + int(length)
        marks = [answer.headers.get(field, "W/") for field in ("ETag", "Last-Modified")]
        strong = [mark for mark in marks if not mark.startswith("W/")]  # weak ones say nothing of bytes
        if strong:
            version.write_text(strong[0])
        else:
            version.unlink(missing_ok=True)
        bar = tqdm(total=size, initial=have, desc=name, unit="B", unit_scale=True)
        with bar, part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    return size

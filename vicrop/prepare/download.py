"""The download of one large file: it goes on where a broken download stopped, and checks that the file is complete."""

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
    """A file cannot be downloaded; the message says why, and what to do."""


def download(url: str, path: str | Path) -> Path:
    """Fetch a URL to a path, unless the file exists already; returns the path.

    What has arrived is kept in `path`.part, and a later call or try asks only for the rest. The file gets its name when
    it has as many bytes as the server announced.

    Raises:
        Unavailable: the server refuses, or all tries have failed.
    """
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failure: Exception | str = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            size = _fetch_rest(url, part, path.name)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is larger than the file
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):  # 408 and 429 (too slow, too often) may pass
                raise Unavailable(f"{url} cannot be downloaded: {error.code} {error.reason}") from error
            failure = error
        except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
            failure = error
        else:
            have = part.stat().st_size
            if size is None or have == size:
                part.replace(path)
                part.with_name(part.name + ".version").unlink(missing_ok=True)
                return path
            failure = f"{have} of {size} bytes arrived"
            if have > size:
                part.unlink()
    raise Unavailable(
        f"{url} could not be fetched in {TRIES} tries: {failure}; run the same command again to go on from there"
    )


def size_of(url: str) -> int | None:
    """The bytes of a file, as its server announces them; None if it does not, or cannot be asked."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=60) as answer:
            length = answer.headers.get("Content-Length")
    except (OSError, HTTPException):  # whether it is to be had, the download will say
        return None
    return None if length is None else int(length)


def _fetch_rest(url: str, part: Path, name: str) -> int | None:
    """Append the missing rest to `part`; returns the size of the whole file, or None if the server does not tell it."""
    version = part.with_name(part.name + ".version")
    have = part.stat().st_size if part.exists() and version.exists() else 0  # without its version, the rest may not fit
    # If the file has changed since, the server sends all of it.
    headers = {"Range": f"bytes={have}-", "If-Range": version.read_text()} if have else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
            return have  # nothing is missing: an earlier call was killed before it renamed the file
        raise
    with answer:
        resumed = answer.status == 206
        if not resumed:
            have = 0  # the server sends all of it again
        length = answer.headers.get("Content-Length")
        size = None if length is None else have + int(length)
        marks = [answer.headers.get(field, "W/") for field in ("ETag", "Last-Modified")]
        strong = [mark for mark in marks if not mark.startswith("W/")]  # a weak one does not promise equal bytes
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

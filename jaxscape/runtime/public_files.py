"""Files that others publish: downloaded once, checked and cached."""

import http.client
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from jaxscape.runtime.errors import UserError, reason
from jaxscape.runtime.files import cache_dir, cached_file


@dataclass(frozen=True)
class PublicFile:
    """A file at an address whose content never changes, because the address names a commit.

    Attributes:
        title: what the file is called in messages, such as `XSTest`.
        name: the file's name in the cache.
        url: the address.
        sha256: the SHA-256 of the content in hexadecimal.
        source: authors, paper and licence, which are shown wherever the file is used.
    """

    title: str
    name: str
    url: str
    sha256: str
    source: str

    def path(self) -> Path:
        """The path of the file in the cache. It is downloaded if it is missing or damaged.

        Raises:
            UserError: the file cannot be downloaded or written, or has another checksum.
        """
        return cached_file(self.name, self.sha256, self._download)

    def _download(self, path: Path) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=30) as response:
                path.write_bytes(response.read())
        except (OSError, http.client.HTTPException) as error:
            cached = cache_dir() / self.name
            damaged = ", where a file with another content is now" if cached.exists() else ""
            raise UserError(
                f"{self.title} ({self.source}) could not be downloaded from {self.url} ({reason(error)}): get this "
                f"file in another way, and save it unchanged as {cached}{damaged}."
            ) from error

"""Read gs:// with gcsfs in single attempts, as every other store: only `core.remote.Retry` decides on retries."""

from typing import Any

from fsspec.callbacks import Callback
from gcsfs.core import GCSFileSystem


class GoogleStorage(GCSFileSystem):
    """gcsfs's client of the JSON API without its own six nested attempts, which no setting turns off.

    The class that ``import gcsfs`` offers queries the type of each bucket by gRPC, for up to a minute where gRPC is
    blocked. This class does not, so it cannot read buckets of "Rapid" storage, which have no JSON API.
    """

    _request = GCSFileSystem._request.__wrapped__
    _download = GCSFileSystem._get_file_request.__wrapped__

    async def _get_file(self, rpath: str, lpath: str, callback: Callback | None = None, **kwargs: Any) -> None:
        """Fetch a file in one request; gcsfs splits it into parallel ones, but here shards are fetched in parallel."""
        await self._download(rpath, lpath, callback=callback, **kwargs)

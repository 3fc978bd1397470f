"""gs:// by gcsfs, as every other store: one request, one attempt; `core.remote.Retry` alone decides how many more."""

from typing import Any

from fsspec.callbacks import Callback
from gcsfs.core import GCSFileSystem


class GoogleStorage(GCSFileSystem):
    """gcsfs's client of the JSON API without its own six attempts, which nest, and no setting of it turns off.

    The class that ``import gcsfs`` offers asks by gRPC what kind each bucket is, for up to a minute where gRPC does
    not get through; this one does not, so that buckets of "Rapid" storage, which have no JSON API, are not read.
    """

    _request = GCSFileSystem._request.__wrapped__
    _download = GCSFileSystem._get_file_request.__wrapped__

    async def _get_file(self, rpath: str, lpath: str, callback: Callback | None = None, **kwargs: Any) -> None:
        """In one request, where gcsfs takes several at once; several shards are fetched at once instead."""
        await self._download(rpath, lpath, callback=callback, **kwargs)

"""Run a local S3 server (moto), and fill its bucket from a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem

BUCKET = "shards"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[str]:
    """Yield the URL of a running server with an empty bucket; S3 clients of this process and its children use it."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    before = {name: os.environ.get(name) for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")}
    os.environ.update(CREDENTIALS, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    S3FileSystem.clear_instance_cache()  # fsspec keeps file systems with the address of an earlier server
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield os.environ["AWS_ENDPOINT_URL"]
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def upload(folder: Path, prefix: str) -> str:
    """Put a folder's files into the bucket; returns its URL."""
    client = boto3.client("s3")
    for path in sorted(folder.iterdir()):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.name}")
    return f"s3://{BUCKET}/{prefix}"

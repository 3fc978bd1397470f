"""Define the source of webdataset tars that hold encoded images and their labels."""

from data.tar_index import TarSamples


class ImageTars(TarSamples):
    """A source of samples ``KEY.jpg`` (.jpeg, .png, .webp, .img) with ``KEY.cls``.

    A key without such an image may have one in another format that Pillow reads.
    """

    name = "image tars"
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".img")

"""webdataset tars of encoded images and their labels."""

from data.tar_index import TarSamples


class ImageTars(TarSamples):
    """``KEY.jpg`` (or .jpeg, .png, .webp, .img) with ``KEY.cls``; a key without one may have another image format."""

    name = "image tars"
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".img")

"""Define the source of a folder, or a zip file, with one folder of images per class, as ImageNet is distributed."""

from core.reading import DamagedFileError
from core.records import canonical_hash
from data.class_folders import classes_of_folders
from data.files import Files, Listing, given
from data.images import UnreadableImageError
from data.label_file import labels_of_file
from data.left_out import instead, left_out_images
from data.sources import Example
from data.unread import image_suffixes
from data.zip_files import ZipFiles, is_zip


class ImageFolder:
    """A source of images ``root/CLASS/.../image``, local or at a URL; classes are sorted by name, images by path.

    ``root`` may be a zip file of such a folder. Images without class folders form one class, named ``images``. Labels
    in a ``dataset.json`` take precedence over folders. Raises ValueError where there are no images, where some lie
    inside class folders and some outside, and where a class folder has no readable image.
    """

    name = "image folder"
    block_sizes = None

    def __init__(self, root: str | None) -> None:
        root = given(root, "root")
        self._files: Listing = ZipFiles(root) if is_zip(root) else Files(root)
        self.paths = self._files.with_suffix(*image_suffixes())
        if not self.paths:
            way_out = "; point data.source.root to the folder that holds one folder of images per class"
            raise ValueError(
                f"There are no images among the {len(self._files.sizes)} files in {root}"
                f"{instead(self._files) or way_out}."
            )
        left_out = left_out_images(self._files, set(self.paths))
        labelled = labels_of_file(self._files, self.paths) or classes_of_folders(self._files, self.paths, left_out)
        self.class_names, self._labels, self.notes = labelled.class_names, labelled.labels, labelled.notes
        self.left_out = [*left_out, *labelled.left_out]
        listing = [(path, self._files.sizes[path]) for path in self.paths]
        content = listing if labelled.identity is None else [listing, labelled.identity]
        self.fingerprint = canonical_hash(content, spaced=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        path = self.paths[index]
        try:
            return Example(path, self._files.read(path), self._labels[index])
        except (OSError, DamagedFileError) as error:
            raise UnreadableImageError(f"{type(error).__name__}: {error}", path) from error

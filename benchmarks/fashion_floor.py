"""Measure the floor of the Fashion-MNIST studies: the distance of real images of the train split to the test split.

``python -m benchmarks.fashion_floor [--root FOLDER]`` prints one JSON line, with the features of these studies (a
classifier of the train split, from ``cache`` or trained for five minutes): the distance of the first 10,000 images of
the train split, as many as the studies sample, and of all 60,000. A model that copied its training data would have it.
"""

import argparse
import json

import numpy as np

from benchmarks.commit import current_commit
from data.idx import FashionMnist
from data.sources import load_images
from evaluation.features.classifier import ClassifierFeatures
from evaluation.metrics.statistics import FeatureStatistics, frechet_distance

SIDE, AT_ONCE, SAMPLED = 28, 1000, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="/usr/share/datasets/fashion-mnist", help="folder with the IDX files")
    root = parser.parse_args().root
    train, test = (FashionMnist(root, split) for split in ("train", "test"))
    # As conf/evaluation/fashion_mnist.yaml has it.
    features = ClassifierFeatures(train, SIDE, "cache", epochs=3, test_source=test)

    def statistics(source: FashionMnist, count: int) -> FeatureStatistics:
        images, _ = load_images(source, SIDE)
        parts = [features(images[first : first + AT_ONCE]).vectors for first in range(0, count, AT_ONCE)]
        return FeatureStatistics.of(np.concatenate(parts)[:count])

    real = statistics(test, len(test))
    result = {
        "benchmark": "fashion_floor",
        "feature_extractor_hash": features.hash,
        **features.facts,
        "frechet_distance_of_10000_train_images": frechet_distance(real, statistics(train, SAMPLED)),
        "frechet_distance_of_60000_train_images": frechet_distance(real, statistics(train, len(train))),
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

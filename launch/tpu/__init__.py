"""Train on a slice of Cloud TPUs by driving ``gcloud``: ``ditscale launch tpu``."""

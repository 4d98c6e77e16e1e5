"""The kinds of data sets that can be imported.

Each kind has one function, which checks a data set and returns it as a `Source`.
"""

from multitask.data.sources.huggingface import huggingface
from multitask.data.sources.image_folder import image_folder
from multitask.data.sources.interface import Source
from multitask.data.sources.paths_parquet import paths_parquet
from multitask.data.sources.places365 import places365
from multitask.data.sources.torchvision_dataset import torchvision_dataset
from multitask.data.sources.webdataset import webdataset

__all__ = [
    "Source",
    "huggingface",
    "image_folder",
    "paths_parquet",
    "places365",
    "torchvision_dataset",
    "webdataset",
]

"""Image tables on Arrow: written once as Parquet shards, read as tensors at any resolution."""

from multitask.data.batches import Batch, TrainBatches, eval_batches
from multitask.data.format import DataError, write_table
from multitask.data.table import ImageTable, open_table

__all__ = ["Batch", "DataError", "ImageTable", "TrainBatches", "eval_batches", "open_table", "write_table"]

"""Studies: grids of fine-tuning runs, resumable run by run, one row a run."""

from .rows import COLUMNS, Row, read_rows, write_rows

__all__ = ["COLUMNS", "Row", "read_rows", "write_rows"]

"""BK-SDM (arXiv 2305.15798) as a workbook: the thin package under the notebooks."""

__version__ = "0.1.0"

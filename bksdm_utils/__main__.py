"""`python -m bksdm_utils`."""

from .workbook.cli import main

main(prog_name="bksdm")

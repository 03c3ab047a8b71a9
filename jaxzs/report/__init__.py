"""What a run leaves behind: a JSON record; and what is made of records: tables, plots, sweeps that go on."""

from jaxzs.report.page import Written, write_page
from jaxzs.report.records import Record, data_entry, environment, model_entry, read_record, write_record
from jaxzs.report.results import Confusion, Convergence, Figure, PerClass, Pseudolabels, Reliability, Results
from jaxzs.report.robin_hood import RobinHood, plot_robin_hood, robin_hood
from jaxzs.report.sweep import Sweep
from jaxzs.report.tables import markdown_table, write_csv
from jaxzs.report.timing import measured

__all__ = [
    "Confusion",
    "Convergence",
    "Figure",
    "PerClass",
    "Pseudolabels",
    "Record",
    "Reliability",
    "Results",
    "RobinHood",
    "Sweep",
    "Written",
    "data_entry",
    "environment",
    "markdown_table",
    "measured",
    "model_entry",
    "plot_robin_hood",
    "read_record",
    "robin_hood",
    "write_csv",
    "write_page",
    "write_record",
]

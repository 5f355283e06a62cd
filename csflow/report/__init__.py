"""The report job: one self-contained HTML page about an archive's scores, and a list of its defects.

`job` is the order of events, `config` its settings; `archive` reads what the jobs have written, `defects`
decides what is on the list, `charts` turns columns into what is drawn, `gallery` makes the pictures, and
`page` puts all of it into one file.
"""

from csflow.report.config import ReportConfig
from csflow.report.job import report

__all__ = ["ReportConfig", "report"]

"""What a report looks like: a small document model and its writers (text, HTML, JSON).

Knows nothing of norms. A result object builds a `Document`; `text.write` prints it, `html.write`
makes a page of it, and `json.dumps` writes the result object itself.
"""

from stillnorm.reports.document import Bar as Bar
from stillnorm.reports.document import Bars as Bars
from stillnorm.reports.document import Block as Block
from stillnorm.reports.document import Code as Code
from stillnorm.reports.document import Diagnostic as Diagnostic
from stillnorm.reports.document import Document as Document
from stillnorm.reports.document import Heading as Heading
from stillnorm.reports.document import Histogram as Histogram
from stillnorm.reports.document import Line as Line
from stillnorm.reports.document import Quote as Quote
from stillnorm.reports.document import Series as Series
from stillnorm.reports.document import Span as Span
from stillnorm.reports.document import Table as Table
from stillnorm.reports.document import Text as Text

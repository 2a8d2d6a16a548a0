"""What a held layer is: its class, its forward, and the algebra of that forward.

`hold` and `release` are the primitives for one layer; the verbs over a model are in `freezing`.
"""

from stillnorm.holding.hold import hold as hold
from stillnorm.holding.hold import part_unheld as part_unheld
from stillnorm.holding.hold import release as release
from stillnorm.holding.hold import remember as remember
from stillnorm.holding.hold import why_not as why_not
from stillnorm.holding.hold import why_not_release as why_not_release

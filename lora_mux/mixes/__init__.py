"""Mixes of adapters outside of a model: as a text, and as one adapter for other engines.

row_text    "sql+0.4*french" <-> {"sql": 1.0, "french": 0.4}
composing   PEFT folders and a row -> one PEFT folder
"""

from .composing import compose as compose
from .row_text import format_row as format_row
from .row_text import parse_row as parse_row

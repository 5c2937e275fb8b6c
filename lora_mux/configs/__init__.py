"""What PEFT's configs say of an adapter. They come from strangers: everything is checked.

peft_config     the fields of a LoraConfig: honoured, ignored or refused
fields          each of them as the type that it must have
patterns        the patterns of a config, which are strangers' programs
written_config  the other way: fields that say what an adapter is
new_adapter     layers, ranks and initial factors of one that is to be trained
"""

from .fields import MAX_ALPHA as MAX_ALPHA
from .new_adapter import initial_factors as initial_factors
from .new_adapter import new_strengths as new_strengths
from .peft_config import HONOURED as HONOURED
from .peft_config import MAX_CONFIG_BYTES as MAX_CONFIG_BYTES
from .peft_config import PeftConfig as PeftConfig
from .peft_config import Strength as Strength
from .peft_config import parse_config as parse_config
from .peft_config import parse_fields as parse_fields
from .written_config import config_fields as config_fields

"""Write small random checkpoints of every family's true architecture, in the published layout."""

from tests.tiny_checkpoints.chameleon_files import CHAMELEON_CODES, CHAMELEON_SIDE, chameleon
from tests.tiny_checkpoints.common import WORDS, livelier, tokenizer
from tests.tiny_checkpoints.emu3_files import EMU3_CODES, EMU3_SIDE, emu3
from tests.tiny_checkpoints.janus_files import (
    JANUS_CODES,
    JANUS_SIDE,
    JANUS_TOKENS,
    janus_word,
    tiny_janus,
)
from tests.tiny_checkpoints.llamagen_files import (
    LLAMAGEN_CODES,
    LLAMAGEN_HEADS,
    LLAMAGEN_PREFIX,
    LLAMAGEN_SIDE,
    llamagen,
    llamagen_published,
)
from tests.tiny_checkpoints.llava_files import llava
from tests.tiny_checkpoints.taming_decoder import TamingDecoder
from tests.tiny_checkpoints.vila_u_files import VILAU_CODES, VILAU_DEPTH, VILAU_SIDE, vila_u

__all__ = [
    "CHAMELEON_CODES",
    "CHAMELEON_SIDE",
    "EMU3_CODES",
    "EMU3_SIDE",
    "JANUS_CODES",
    "JANUS_SIDE",
    "JANUS_TOKENS",
    "LLAMAGEN_CODES",
    "LLAMAGEN_HEADS",
    "LLAMAGEN_PREFIX",
    "LLAMAGEN_SIDE",
    "VILAU_CODES",
    "VILAU_DEPTH",
    "VILAU_SIDE",
    "WORDS",
    "TamingDecoder",
    "chameleon",
    "emu3",
    "janus_word",
    "livelier",
    "llamagen",
    "llamagen_published",
    "llava",
    "tiny_janus",
    "tokenizer",
    "vila_u",
]

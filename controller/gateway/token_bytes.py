"""The bytes of single tokens: what text cannot say, when a character is split over tokens."""

import json

from tokenizers import Tokenizer

WORD_START = "▁"  # how SentencePiece writes a space


class TokenBytes(dict[int, bytes]):
    """The bytes of each token on its own, found once; at most a vocabulary of them.

    Args:
        tokenizer: Byte-level, or of SentencePiece's kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._added = {
            token_id: token.content.encode()
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"))
        self._is_byte_level = '"ByteLevel"' in decoder

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = self._bytes_of(token_id)
        return self[token_id]

    def _bytes_of(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        piece: str = self._tokenizer.id_to_token(token_id) or ""  # padding of the vocabulary
        if self._is_byte_level and all(character in _BYTE_OF for character in piece):
            return bytes(_BYTE_OF[character] for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(WORD_START, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary.

    Printable bytes stand for themselves; the others, in order, for the characters from 256 on
    (GPT-2's encoder).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()

"""The bytes that each token of a vocabulary stands for."""

import json
import re

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's tokens for single bytes
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


class TokenBytes:
    """Reads the vocabulary of a tokenizer, of the byte-level kind (GPT-2's) or of SentencePiece's."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        decoder = tokenizer.decoder
        steps = json.loads(decoder.__getstate__()) if decoder is not None else {}
        self._byte_level = any(step.get("type") == "ByteLevel" for step in [steps, *steps.get("decoders", ())])

    def of(self, token_id: int) -> bytes:
        """A token's own bytes, white space included; none for an id that the tokenizer does not know."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return bytes(BYTES[character] for character in token)
        single = _BYTE.fullmatch(token)
        return bytes([int(single[1], 16)]) if single else token.replace(_SPACE, " ").encode()


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's alphabet: printable characters stand for their own bytes, the characters from 256 on for the others."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _bytes_by_character()

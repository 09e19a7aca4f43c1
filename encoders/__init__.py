"""Text towers: text -> token ids -> hidden states; one file, one family."""

from .base import Encoder, EncoderSpec, Piece, create_encoder, families, identify_encoder

__all__ = ["Encoder", "EncoderSpec", "Piece", "create_encoder", "families", "identify_encoder"]

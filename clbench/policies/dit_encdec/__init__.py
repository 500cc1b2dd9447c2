"""DiT-EncDec: an encoder over observation and word tokens, a decoder that cross-attends to it."""

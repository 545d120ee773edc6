"""Reading graphs from LiteRT (.tflite) files."""

IDENTIFIER = b"TFL3"
"""Bytes 4 to 7 of a .tflite file."""

"""Graphs from LiteRT (.tflite) files."""

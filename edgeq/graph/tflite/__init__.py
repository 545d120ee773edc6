"""Reading graphs from LiteRT (.tflite) files."""

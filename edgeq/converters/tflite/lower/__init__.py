"""Writing graphs as .tflite files, operator by operator."""

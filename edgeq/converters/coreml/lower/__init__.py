"""Writing graphs as Core ML programs, operator by operator."""

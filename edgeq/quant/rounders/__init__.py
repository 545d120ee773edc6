"""Methods that round a matrix: to nearest, least squares, palettes and GPTQ."""

"""Weight schemes, packed tensors and safetensors files."""

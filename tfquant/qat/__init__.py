"""Quantization-aware training: Keras models with fake quantization where INT8 rounds."""

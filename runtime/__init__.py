"""Runs a bundle: needs numpy and one provider, never torch, onnx or transformers."""

"""TensorRT behind one module: library, compatibility, profiles, engines, and captures of whole steps."""

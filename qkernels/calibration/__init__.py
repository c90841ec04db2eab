"""What a model's own data say of its layers: blocks, the inputs that reach them, statistics."""

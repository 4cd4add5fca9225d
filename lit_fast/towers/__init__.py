"""A frozen vision tower: weights, model, preprocessing and pooling."""

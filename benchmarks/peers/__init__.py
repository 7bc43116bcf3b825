"""Other implementations of the model, which ours is compared with."""

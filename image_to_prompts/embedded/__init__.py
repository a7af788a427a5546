"""The stand-in world: prompts from a grammar, scenes of emoji, and the whole chain on them."""

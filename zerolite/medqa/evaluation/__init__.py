"""How good a model is: losses, texts, choices, a comparison with its base, what it says where lives are at risk."""

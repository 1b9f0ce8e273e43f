"""What a model is worth: loss on held-out rows, answers, and later accuracy and efficiency."""

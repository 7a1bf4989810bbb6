"""How fast the operators are: against eager PyTorch, torch.compile and a copy of the same bytes, side by side."""

"""Statistics of activations, and the ranges that estimators read off them."""

"""Loading a model, and `ModelView`: one view over both TransformerLens classes.

This is the only folder that imports TransformerLens.
"""

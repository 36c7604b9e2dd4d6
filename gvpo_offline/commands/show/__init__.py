"""`gvpo-offline show`: groups of a dataset as the model reads them."""

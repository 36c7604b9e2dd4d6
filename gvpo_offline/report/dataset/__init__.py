"""What a page about a dataset says: facts from one pass over it, and sections made of them."""

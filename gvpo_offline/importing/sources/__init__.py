"""Files to rows: where inputs lie, which bytes they are, what stands in them."""

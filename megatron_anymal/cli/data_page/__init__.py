"""`anymal inspect --html`: a page that shows samples and packs as the model sees them."""

"""``python -m benchmarks.published_cells``: cells of the catalogue, compared with the packages that published them."""

"""Plans: how a call is split over threads and where its buffers are."""

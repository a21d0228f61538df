"""The over-optimisation study: quality against KL, in an exactly known world and on real runs."""

"""Side-by-side measurements: ratios within one run on one machine, peers beside us. Never a test."""

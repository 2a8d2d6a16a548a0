"""What samples, statistics and answers say: pure functions whose unit is the sample."""

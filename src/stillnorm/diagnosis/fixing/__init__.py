"""What repairs a finding: applied, tried, accepted, written as a call."""

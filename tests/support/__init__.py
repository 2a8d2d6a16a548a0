"""What tests share: oracles, tolerances, real architectures. Independent of stillnorm."""
